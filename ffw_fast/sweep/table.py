"""The table of a sweep: its file, ``sweep.csv``, and what it says over seeds."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, TypeAlias

from ffw_fast.files import DamagedFileError, read_text, written_whole
from ffw_fast.tables import Lines, spread

TABLE = "sweep.csv"
FINISHED, NOT_RUN = "finished", "not run"  # a status
STOPPED = "stopped early"  # how the status of a trial begins that a scheduler ended; any other is why it failed
Row: TypeAlias = dict[str, Any]  # "trial", the options that vary, "status", and what a finished trial measured


def write_sweep(file: Path, rows: Sequence[Row]) -> None:
    """One line a trial; columns are empty where it was not measured."""
    with written_whole(file) as path, path.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(dict.fromkeys(column for row in rows for column in row)))
        writer.writeheader()
        writer.writerows(rows)


def read_sweep(file: Path) -> list[Row]:
    """What ``write_sweep`` wrote, without the empty columns; numbers are numbers again.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    reader = csv.DictReader(io.StringIO(read_text(file), newline=""))
    columns = reader.fieldnames or []
    if not {"trial", "status"} <= set(columns):
        raise DamagedFileError(f"{file} holds no sweep: it must have the columns trial and status")
    try:
        rows = [{name: _value(text) for name, text in row.items() if text} for row in reader]
    except (TypeError, csv.Error) as error:
        raise DamagedFileError(f"{file} is damaged: {error}") from error
    if bad := [row for row in rows if not {"trial", "status"} <= set(row)]:
        raise DamagedFileError(f"{file} is damaged: a line has no trial or no status: {bad[0]}")
    return rows


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def varied_options(rows: Sequence[Row]) -> list[str]:
    """The options in which the trials differ."""
    columns = list(rows[0])
    return columns[columns.index("trial") + 1 : columns.index("status")]


def finished_trials(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["status"] == FINISHED]


def failed_trials(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["status"] not in (FINISHED, NOT_RUN) and not row["status"].startswith(STOPPED)]


def warning_trials(rows: Sequence[Row]) -> list[Row]:
    """Those finished whose runs warn of something."""
    return [row for row in finished_trials(rows) if row.get("warnings")]


def sweep_lines(rows: Sequence[Row], bias_names: Sequence[str]) -> Lines:
    """One line for each setting but the seed: mean and standard deviation of the best networks of its seeds."""
    varied = [name for name in varied_options(rows) if name != "seed"]
    heads = [f"{name}\nread by a head" for name in bias_names]
    columns = [*varied, "seeds", "task accuracy", "worst group\nof a bias", *heads, "sparsity", "epochs", "seconds"]
    groups: dict[tuple, list[Row]] = {}
    for row in finished_trials(rows):
        groups.setdefault(tuple(row.get(name, "") for name in varied), []).append(row)
    accuracies = ["best_task_accuracy", "best_worst_group"]
    accuracies += [f"best_bias_accuracy_{index + 1}" for index, _ in enumerate(bias_names)]
    lines = [
        [
            *(short(value) for value in setting),
            str(len(members)),
            *(spread([row[column] for row in members]) for column in accuracies),
            f"{mean(row['best_sparsity'] for row in members):.2f}",
            f"{mean(row['epochs'] for row in members):.0f}",
            f"{mean(row['seconds'] for row in members):.0f}",
        ]
        for setting, members in groups.items()
    ]
    return Lines("best networks on the unbiased test set, mean and standard deviation over seeds", columns, lines)


def short(value: Any) -> str:
    """As short as it is exact: 3.0 is 3."""
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
