"""Many extractions of one workload over a grid of settings, and one table of what came out.

Every setting is a run folder of its own, as ``ffw-fast run`` makes it, so whatever reads one reads these. Biased
networks are trained once each, before the extractions, and shared. What is finished is never run again.
"""

import re
import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from hashlib import blake2b
from json import dumps
from pathlib import Path
from typing import Any

from ffw_fast.extraction import METRICS
from ffw_fast.files import read_json
from ffw_fast.progress import Progress
from ffw_fast.runs.reading import NETWORKS, REPORT
from ffw_fast.runs.request import Request, vanilla_identity
from ffw_fast.runs.run import is_finished
from ffw_fast.runs.writing import VANILLA, VANILLA_RECORD, check_free
from ffw_fast.sweep.engines import Engine, Job
from ffw_fast.sweep.table import FINISHED, NOT_RUN, TABLE, Row, read_sweep, short, write_sweep

VANILLA_FOLDER = "vanilla"


@dataclass(frozen=True)
class Trial:
    """One setting of a sweep.

    Attributes:
        varied: the options in which the settings of the sweep differ, with this one's values.
        request: what ``ffw-fast run`` is asked for.
        arguments: the command line that asks for it, without the folder.
    """

    varied: dict[str, Any]
    request: Request
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its folder."""
        return trial_name(self.varied)

    def job(self) -> Job:
        """Its extraction."""
        return replace(self._job(self.request.out, ()), epochs=self.request.settings.max_epochs)

    def vanilla_job(self, folder: Path) -> Job:
        """The training of its biased network alone."""
        return self._job(folder, ("--vanilla-only",))

    def _job(self, folder: Path, extra: tuple[str, ...]) -> Job:
        return Job((*self.arguments, "--out", str(folder), "--resume", *extra), folder)


def trial_name(varied: dict[str, Any]) -> str:
    """A folder's name that tells the setting: ``gamma-3_seed-1``."""
    parts = (f"{name}-{re.sub(r'[^A-Za-z0-9.+-]+', '-', short(value))}" for name, value in varied.items())
    return "_".join(parts) or "run"


def sweep(out: Path, trials: Sequence[Trial], engine: Engine, progress: Progress) -> list[Row]:
    """Run all trials that are not finished; one row each, in the order of the grid, which ``sweep.csv`` holds too.

    A trial that fails has its reason in the row; the others go on.

    Raises:
        ValueError: settings that share a folder, or a folder that holds another run than the sweep's or other files.
        FileExistsError: a report of something else is there.
        KeyboardInterrupt: what is finished stays, and the rest goes on from its checkpoints in the next call.
    """
    folders = [trial.request.out for trial in trials]
    if clash := [folder for folder in folders if folders.count(folder) > 1]:
        raise ValueError(f"two settings of the sweep share the folder {clash[0]}")
    _check_own(out)
    status = {trial.request.out: FINISHED if is_finished(trial.request) else "" for trial in trials}
    open_trials = [trial for trial in trials if not status[trial.request.out]]
    with progress:
        status |= _share_vanilla(out, open_trials, engine, progress)
        jobs = [trial.job() for trial in open_trials if not status[trial.request.out]]
        progress.stage(f"sweep of {len(trials)} settings", len(jobs))
        write_sweep(out / TABLE, rows_of(trials, status))
        with closing(engine.run(jobs)) as outcomes:
            for done, (job, failure) in enumerate(outcomes, 1):
                status[job.folder] = failure or FINISHED
                write_sweep(out / TABLE, rows_of(trials, status))
                progress.tick(done, f"{job.folder.name}: {failure or 'finished'}")
    return rows_of(trials, status)


def _check_own(out: Path) -> None:
    """Leave a folder alone whose table or report is not of a sweep."""
    if (out / TABLE).exists():
        read_sweep(out / TABLE)
    else:
        check_free(out, [REPORT])


def _share_vanilla(out: Path, trials: Sequence[Trial], engine: Engine, progress: Progress) -> dict[Path, str]:
    """Give every trial's folder its biased network; why not, by folder, where its training failed."""
    groups: dict[Path, list[Trial]] = {}
    for trial in trials:
        key = blake2b(dumps(vanilla_identity(trial.request), sort_keys=True).encode(), digest_size=6).hexdigest()
        groups.setdefault(out / VANILLA_FOLDER / key, []).append(trial)
    progress.stage(f"{len(groups)} biased networks", len(groups))
    failures: dict[Path, str] = {}
    jobs = [members[0].vanilla_job(folder) for folder, members in groups.items()]
    with closing(engine.run(jobs)) as outcomes:
        for done, (job, failure) in enumerate(outcomes, 1):
            for trial in groups[job.folder]:
                if failure:
                    failures[trial.request.out] = f"its biased network: {failure}"
                else:
                    _copy_vanilla(job.folder, trial.request.out)
            progress.tick(done, failure or "trained")
    return failures


def _copy_vanilla(source: Path, folder: Path) -> None:
    """A trial's biased network, unless the folder has one already; a copy, since a run may replace its own."""
    if (folder / VANILLA_RECORD).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in (VANILLA, VANILLA_RECORD):
        shutil.copyfile(source / name, folder / name)


def rows_of(trials: Sequence[Trial], status: dict[Path, str]) -> list[Row]:
    """What every finished trial measured, from its folder, and the state of the others."""
    return [_row(trial, status[trial.request.out]) for trial in trials]


def _row(trial: Trial, status: str) -> Row:
    row: Row = {"trial": trial.name, **trial.varied, "status": status or NOT_RUN}
    if status != FINISHED:
        return row
    metrics = read_json(trial.request.out / METRICS)
    for network in NETWORKS:
        measured = metrics[network]
        row[f"{network}_task_accuracy"] = measured["task_accuracy"]
        row[f"{network}_worst_group"] = min(measured["groups"]["bias_worst_group"])
        for index, _ in enumerate(measured["bias_accuracy"]):
            row[f"{network}_bias_accuracy_{index + 1}"] = measured["bias_accuracy"][index]
            row[f"{network}_bias_mi_{index + 1}"] = measured["bias_mi"][index]
        row[f"{network}_sparsity"] = measured["sparsity"]
    row |= {"epochs": metrics["epochs"], "seconds": metrics["seconds"]}
    return row | {"warnings": len(metrics.get("warnings", []))}
