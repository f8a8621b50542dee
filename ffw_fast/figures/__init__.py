"""The figures: one file each, with ``numbers`` (what is shown) and ``draw`` (how), over one style.

A figure is drawn from nothing but the numbers that are written beside it. Matplotlib is the extra ``figures``.
"""

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from ffw_fast.figures.rows import write_rows
from ffw_fast.runs.reading import damage_named

MISSING = "figures need matplotlib: pip install 'ffw_fast[figures]'"


@dataclass(frozen=True)
class Figure:
    """A figure by name.

    Attributes:
        shows: what is to be seen, in one line.
        reads: what it is made from.
        several: whether it takes more than one of these.
    """

    shows: str
    reads: str
    several: bool = False


FIGURES = {
    "training": Figure("the course of one extraction, epoch by epoch", "a run folder"),
    "leakage": Figure("what heads read of the biases, beside chance and the shuffled floor", "a run folder"),
    "groups": Figure("accuracy of aligned, conflicting and worst groups", "a run folder"),
    "layers": Figure("pruned weights of every layer, in number and proportion (Fig. 5)", "a run folder"),
    "grad-cam": Figure("what the biased and the pruned network look at (Fig. 4)", "a run folder"),
    "gamma": Figure("task and bias accuracy against gamma (Fig. 6, Table 1)", "folders of runs", several=True),
    "training-length": Figure(
        "extraction after biased training of different length (Fig. 8)", "folders of runs", several=True
    ),
    "sparsity": Figure("FFW against magnitude pruning over sparsity (Fig. 7)", "the folder of one comparison"),
    "trade-off": Figure(
        "task accuracy against leakage of all methods, mean and spread", "the folder of one comparison"
    ),
    "unbiased-digits": Figure(
        "accuracy and leakage against the number of unbiased digits", "folders of comparisons", several=True
    ),
    "anneal-rate": Figure("the adaptive schedule over its rate and gamma", "folders of runs", several=True),
    "cooling": Figure("what a fall of T does to gates and accuracy", "the file of ffw-fast bench cooling --json"),
    "theory": Figure(
        "information of output and bias against biasedness, with measured networks", "folders of runs", several=True
    ),
}


def figure_module(name: str) -> ModuleType:
    """The module that makes the figure. ``ImportError`` that names the extra, where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(MISSING) from error
    return importlib.import_module(f"ffw_fast.figures.{name.replace('-', '_')}")


def make_figure(name: str, paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> list[Path]:
    """Write ``NAME.png``, ``NAME.svg`` and ``NAME.csv``, the numbers behind them, into a folder; their paths.

    Args:
        name: one of ``FIGURES``.
        paths: run folders, folders that hold such, or folders of comparisons: see ``FIGURES[name].reads``.
        out: the folder to write to; it is made where it is not there.

    Raises:
        ValueError: an unknown name, more paths than the figure is made from, or files that are damaged or hold nothing
            that it shows.
        FileNotFoundError: nothing to read at the paths.
        ImportError: matplotlib is not installed.
    """
    if name not in FIGURES:
        raise ValueError(f"unknown figure {name!r}; known figures: {', '.join(FIGURES)}")
    if len(paths) > 1 and not FIGURES[name].several:
        raise ValueError(f"figure {name} is made from {FIGURES[name].reads}, got {', '.join(map(str, paths))}")
    module = figure_module(name)
    from ffw_fast.figures.style import in_style, save

    sources, folder = [Path(path) for path in paths], Path(out)
    with damage_named(sources), in_style():
        rows = module.numbers(sources)
        folder.mkdir(parents=True, exist_ok=True)
        table = folder / f"{name}.csv"
        write_rows(table, rows)
        return [*save(module.draw(rows), folder, name), table]
