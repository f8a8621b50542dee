"""Pruned weights of every layer, in number and as a proportion (Fig. 5 of the FFW paper)."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from ffw_fast.figures.rows import Rows
from ffw_fast.figures.style import color, legend, new_axes, new_figure
from ffw_fast.runs.reading import RunFolder, open_run


def numbers(paths: list[Path]) -> Rows:
    """One row a layer, of the first path's run."""
    return run_numbers(open_run(paths[0]))


def run_numbers(run: RunFolder) -> Rows:
    """What the final scores prune: weights, or channels where a gate belongs to a channel."""
    rows = []
    for name, scores in run.scores().items():
        pruned = int((scores < 0).sum())
        rows.append({"layer": name, "gates": scores.numel(), "pruned": pruned, "share": pruned / scores.numel()})
    return rows


def draw(rows: Rows) -> Figure:
    """Bars of kept and pruned gates on a common scale, and beside them their proportion."""
    figure = new_figure(0.9 + 0.24 * len(rows))
    count, share = new_axes(figure, 1, 2, sharey=True)
    places = range(len(rows))
    for axes, whole, part in (
        (count, [row["gates"] for row in rows], [row["pruned"] for row in rows]),
        (share, [1.0] * len(rows), [row["share"] for row in rows]),
    ):
        axes.barh(places, part, color=color("warm"), height=0.62, label="pruned")
        kept = [everything - gone for everything, gone in zip(whole, part, strict=True)]
        axes.barh(places, kept, left=part, color=color("pruned"), alpha=0.35, height=0.62, label="kept")
        axes.grid(False, axis="y")
    count.set_yticks(places, [row["layer"] for row in rows], color=color("ink"))
    count.invert_yaxis()
    count.set_xlabel("number")
    count.xaxis.set_major_formatter(EngFormatter(sep=""))
    count.xaxis.set_major_locator(MaxNLocator(3))
    share.set(xlim=(0, 1), xlabel="proportion")
    for place, row in zip(places, rows, strict=True):
        share.annotate(f"{row['share']:.0%}", (0.97, place), ha="right", va="center", fontsize=8, color=color("ink"))
    legend(count)
    return figure
