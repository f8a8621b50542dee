"""Accuracy and leakage against the number of different digits in the unbiased set, over several comparisons."""

from pathlib import Path

from matplotlib.figure import Figure

from ffw_fast.comparison.record import read_comparison
from ffw_fast.figures.comparisons import comparison_rows
from ffw_fast.figures.rows import Rows, groups
from ffw_fast.figures.style import label_line, legend_below, new_axes, new_figure, series_color
from ffw_fast.figures.sweeps import draw_spread

LONG = 40  # letters of a method's name, of which three do not stand beside each other
LEFT_OUT = ("vanilla", "magnitude pruning")  # they do not use the unbiased set


def numbers(paths: list[Path]) -> Rows:
    """One row for each comparison, method and seed.

    Raises:
        ValueError: a comparison does not tell its digits, or none has come to a method that uses them.
    """
    rows: Rows = []
    for path in paths:
        comparison = read_comparison(path)
        digits = (comparison.identity.get("data_options") or {}).get("unbiased_digits")
        if digits is None:
            raise ValueError(f"the comparison in {path} was made without --unbiased-digits")
        found = comparison_rows(comparison)
        rows += [{"unbiased_digits": digits, **row} for row in found if row["family"] not in LEFT_OUT]
    if not rows:
        raise ValueError(f"no method that uses unbiased digits in {', '.join(map(str, paths))} yet")
    return rows


def draw(rows: Rows) -> Figure:
    """Two panels over the number of digits: task accuracy, and the mean accuracy of the heads."""
    figure = new_figure(3.1, 7.4)
    panels = new_axes(figure, 1, 2)
    digits = sorted(groups(rows, "unbiased_digits"))
    titles = {"task_accuracy": "accuracy on unbiased data", "bias_accuracy": "accuracy of heads that read the bias"}
    for axes, (column, title) in zip(panels, titles.items(), strict=True):
        for index, (method, own) in enumerate(groups(rows, "method").items()):
            draw_spread(axes, own, "unbiased_digits", column, series_color(index), method)
        axes.set_title(title)
        axes.set(ylim=(0, 1.02), xscale="log", xlabel="different digits in the unbiased set")
        axes.set_xticks(digits, [str(count) for count in digits])
        axes.minorticks_off()
    label_line(panels[1], rows[0]["chance"], "chance", above=False)
    are_long = any(len(method) > LONG for method in groups(rows, "method"))
    legend_below(figure, panels[0], columns=2 if are_long else 3)
    return figure
