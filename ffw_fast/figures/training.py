"""The course of one extraction: accuracies, information and temperature, epoch by epoch."""

from itertools import pairwise
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ffw_fast.figures.rows import Rows
from ffw_fast.figures.style import color, label_line, legend, new_axes, new_figure
from ffw_fast.runs.reading import RunFolder, open_run


def numbers(paths: list[Path]) -> Rows:
    """One row an epoch, of the first path's run."""
    return run_numbers(open_run(paths[0]))


def run_numbers(run: RunFolder) -> Rows:
    """Validation figures; the biases' accuracies are their mean.

    ``pruned_`` figures are there where the pruned network was judged, those of validation where there is such a set.
    """
    return [
        {
            "epoch": row["epoch"],
            "temperature": row["temperature"],
            "half_open": row.get("half_open"),
            "task_accuracy": row.get("val_task_accuracy"),
            "bias_accuracy": _mean(row.get("val_bias_accuracy")),
            "pruned_task_accuracy": row.get("pruned_task_accuracy"),
            "pruned_bias_accuracy": _mean(row.get("pruned_bias_accuracy")),
            "train_mi": row["train_mi"],
            "val_mi": row.get("val_mi"),
            "chance": run.chance,
            "anneals": run.settings.get("schedule") == "adaptive",
        }
        for row in run.history
    ]


def _mean(values: list[float] | None) -> float | None:
    return mean(values) if values else None


def draw(rows: Rows) -> Figure:
    """Three panels over epochs; tenfold falls of the temperature are thin upright lines."""
    figure = new_figure(5.2)
    accuracy, information, temperature = new_axes(figure, 3, 1, sharex=True, height_ratios=(1.3, 1, 1))
    epochs = [row["epoch"] for row in rows]
    validated = [row for row in rows if row["task_accuracy"] is not None]
    for name, title, hue in (("task", "task", "pruned"), ("bias", "bias, by a head", "warm")):
        _plot(accuracy, validated, f"{name}_accuracy", hue, title)
        judged = [row for row in rows if row[f"pruned_{name}_accuracy"] is not None]
        accuracy.plot(
            [row["epoch"] for row in judged],
            [row[f"pruned_{name}_accuracy"] for row in judged],
            "o", color=color(hue), markersize=4,
            label="pruned then" if name == "task" else None,
        )  # fmt: skip
    label_line(accuracy, rows[0]["chance"], "chance")
    accuracy.set(ylim=(0, 1.02), ylabel="accuracy")
    if validated:
        legend(accuracy)
    else:
        accuracy.set_title("no validation set", fontsize=8.5, color=color("muted"))
    _plot(information, rows, "train_mi", "vanilla", "training")
    _plot(information, validated, "val_mi", "plum", "validation")
    information.set(ylabel="information", ylim=(0, None))
    legend(information)
    temperature.plot(epochs, [row["temperature"] for row in rows], color=color("gold"), drawstyle=_style(rows))
    temperature.set(yscale="log", ylabel="temperature", xlabel="epoch")
    temperature.margins(y=0.15)
    _draw_distance(temperature, rows)
    for epoch in _falls(rows):
        for axes in (accuracy, information, temperature):
            axes.axvline(epoch, color=color("grid"), linewidth=1.2, zorder=0)
    for axes in (accuracy, information, temperature):
        axes.grid(False, axis="x")
        axes.yaxis.label.set_fontsize(8.5)
    figure.align_ylabels()
    return figure


def _plot(axes: Axes, rows: Rows, name: str, hue: str, label: str) -> None:
    axes.plot([row["epoch"] for row in rows], [row[name] for row in rows], color=color(hue), label=label)


def _style(rows: Rows) -> str:
    return "default" if rows[0]["anneals"] else "steps-mid"


def _draw_distance(temperature: Axes, rows: Rows) -> None:
    """How far gates are from open or shut, on a scale of its own, where the history tells it."""
    known = [row for row in rows if row["half_open"] is not None]
    if not known:
        return
    axes = temperature.twinx()
    axes.plot([row["epoch"] for row in known], [row["half_open"] for row in known], color=color("best"), linewidth=1.2)
    axes.set_ylabel("half-open gates", color=color("best"), fontsize=8.5)
    axes.tick_params(labelcolor=color("best"))
    axes.set_ylim(0, None)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _falls(rows: Rows) -> list[float]:
    """Between which epochs T fell tenfold, or passed another power of ten."""
    falls, reached = [], rows[0]["temperature"]
    for before, row in pairwise(rows):
        if row["temperature"] <= reached / 10 * (1 + 1e-3):
            falls.append((before["epoch"] + row["epoch"]) / 2)
            reached = row["temperature"]
    return falls
