"""FFW against magnitude pruning over sparsity (Fig. 7 of the FFW paper)."""

from pathlib import Path

from matplotlib.figure import Figure

from ffw_fast.figures.comparisons import read_comparison
from ffw_fast.figures.rows import Rows, groups, spread
from ffw_fast.figures.style import color, label_line, legend, new_axes, new_figure
from ffw_fast.figures.sweeps import draw_spread

FAMILIES = ("vanilla", "magnitude pruning", "FFW")


def numbers(paths: list[Path]) -> Rows:
    """One row for each method and seed, of the first path's comparison: vanilla, magnitude pruning and FFW.

    Not FFW by channels, whose sparsity is a share of channels.
    """
    rows = [row for row in read_comparison(paths[0])[1] if row["family"] in FAMILIES]
    return [row for row in rows if "channel gates" not in row["method"]]


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
