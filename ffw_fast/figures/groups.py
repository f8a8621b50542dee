"""Accuracy by groups: of all samples, of those that agree with a bias and those that conflict, and the worst group."""

from pathlib import Path

from matplotlib.figure import Figure

from ffw_fast.figures.rows import Rows, groups
from ffw_fast.figures.style import color, draw_dots, legend, new_axes, new_figure, verbatim
from ffw_fast.runs.reading import RunFolder, open_run


def numbers(paths: list[Path]) -> Rows:
    """One row for each network and group, of the first path's run. ``ValueError`` where groups were not measured."""
    run = open_run(paths[0])
    if rows := run_numbers(run):
        return rows
    raise ValueError(f"{run.path} holds no accuracies of groups: ffw-fast run measures them, Extraction.save does not")


def run_numbers(run: RunFolder) -> Rows:
    """Columns network, group and accuracy; no row where groups were not measured."""
    return [
        {"network": name, "group": group, "accuracy": accuracy}
        for name, network in run.networks.items()
        if "groups" in network
        for group, accuracy in _accuracies(network["groups"], run.bias_names)
        if accuracy is not None
    ]


def _accuracies(found: dict, biases: list[str]) -> list[tuple[str, float | None]]:
    rows: list[tuple[str, float | None]] = [("all samples", found["average"])]
    for index, bias in enumerate(biases):
        rows += [
            (f"{bias}: aligned", found["bias_aligned"][index]),
            (f"{bias}: conflicting", found["bias_conflicting"][index]),
            (f"{bias}: worst group", found["bias_worst_group"][index]),
        ]
    if len(biases) > 1:
        rows += [(cell, accuracy) for cell, accuracy in found["cells"].items()]
    return rows


def draw(rows: Rows) -> Figure:
    """A dot for each network on the line of each group."""
    by_group = groups(rows, "group")
    figure = new_figure(0.75 + 0.27 * len(by_group))
    (axes,) = new_axes(figure)
    for network, own in groups(rows, "network").items():
        places = [list(by_group).index(row["group"]) for row in own]
        draw_dots(axes, [row["accuracy"] for row in own], places, network)
    for place, own in enumerate(by_group.values()):
        values = [row["accuracy"] for row in own]
        axes.plot([min(values), max(values)], [place, place], color=color("grid"), linewidth=3, zorder=0)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(len(by_group) - 0.5, -0.5)
    axes.set_yticks(range(len(by_group)), list(map(verbatim, by_group)), color=color("ink"))
    axes.set_xlabel("accuracy")
    axes.grid(False, axis="y")
    legend(axes)
    return figure
