"""What figures over many runs share: task and bias accuracy against one setting, mean and spread over seeds."""

from collections.abc import Callable, Collection, Sequence
from itertools import cycle
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ffw_fast.figures.rows import Rows, groups, spread
from ffw_fast.figures.style import color, label_line, legend, new_axes, new_figure
from ffw_fast.runs.reading import RunFolder, find_runs

# Of task and bias accuracy, for each schedule.
SERIES_COLORS = (("pruned", "warm"), ("best", "plum"), ("muted", "gold"))


def run_rows(paths: list[Path], **settings: Callable[[RunFolder], float]) -> Rows:
    """One row a run: the named settings, and what was measured of its vanilla, its pruned and its best network.

    The biases' accuracies are their mean. Runs that were interrupted are left out.

    Raises:
        ValueError: runs of several workloads, runs of one schedule that differ in more than the named settings and the
            seed, or none that was finished.
    """
    runs = [run for run in find_runs(paths) if run.metrics.get("complete", True)]
    if not runs:
        raise ValueError(f"no finished run in {', '.join(map(str, paths))}")
    if len(titles := sorted({run.config.get("workload", run.title) for run in runs})) > 1:
        raise ValueError(f"runs of several workloads do not go into one figure: {', '.join(titles)}")
    for schedule in {run.settings["schedule"] for run in runs}:
        _check_alike([run for run in runs if run.settings["schedule"] == schedule], settings)
    order = ("schedule", *settings, "seed")
    return sorted((_row(run, settings) for run in runs), key=lambda row: [row[name] for name in order])


def _check_alike(runs: Sequence[RunFolder], shown: Collection[str]) -> None:
    """``ValueError`` where runs differ in what is not shown: the figure would take that for spread over seeds."""
    asked = [_asked(run) for run in runs]
    for name in dict.fromkeys(name for one in asked for name in one):
        values = sorted({str(one.get(name)) for one in asked})
        if name not in shown and len(values) > 1:
            raise ValueError(f"runs that differ in {name} do not go into one figure: {', '.join(values)}")


def _asked(run: RunFolder) -> dict[str, Any]:
    """What the results of a run depend on, but for its seed and for how long it may take at most."""
    recipe, options = run.config.get("vanilla_recipe") or {}, run.config.get("data_options") or {}
    asked = {**options, "vanilla_epochs": recipe.get("epochs"), **run.settings}
    return {name: value for name, value in asked.items() if name not in ("seed", "max_epochs")}


def _row(run: RunFolder, settings: dict[str, Callable[[RunFolder], float]]) -> dict[str, Any]:
    row = {"schedule": run.settings["schedule"], **{name: setting(run) for name, setting in settings.items()}}
    row |= {"seed": run.settings["seed"], "chance": run.chance}
    for network, found in run.networks.items():
        row[f"{network}_task_accuracy"] = found["task_accuracy"]
        row[f"{network}_bias_accuracy"] = mean(found["bias_accuracy"])
        row[f"{network}_sparsity"] = found["sparsity"]
    return row


def draw_against(rows: Rows, name: str, label: str, logarithmic: bool = False) -> Figure:
    """Task and bias accuracy of the pruned network, a line for each schedule; the vanilla network's are dotted."""
    figure = new_figure(3.2)
    (axes,) = new_axes(figure)
    for (schedule, own), hues in zip(groups(rows, "schedule").items(), cycle(SERIES_COLORS), strict=False):
        for kind, hue in zip(("task", "bias"), hues, strict=True):
            draw_spread(axes, own, name, f"pruned_{kind}_accuracy", color(hue), f"{kind}, {schedule}")
    for kind, style in (("task", ":"), ("bias", "--")):
        points = [
            (x, spread(row[f"vanilla_{kind}_accuracy"] for row in own)[0]) for x, own in groups(rows, name).items()
        ]
        points.sort()
        axes.plot(*zip(*points, strict=True), style, color=color("vanilla"), linewidth=1.2, label=f"{kind}, vanilla")
    label_line(axes, rows[0]["chance"], "chance")
    if logarithmic:
        axes.set_xscale("log")
        ticks = sorted(groups(rows, name))
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    axes.set(xlabel=label, ylabel="accuracy", ylim=(0, 1.02))
    legend(axes, columns=2)
    return figure


def draw_spread(axes: Axes, rows: Rows, x: str, y: str, hue: str, label: str) -> None:
    """Mean of y at every x as a line with dots, and one standard deviation around it."""
    points = [(at, *spread(row[y] for row in own)) for at, own in sorted(groups(rows, x).items())]
    places, means, deviations = (list(column) for column in zip(*points, strict=True))
    axes.plot(places, means, "o-", color=hue, label=label)
    low, high = ([m + sign * d for m, d in zip(means, deviations, strict=True)] for sign in (-1, 1))
    axes.fill_between(places, low, high, color=hue, alpha=0.15, linewidth=0)
