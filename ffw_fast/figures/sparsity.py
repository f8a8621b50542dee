"""FFW against magnitude pruning over sparsity (Fig. 7 of the FFW paper)."""

import re
from pathlib import Path

from matplotlib.figure import Figure

from ffw_fast.comparison.record import read_comparison
from ffw_fast.figures.comparisons import comparison_rows
from ffw_fast.figures.rows import Rows, groups, spread
from ffw_fast.figures.style import color, label_line, legend, new_axes, new_figure
from ffw_fast.figures.sweeps import draw_spread

FAMILIES = ("vanilla", "magnitude pruning", "FFW")
BY_CHANNELS = re.compile("channel gates|BISE")


def numbers(paths: list[Path]) -> Rows:
    """One row for each method and seed, of the first path's comparison: see ``of_sparsity``."""
    return of_sparsity(comparison_rows(read_comparison(paths[0])))


def of_sparsity(rows: Rows) -> Rows:
    """Vanilla, magnitude pruning and FFW; not what prunes channels, whose sparsity is a share of these."""
    return [row for row in rows if row["family"] in FAMILIES and not BY_CHANNELS.search(row["method"])]


def draw(rows: Rows) -> Figure:
    """Task and bias accuracy; magnitude pruning as lines, every setting of FFW as a point where it ended."""
    figure = new_figure(3.2)
    (axes,) = new_axes(figure)
    pruned = [row for row in rows if row["family"] != "FFW"]  # the vanilla network is where the lines start
    for kind, hue in (("task", "pruned"), ("bias", "warm")):
        column = f"{kind}_accuracy"
        draw_spread(axes, pruned, "sparsity", column, color(hue), f"{kind}, magnitude pruning")
        settings = groups([row for row in rows if row["family"] == "FFW"], "method").values()
        for index, own in enumerate(settings):
            (x, x_spread), (y, y_spread) = (spread(row[name] for row in own) for name in ("sparsity", column))
            axes.errorbar(
                x, y, xerr=x_spread, yerr=y_spread, fmt="D", color=color(hue), markersize=6, elinewidth=1,
                markerfacecolor="none", markeredgewidth=1.5, label=None if index else f"{kind}, FFW",
            )  # fmt: skip
    label_line(axes, rows[0]["chance"], "chance")
    axes.set(xlabel="share of weights pruned", ylabel="accuracy", xlim=(-0.02, 1), ylim=(0, 1.02))
    legend(axes, columns=2)
    return figure
