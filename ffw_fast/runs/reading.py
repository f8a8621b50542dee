"""Reads what runs left in their folders, for figures and the report."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ffw_fast.extraction import BEST_SCORES, CONFIG, HISTORY, METRICS, SCORES, read_history
from ffw_fast.files import DamagedFileError, read_json, read_tensors
from ffw_fast.settings import DEFAULTS
from ffw_fast.sizes import SIZES

EXAMPLES = "examples.safetensors"
REPORT = "report.html"
COMPACT = "compact.safetensors"
PROGRAMS = ("model.onnx", "model.pt2")
OF_THE_NETWORK = (REPORT, COMPACT, SIZES, *PROGRAMS)  # what commands made of a run's results
NETWORKS = ("vanilla", "pruned", "best")
MEASURED_ON = {  # what ``metrics.json`` says, in words
    "test": "the unbiased test set",
    "val": "the validation set",
    "train": "the training set",
}


@dataclass(frozen=True)
class RunFolder:
    """A folder that ``ffw-fast run`` or ``Extraction.save`` wrote. Whatever is damaged raises ``ValueError``."""

    path: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.path / CONFIG)

    @cached_property
    def metrics(self) -> dict[str, Any]:
        return read_json(self.path / METRICS)

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """One row an epoch, as in ``Extraction.history``."""
        return read_history(self.path / HISTORY)

    @property
    def settings(self) -> dict[str, Any]:
        """Of the extraction; one that the version of the file did not know was what is now its default."""
        return {**DEFAULTS, **self.config["settings"]}

    @property
    def title(self) -> str:
        return self.config.get("title") or self.config.get("workload") or "Extraction"

    @property
    def chance(self) -> float:
        """The accuracy of a head that has nothing to read."""
        return 1 / self.settings["num_bias_classes"]

    @property
    def networks(self) -> dict[str, dict[str, Any]]:
        """The measured networks of ``metrics.json`` by name."""
        return {name: self.metrics[name] for name in NETWORKS if name in self.metrics}

    @property
    def bias_names(self) -> list[str]:
        """What the biases are called, in the order of their columns."""
        count = len(next(iter(self.networks.values()))["bias_accuracy"])
        names = self.metrics.get("bias_names", [])
        return (
            names if len(names) == count else [f"bias {index + 1}" if count > 1 else "bias" for index in range(count)]
        )

    @property
    def sizes(self) -> dict[str, Any] | None:
        """What ``ffw_fast.sizes.compare_sizes`` gave; None where sizes were not measured."""
        return read_json(self.path / SIZES) if (self.path / SIZES).exists() else None

    def scores(self, best: bool = False) -> dict[str, Tensor]:
        """Scores by layer name, of the last epoch or the best ones."""
        return read_tensors(self.path / (BEST_SCORES if best else SCORES))[0]

    def examples(self) -> dict[str, Tensor]:
        """What ``ffw_fast.attribution.explain`` gave; empty where the data are no images."""
        path = self.path / EXAMPLES
        return read_tensors(path)[0] if path.exists() else {}


@contextmanager
def damage_named(paths: Iterable[Path]) -> Iterator[None]:
    """Within it what files lack, or hold in another form than they are read in, is a ``DamagedFileError``."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        where = ", ".join(map(str, paths))
        raise DamagedFileError(f"{where} is incomplete, damaged or of another kind: {error!r}") from error


def open_run(folder: Path) -> RunFolder:
    """The folder, checked.

    Raises:
        FileNotFoundError: it holds no run.
        ValueError: its configuration, metrics or history are damaged.
    """
    if missing := [name for name in (CONFIG, METRICS, HISTORY) if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} is no run folder: it has no {', '.join(missing)}")
    run = RunFolder(folder)
    settings = run.config.get("settings")
    if not isinstance(settings, dict) or not isinstance(settings.get("num_bias_classes"), int):
        raise ValueError(f"{folder / CONFIG} does not hold the settings of an extraction")
    if not run.networks or any("bias_accuracy" not in network for network in run.networks.values()):
        raise ValueError(f"{folder / METRICS} does not hold the metrics of an extraction")
    if not run.history:
        raise ValueError(f"{folder / HISTORY} holds no epoch")
    return run


def find_runs(paths: Iterable[Path]) -> list[RunFolder]:
    """All run folders at and below the paths, each once, in the order of their names.

    Raises:
        FileNotFoundError: there are none.
        ValueError: one is damaged.
    """
    paths = list(paths)
    folders = {folder.resolve(): folder for path in paths for folder in _run_folders_below(path)}
    if not folders:
        raise FileNotFoundError(f"no run folder in {', '.join(map(str, paths))}: none holds {CONFIG} and {METRICS}")
    return list(map(open_run, folders.values()))


def _run_folders_below(path: Path) -> Iterator[Path]:
    """Without hidden ones, in which a run that was killed left what it was about to write."""
    for metrics in sorted(path.rglob(METRICS)):
        is_hidden = any(part.startswith(".") for part in metrics.relative_to(path).parts)
        if not is_hidden and all((metrics.parent / name).is_file() for name in (CONFIG, HISTORY)):
            yield metrics.parent
