"""Information of output and bias against biasedness: the curve of equation 15, and measured networks on it."""

from pathlib import Path

from matplotlib.figure import Figure

from ffw_fast.figures.rows import Rows, groups
from ffw_fast.figures.style import color, draw_dots, legend, new_axes, new_figure
from ffw_fast.runs.reading import find_runs
from ffw_fast.theory import normalized_bias_output_information

STEPS = 100


def numbers(paths: list[Path]) -> Rows:
    """The curve (network "theory"), and one row for each run, network and bias. ``ValueError`` without any.

    The curve holds for a set where every bias is equally likely with every target, as the unbiased test sets are.
    """
    measured: Rows = []
    for run in find_runs(paths):
        for network, found in run.networks.items():
            for bias, phi, info in zip(
                run.bias_names, found.get("biasedness", []), found.get("output_mi", []), strict=False
            ):
                if phi is not None:
                    measured.append(
                        {"run": str(run.path), "network": network, "bias": bias, "phi": phi, "information": info}
                    )
    if not measured:
        raise ValueError(f"no run in {', '.join(map(str, paths))} tells biasedness; ffw-fast run writes it")
    counts = {run.settings["num_bias_classes"] for run in find_runs(paths)}
    if len(counts) > 1:
        raise ValueError(f"runs with different numbers of bias classes have different curves: {sorted(counts)}")
    (classes,) = counts
    curve: Rows = [
        {
            "network": "theory",
            "phi": step / STEPS,
            "information": normalized_bias_output_information(1 / classes, step / STEPS, classes),
        }
        for step in range(STEPS + 1)
    ]
    return curve + measured


def draw(rows: Rows) -> Figure:
    """The curve, and a dot for each measured network and bias."""
    figure = new_figure(3.2)
    (axes,) = new_axes(figure)
    for network, own in groups(rows, "network").items():
        points = [row["phi"] for row in own], [row["information"] for row in own]
        if network == "theory":
            axes.plot(*points, color=color("muted"), linewidth=1.4, label="equation 15")
        else:
            draw_dots(axes, *points, network)
    axes.set(xlabel="biasedness", ylabel="I(bias; output) / log N", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    legend(axes, columns=4)
    return figure
