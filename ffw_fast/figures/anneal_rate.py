"""The adaptive schedule over its rate and gamma: accuracy, leakage, and the epochs that it takes."""

from pathlib import Path

from matplotlib.figure import Figure

from ffw_fast.figures.rows import Rows, groups
from ffw_fast.figures.style import label_line, legend_below, new_axes, new_figure, series_color
from ffw_fast.figures.sweeps import draw_spread, run_rows

PANELS = {
    "pruned_task_accuracy": "accuracy on unbiased data",
    "pruned_bias_accuracy": "accuracy of heads that read the bias",
    "epochs": "epochs",
}


def numbers(paths: list[Path]) -> Rows:
    """One row a run with the adaptive schedule. ``ValueError`` where there is none."""
    rows = run_rows(
        paths,
        anneal_rate=lambda run: run.settings["anneal_rate"],
        gamma=lambda run: run.settings["gamma"],
        epochs=lambda run: run.metrics["epochs"],
    )
    if not (adaptive := [row for row in rows if row["schedule"] == "adaptive"]):
        raise ValueError(f"no run with schedule 'adaptive' in {', '.join(map(str, paths))}")
    return adaptive


def draw(rows: Rows) -> Figure:
    """Three panels over the rate, a line for each gamma."""
    figure = new_figure(2.9, 8.4)
    rates = sorted(groups(rows, "anneal_rate"))
    panels = new_axes(figure, 1, len(PANELS))
    for axes, (column, title) in zip(panels, PANELS.items(), strict=True):
        for index, (gamma, own) in enumerate(sorted(groups(rows, "gamma").items())):
            draw_spread(axes, own, "anneal_rate", column, series_color(index), f"gamma {gamma:g}")
        axes.set(xscale="log", xlabel="anneal_rate")
        axes.set_title(title)
        axes.set_xticks(rates, [_short(rate) for rate in rates], fontsize=8, rotation=45)
        axes.minorticks_off()
    for axes in panels[:2]:
        axes.set_ylim(0, 1.02)
    panels[2].set_ylim(bottom=0)
    label_line(panels[1], rows[0]["chance"], "chance", above=False)
    legend_below(figure, panels[0], columns=4)
    return figure


def _short(rate: float) -> str:
    """``1.25e-5``: as one types it."""
    mantissa, exponent = f"{rate:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"
