"""What a fall of the temperature does to the gates: the published tenfold cut beside the adaptive schedule."""

import itertools
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ffw_fast.figures.rows import Rows, groups
from ffw_fast.figures.style import color, legend_below, new_axes, new_figure
from ffw_fast.files import read_json

LINES = {  # column: (what it is, colour)
    "gated": ("gated", "ink"),
    "pruned_at_half": ("pruned at g < 1/2", "best"),
    "pruned_at_zero": ("pruned at m < 0", "pruned"),
}
SCHEDULES = ("published", "adaptive")
WHEN = {"before": "muted", "after": "warm"}


def numbers(paths: list[Path]) -> Rows:
    """One row an epoch of each schedule, and one for each bin of the gates before and after the first cut.

    Args:
        paths: the file that ``ffw-fast bench cooling --json FILE`` wrote.

    Raises:
        FileNotFoundError: there is none.
    """
    content = read_json(paths[0])
    epochs = [{"schedule": name, **row} for name in SCHEDULES for row in content[name]["epochs"]]
    bins = [
        {"when": when, "gate": (index + 0.5) / len(counts), "share": count / sum(counts)}
        for when, counts in content["published"]["histograms"].items()
        for index, count in enumerate(counts)
    ]
    return [*epochs, *bins]


def draw(rows: Rows) -> Figure:
    """A panel for each schedule, accuracy over epochs, and one with the gates before and after the first cut."""
    figure = new_figure(2.9, 8.4)
    panels = new_axes(figure, 1, len(SCHEDULES) + 1)
    by_schedule = groups([row for row in rows if "epoch" in row], "schedule")
    for axes, (name, own) in zip(panels, by_schedule.items(), strict=False):
        _draw_course(axes, name, own)
    _draw_gates(panels[-1], groups([row for row in rows if "gate" in row], "when"))
    legend_below(figure, panels[0], columns=4)
    return figure


def _draw_course(axes: Axes, schedule: str, rows: Rows) -> None:
    epochs = [row["epoch"] for row in rows]
    for column, (label, hue) in LINES.items():
        axes.plot(epochs, [row[column] for row in rows], color=color(hue), linewidth=1.3, label=label)
    axes.set(ylim=(0, 1.02), xlabel="epoch")
    axes.set_title(f"{schedule}: validation accuracy")
    for before, after in itertools.pairwise(rows):
        if schedule == "published" and after["temperature"] < before["temperature"]:
            axes.axvline(after["epoch"], color=color("muted"), linewidth=0.6, linestyle=(0, (2, 3)), zorder=0)


def _draw_gates(axes: Axes, by_time: dict[str, Rows]) -> None:
    for when, own in by_time.items():
        places, shares = [row["gate"] for row in own], [row["share"] for row in own]
        axes.step(places, shares, where="mid", color=color(WHEN[when]), label=f"{when} the first cut")
    axes.set(xlabel="gate", xlim=(0, 1), yscale="log")  # nearly all gates are open
    axes.set_title("published: share of gates")
    axes.legend(loc="upper left")
