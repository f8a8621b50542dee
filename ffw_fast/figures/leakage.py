"""What a private head reads of each bias, beside chance, and its information beside the shuffled floor."""

from pathlib import Path

from matplotlib.figure import Figure

from ffw_fast.figures.rows import Rows
from ffw_fast.figures.style import color, draw_dots, legend, new_axes, new_figure, verbatim
from ffw_fast.runs.reading import RunFolder, open_run


def numbers(paths: list[Path]) -> Rows:
    """One row for each network and bias, of the first path's run."""
    return run_numbers(open_run(paths[0]))


def run_numbers(run: RunFolder) -> Rows:
    """Head accuracies and information of every network; the floor is None where it was not measured."""
    return [
        {
            "network": name,
            "bias": bias,
            "bias_accuracy": network["bias_accuracy"][index],
            "bias_mi": network["bias_mi"][index],
            "bias_mi_floor": network["bias_mi_floor"][index] if "bias_mi_floor" in network else None,
            "chance": run.chance,
        }
        for name, network in run.networks.items()
        for index, bias in enumerate(run.bias_names)
    ]


def draw(rows: Rows) -> Figure:
    """A dot for each network on the line of each bias; ticks are chance and the shuffled floor."""
    biases = list(dict.fromkeys(row["bias"] for row in rows))
    figure = new_figure(1.5 + 0.7 * len(biases))
    accuracy, information = new_axes(figure, 2, 1)
    for axes, column, floor, title in (
        (accuracy, "bias_accuracy", "chance", "accuracy of a head (tick: chance)"),
        (information, "bias_mi", "bias_mi_floor", "its mutual information (ticks: with shuffled labels)"),
    ):
        for network in dict.fromkeys(row["network"] for row in rows):
            own = [row for row in rows if row["network"] == network]
            places = [biases.index(row["bias"]) for row in own]
            values = [row[column] for row in own]
            draw_dots(axes, values, places, network)
            ticks = [(row[floor], place) for row, place in zip(own, places, strict=True) if row[floor] is not None]
            if ticks:
                axes.plot(*zip(*ticks, strict=True), "|", color=color("muted"), markersize=15, markeredgewidth=1)
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(len(biases) - 0.5, -0.5)
        axes.set_yticks(range(len(biases)), list(map(verbatim, biases)), color=color("ink"))
        axes.set_xlabel(title)
        axes.grid(False, axis="x")
    legend(accuracy)
    return figure
