"""Extraction from networks whose biased training was of different length (Fig. 8 of the FFW paper)."""

from pathlib import Path

from matplotlib.figure import Figure

from ffw_fast.figures.rows import Rows
from ffw_fast.figures.sweeps import draw_against, run_rows
from ffw_fast.runs.reading import RunFolder


def numbers(paths: list[Path]) -> Rows:
    """One row a run, of all runs below the paths."""
    return run_rows(paths, vanilla_epochs=_epochs)


def _epochs(run: RunFolder) -> int:
    recipe = run.config.get("vanilla_recipe") or {}
    if "epochs" not in recipe:
        raise ValueError(f"{run.path} does not tell how long its biased network was trained")
    return recipe["epochs"]


def draw(rows: Rows) -> Figure:
    """See ``draw_against``."""
    return draw_against(rows, "vanilla_epochs", "epochs of the biased network's training")
