"""What ``ffw-fast compare`` found: its file, and the tables of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, TypeAlias

from ffw_fast.files import DamagedFileError, read_json, write_json
from ffw_fast.tables import Lines, spread
from ffw_fast.workloads import WORKLOADS, Workload

RESULTS = "compare.json"
Row: TypeAlias = dict[str, Any]  # what was measured of one network of one seed
Rows: TypeAlias = dict[str, list[Row]]  # method -> one row a seed
Column: TypeAlias = tuple[str, Callable[[list[Row]], str]]  # its title, and the text of one method's rows
MEASURED = ("seed", "task_accuracy", "bias_accuracy", "sparsity")  # what any row holds


@dataclass(frozen=True)
class Comparison:
    """The contents of ``compare.json``.

    Attributes:
        identity: what all rows have in common: workload, data, settings.
        rows: what was measured.
        made: software and machine of the latest row; empty in files that do not tell.
    """

    identity: dict[str, Any]
    rows: Rows
    made: dict[str, Any]

    def write(self, path: Path) -> None:
        write_json(path, {"identity": self.identity, "made": self.made, "methods": self.rows})

    @property
    def workload(self) -> Workload:
        return WORKLOADS[self.identity["workload"]]

    @property
    def chance(self) -> float:
        """The accuracy of a head that has nothing to read."""
        return 1 / self.identity["settings"]["num_bias_classes"]

    @property
    def seeds(self) -> list[int]:
        """All seeds that some method has a row of."""
        return sorted({row["seed"] for found in self.rows.values() for row in found})


def read_comparison(path: Path) -> Comparison:
    """The file, or that of the folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of a workload that is not known here.
    """
    file = path / RESULTS if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(f"{path} is no folder of a comparison: it has no {RESULTS}")
    content = read_json(file)
    identity, rows = content.get("identity"), content.get("methods")
    if not isinstance(identity, dict) or not isinstance(rows, dict):
        raise DamagedFileError(f"{file} is damaged, or no comparison: it must hold identity and methods")
    try:
        known = all(name in row for found in rows.values() for row in found for name in MEASURED)
        complete = known and identity["workload"] in WORKLOADS and identity["settings"]["num_bias_classes"] > 1
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedFileError(f"{file} does not hold a comparison: {error!r} is missing or of another kind") from error
    if not complete:
        raise DamagedFileError(f"{file} does not hold a comparison of a known workload with {', '.join(MEASURED)}")
    if not any(rows.values()):
        raise ValueError(f"{file} holds no results")
    return Comparison(identity, rows, content.get("made") or {})


def outcome_columns(bias_names: Sequence[str]) -> list[Column]:
    """What the networks do, and what leaks of the biases."""
    columns: list[Column] = [
        ("task accuracy", lambda found: spread([row["task_accuracy"] for row in found])),
        ("worst group\nof a bias", lambda found: spread([min(row["groups"]["bias_worst_group"]) for row in found])),
        *((f"{name}\nread by a head", _of_bias("bias_accuracy", index)) for index, name in enumerate(bias_names)),
    ]
    if len(bias_names) > 1:
        columns.append(("mean of the\ncells", lambda found: spread([mean(_cells(row).values()) for row in found])))
    return columns


def group_columns(rows: Rows, bias_names: Sequence[str]) -> list[Column]:
    """Accuracy by cells (aligned with which bias), and the information of head and bias."""
    measured = (row.get("groups", {}).get("cells", {}) for found in rows.values() for row in found)
    cells = dict.fromkeys(cell for cells in measured for cell in cells)
    columns: list[Column] = [(cell, _of_cell(cell)) for cell in cells]
    for index, name in enumerate(bias_names):
        columns += [
            (f"{name}\nMI", _of_bias("bias_mi", index)),
            (f"{name}\nfloor", _of_bias("bias_mi_floor", index)),
        ]
    return columns


def cost_columns() -> list[Column]:
    """What the networks cost to find and to run, and the data that it took."""
    return [
        ("sparsity", lambda found: f"{mean(row['sparsity'] for row in found):.2f}"),
        ("MACs", _mean_macs),
        ("epochs", lambda found: f"{mean(row['epochs'] for row in found):.0f}"),
        ("steps", lambda found: f"{mean(row['steps'] for row in found):.0f}"),
        ("seconds", lambda found: f"{mean(row['seconds'] for row in found):.0f}"),
        ("labelled data", lambda found: found[0].get("needs", "-")),
    ]


def comparison_lines(title: str, rows: Rows, columns: Sequence[Column]) -> Lines:
    """One line a method."""
    lines = [[method, *(_text(cell, found) for _, cell in columns)] for method, found in rows.items() if found]
    return Lines(title, ["network", *(name for name, _ in columns)], lines)


def _text(cell: Callable[[list[Row]], str], found: list[Row]) -> str:
    try:
        return cell(found)
    except KeyError:  # not measured by the version that wrote the row
        return "-"


def _cells(row: Row) -> dict[str, float]:
    return row["groups"]["cells"]


def _of_cell(cell: str) -> Callable[[list[Row]], str]:
    return lambda found: spread([_cells(row)[cell] for row in found])


def _of_bias(name: str, index: int) -> Callable[[list[Row]], str]:
    return lambda found: spread([row[name][index] for row in found])


def _mean_macs(found: list[Row]) -> str:
    counts = [row["macs"] for row in found if row.get("macs") is not None]
    return f"{mean(counts):,.0f}" if counts else "-"
