"""Task accuracy against what leaks of the bias: every method of a comparison, mean and spread over seeds."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ffw_fast.comparison.record import read_comparison
from ffw_fast.figures.comparisons import comparison_rows
from ffw_fast.figures.rows import Rows, groups, spread
from ffw_fast.figures.style import color, new_axes, new_figure

HUES = {
    "FFW": "pruned",
    "FFW, fine-tuned": "best",
    "trained on the unbiased set": "gold",
    "magnitude pruning": "vanilla",
    "vanilla": "ink",  # drawn last: mild magnitude pruning lies upon it
}


def numbers(paths: list[Path]) -> Rows:
    """One row for each method and seed, of the first path's comparison."""
    return comparison_rows(read_comparison(paths[0]))


def draw(rows: Rows) -> Figure:
    """Task accuracy upwards, mean accuracy of the heads to the right: the best place is the upper left corner.

    Points are numbered, since most of them lie close together; the names stand beside, by family.
    """
    figure = new_figure(4.2, 7.4)
    (axes,) = new_axes(figure)
    order = list(HUES)
    methods = sorted(groups(rows, "method").items(), key=lambda entry: order.index(entry[1][0]["family"]))
    names = []
    for number, (method, own) in enumerate(methods, start=1):
        task, task_spread = spread(row["task_accuracy"] for row in own)
        bias, bias_spread = spread(row["bias_accuracy"] for row in own)
        hue = color(HUES[own[0]["family"]])
        axes.errorbar(bias, task, xerr=bias_spread, yerr=task_spread, color=hue, elinewidth=0.8, alpha=0.6, zorder=2)
        axes.plot(bias, task, "o", color=hue, markersize=11, markeredgewidth=0, zorder=3 + number)
        axes.annotate(
            str(number), (bias, task), ha="center", va="center_baseline", fontsize=7, color="white", zorder=3 + number
        )
        mark = f"${number}$"
        names.append(Line2D([], [], linestyle="", marker=mark, color=hue, mew=0, markersize=6.5, label=method))
    chance = rows[0]["chance"]
    axes.axvline(chance, color=color("muted"), linewidth=0.8, linestyle=(0, (3, 3)))
    axes.set(xlabel="accuracy of heads that read the bias", ylabel="task accuracy, unbiased test set")
    axes.set_xlim(max(0, chance - 0.06), 1.04)
    axes.annotate(
        "chance", (chance, 0), xycoords=("data", "axes fraction"), xytext=(3, 4), textcoords="offset points",
        fontsize=8, color=color("muted"),
    )  # fmt: skip
    figure.legend(handles=names, loc="outside right upper", fontsize=8, handletextpad=0.4)
    return figure
