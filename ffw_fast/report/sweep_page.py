"""The page of a sweep: settings over their seeds, figures of what was varied, and the single runs."""

from pathlib import Path

from ffw_fast.figures import figure_module
from ffw_fast.report.page import Picture, asked, origin, picture, render
from ffw_fast.runs.reading import REPORT, find_runs
from ffw_fast.sweep.table import (
    TABLE,
    failed_trials,
    finished_trials,
    read_sweep,
    sweep_lines,
    varied_options,
    warning_trials,
)

WITHIN = {"seed", "schedule"}  # what any figure of sweeps shows besides
FIGURES = {  # figure: its title, and the options that it can show; with others it would average over them
    "gamma": ("Over gamma", {"gamma"}),
    "training-length": ("Over the length of the biased training", {"vanilla_epochs"}),
    "anneal-rate": ("Over the rate of the adaptive schedule", {"anneal_rate", "gamma"}),
}


def sweep_page(path: Path) -> str:
    """The whole page of a folder of ``ffw-fast sweep``.

    Raises:
        FileNotFoundError: no run of the sweep is there yet.
        ValueError: a file is damaged.
    """
    trials = read_sweep(path / TABLE)
    varied, finished = varied_options(trials), finished_trials(trials)
    folders = [path / trial["trial"] for trial in finished]
    run = find_runs(folders or [path])[0]
    return render(
        "sweep.html.j2",
        run.title,
        path,
        trials=trials,
        varied=varied,
        finished=len(finished),
        failed=failed_trials(trials),
        warning=warning_trials(trials),
        chance=run.chance,
        outcome=sweep_lines(trials, run.bias_names),
        pictures=pictures(folders, varied),
        reports=[trial["trial"] for trial in trials if (path / trial["trial"] / REPORT).exists()],
        report=REPORT,
        asked=asked({name: value for name, value in run.settings.items() if name not in varied}),
        origin=origin(run.config, {}),
    )


def pictures(folders: list[Path], varied: list[str]) -> list[Picture]:
    """The figure of these runs that shows all that was varied."""
    options = set(varied) - WITHIN
    name = next((name for name, (_, shown) in FIGURES.items() if options and options <= shown), None)
    if name is None or not folders:
        return []
    if name == "anneal-rate" and all(run.settings["schedule"] != "adaptive" for run in find_runs(folders)):
        return []  # the rate changed nothing
    caption = "Mean over seeds, with one standard deviation around it."
    return [picture(name, FIGURES[name][0], caption, figure_module(name).numbers(folders), wide=name == "anneal-rate")]
