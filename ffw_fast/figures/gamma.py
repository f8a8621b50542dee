"""Task and bias accuracy against gamma, the weight of the mutual information (Fig. 6 and Table 1 of the FFW paper)."""

from pathlib import Path

from matplotlib.figure import Figure

from ffw_fast.figures.rows import Rows, groups
from ffw_fast.figures.sweeps import draw_against, run_rows


def numbers(paths: list[Path]) -> Rows:
    """One row a run, of all runs below the paths."""
    return run_rows(paths, gamma=lambda run: run.settings["gamma"])


def draw(rows: Rows) -> Figure:
    """See ``draw_against``; gamma is on a logarithmic scale where its values span more than a factor of ten."""
    values = [value for value in groups(rows, "gamma") if value > 0]
    wide = len(values) == len(groups(rows, "gamma")) and max(values) / min(values) > 10
    return draw_against(rows, "gamma", "gamma", logarithmic=wide)
