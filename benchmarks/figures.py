"""Plots of the benchmarks, by matplotlib (the extra ``figures``)."""

from importlib.util import find_spec
from typing import Any


def need_matplotlib() -> None:
    """``ImportError`` that says how to get it; called before anything is measured."""
    if find_spec("matplotlib") is None:
        raise ImportError("a plot needs matplotlib: pip install 'ffw_fast[figures]'")


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Any, list[Any]]:
    """A figure of so many inches, without a display, and its axes side by side."""
    need_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])
