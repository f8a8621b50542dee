"""``ffw-fast sweep``: many extractions over a grid of settings."""

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ffw_fast.cli.options import (
    DEFAULT,
    Commands,
    add_setting,
    add_workloads,
    adder,
    asked_for,
    workload_parser,
)
from ffw_fast.cli.pages import tell_report
from ffw_fast.cli.run import parse_run
from ffw_fast.progress import make_progress
from ffw_fast.run_lock import locked
from ffw_fast.runs.reading import RunFolder
from ffw_fast.runs.writing import check_folder
from ffw_fast.sweep.early_stopping import METRICS, SCHEDULERS, RayTune
from ffw_fast.sweep.engines import Engine, LocalProcesses, RayCluster
from ffw_fast.sweep.grid import accept_grids, combinations
from ffw_fast.sweep.table import TABLE, Row, failed_trials, finished_trials, sweep_lines, warning_trials
from ffw_fast.sweep.trials import Trial, sweep, trial_name
from ffw_fast.tables import print_table
from ffw_fast.workloads import WORKLOADS

ENGINE = ("processes", "threads", "retries", "ray", "address", "scheduler", "metric", "grace")  # where a sweep runs
SINGLE = ("out", "data_dir", "cache_dir", "device", "where", *ENGINE)  # take one value in a sweep
NO_SETTING = ("out", "quiet", *ENGINE)  # of a sweep, not of its runs


def add_to(commands: Commands) -> None:
    command = commands.add_parser(
        "sweep",
        help="many extractions over a grid of settings, beside each other, into one table",
        description="Extracts at every combination of settings: of any option that takes one value it takes several.",
        usage="ffw-fast sweep WORKLOAD [options, each with one value or several: --gamma 1,3,10 --seed 0..9]",
        epilog="ffw-fast sweep WORKLOAD --help shows the options of a workload.",
    )
    workloads = add_workloads(command, "ffw-fast sweep")
    for workload in WORKLOADS.values():
        parser = workload_parser(workloads, workload, out=f"runs/sweep-{workload.name}")
        add_setting(parser, workload.default_gamma)
        engine = parser.add_argument_group(
            "sweep",
            "Every option above takes several values (1,3,10 or 0..9), but for folders, patterns, the device and "
            "those without a value. What is finished in the folder is not run again, the rest goes on.",
        )
        for flag, text in (
            ("--processes", "how many run beside each other (default: as many as there are cores)"),
            ("--threads", "of each (default: the cores shared out; on Ray 1)"),
        ):
            engine.add_argument(flag, type=int, metavar="N", help=text)
        add = adder(engine)
        add("--retries", int, 2, "N", "how often one that was killed is taken up again")
        engine.add_argument("--ray", action="store_true", help="run on Ray, a local one unless --address names another")
        engine.add_argument("--address", help="of a Ray cluster whose machines share the folder, such as auto")
        engine.add_argument(
            "--scheduler", choices=SCHEDULERS, help="on Ray: end settings early by this scheduler of Ray Tune"
        )
        engine.add_argument(
            "--metric", choices=METRICS, default="val_task_accuracy", help=f"what the scheduler compares {DEFAULT}"
        )
        add("--grace", int, 10, "N", "epochs that the scheduler gives every setting")
        accept_grids(parser, SINGLE)
        parser.set_defaults(command=_run_sweep, parser=parser)


def _run_sweep(options: argparse.Namespace) -> int:
    out = Path(options.out).absolute()  # other machines work elsewhere
    options.data_dir = options.data_dir and os.path.abspath(options.data_dir)
    trials = [_trial(out, options.workload, *setting) for setting in combinations(options.parser, options, NO_SETTING)]
    check_folder(out)
    with locked(out), _engine(options, len(trials)) as engine:
        rows = sweep(out, trials, engine, make_progress(not options.quiet))
    workload = WORKLOADS[options.workload]
    failed = failed_trials(rows)
    if finished_trials(rows):
        print_table(sweep_lines(rows, workload.bias_names).as_table())
        tell_report(out)
        _warn_of_runs(out, rows)
    print(f"table of all settings: {out / TABLE}")
    for row in failed:
        print(f"ffw-fast: error: {row['trial']}: {row['status']}", file=sys.stderr)
    return 2 if failed else 0


def _warn_of_runs(out: Path, rows: Sequence[Row]) -> None:
    """Of what the first run that warns did; all is in the runs' folders and on their pages."""
    if warning := warning_trials(rows):
        first = warning[0]["trial"]
        text = RunFolder(out / first).metrics["warnings"][0]
        others = f" ({len(warning)} of {len(finished_trials(rows))} runs warn of something)"
        warnings.warn(f"{first}: {text}{others}", stacklevel=1)


def _trial(out: Path, workload: str, varied: dict[str, Any], arguments: list[str]) -> Trial:
    command = ("run", workload, *arguments)
    folder = ("--out", str(out / trial_name(varied)))
    return Trial(varied, asked_for(parse_run([*command, *folder])), command)


@contextmanager
def _engine(options: argparse.Namespace, trials: int) -> Iterator[Engine]:
    """Where the sweep's commands run."""
    for name, least in (("processes", 1), ("threads", 1), ("retries", 0), ("grace", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if options.ray or options.address is not None or options.scheduler is not None:
        if options.processes is not None:
            raise ValueError("on Ray as many run beside each other as its cores allow: leave out --processes")
        gpus = int((options.device or "cpu").startswith("cuda"))
        place = (options.address, options.threads or 1, gpus, options.retries)
        watch = {"scheduler": options.scheduler, "metric": options.metric, "grace": options.grace}
        cluster = RayCluster(*place) if options.scheduler is None else RayTune(*place, **watch)
        try:
            yield cluster
        finally:
            cluster.close()
        return
    cores = _available_cores()
    processes = options.processes or min(trials, max(1, cores // (options.threads or 1)))
    yield LocalProcesses(processes, options.threads or max(1, cores // processes), options.retries)


def _available_cores() -> int:
    """Cores that this process may use; where the system does not tell, all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
