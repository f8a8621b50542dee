"""The command line, ``ffw-fast``. It alone knows the workloads, the loop and the run folder together."""

import argparse
import importlib
import json
import os
import select
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from ffw_fast.backend import backend_info
from ffw_fast.benchmarks import BENCHES
from ffw_fast.compare import all_settings, compare
from ffw_fast.comparison import comparison_lines, cost_columns, outcome_columns
from ffw_fast.distributed import ProcessLost, is_first, started_by_torchrun
from ffw_fast.early_stopping import METRICS, SCHEDULERS, RayTune
from ffw_fast.engines import Engine, LocalProcesses, RayCluster
from ffw_fast.export import FORMATS, export
from ffw_fast.figures import FIGURES, make_figure
from ffw_fast.files import write_json, write_tensors
from ffw_fast.gates import GATES
from ffw_fast.grid import accept_grids, combinations
from ffw_fast.interrupts import Terminated, ending_signals_raise, exit_code
from ffw_fast.modules import GRANULARITIES
from ffw_fast.own import NAME as OWN
from ffw_fast.own import TITLE as OWN_TITLE
from ffw_fast.own import options_in_file, own_workload
from ffw_fast.progress import EpochLines, describe_time, make_progress
from ffw_fast.report import write_report
from ffw_fast.run import VANILLA_CHECKPOINTS, Request, check_folder, load_run, prepare_vanilla, run_workload
from ffw_fast.run_lock import locked
from ffw_fast.run_state import CHECKPOINT
from ffw_fast.schedule import SCHEDULES
from ffw_fast.settings import METHODS, PRECISIONS
from ffw_fast.sizes import SIZES, compare_sizes, sizes_table
from ffw_fast.summary import metrics_table
from ffw_fast.sweep import Trial, sweep, trial_name
from ffw_fast.sweep_table import TABLE, failed_trials, finished_trials, sweep_lines
from ffw_fast.tables import print_table
from ffw_fast.version import __version__
from ffw_fast.workloads import WORKLOADS, Workload

DEFAULT = "(default: %(default)s)"
ERRORS = (ValueError, TypeError, OSError, ImportError, FloatingPointError, MemoryError)
READER_GONE = 128 + 13  # the code of a process that SIGPIPE ends
COMPACT = "compact.safetensors"
EXTRACTION_OPTIONS = (
    "method", "gamma", "alpha", "gate", "granularity", "schedule", "anneal_rate", "max_epochs", "batch_size",
    "precision", "where", "correlations", "aligned", "cache_augmented",
)  # fmt: skip

ENGINE = ("processes", "threads", "retries", "ray", "address", "scheduler", "metric", "grace")  # where a sweep runs
SINGLE = ("out", "data_dir", "device", *ENGINE)  # take one value in a sweep
NO_SETTING = ("out", "quiet", *ENGINE)  # of a sweep, not of its runs

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code: 0, 2 for an error, 130 after Ctrl-C, 143 after SIGTERM.

    141 where whoever read the output has gone, as ``head`` does.
    """
    try:
        given = _with_workload(list(sys.argv[1:] if arguments is None else arguments))
    except (OSError, ValueError) as error:
        print(f"ffw-fast: error: {error}", file=sys.stderr)
        return 2
    options = build_parser().parse_args(given)
    try:
        with ending_signals_raise(), _plain_warnings():
            code = options.command(options)
            sys.stdout.flush()  # where nobody reads any more it fails here, and not at exit
            return code
    except KeyboardInterrupt as interrupt:
        if not is_first():
            return exit_code(interrupt)
        what = "terminated" if isinstance(interrupt, Terminated) else "interrupted"
        print(f"ffw-fast: {what}{_what_is_left(options)}", file=sys.stderr)
        return exit_code(interrupt)
    except ERRORS as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return READER_GONE
        if options.traceback:
            raise
        if is_first() or isinstance(error, ProcessLost):
            print(f"ffw-fast: error: {error}", file=sys.stderr)
        return 2


def _nobody_reads() -> bool:
    """Whether the reader of standard output has gone; what is still to be written then goes nowhere."""
    if not hasattr(select, "poll"):  # Windows
        return False
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, select.POLLOUT)
    if not any(event & (select.POLLERR | select.POLLHUP) for _output, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def _with_workload(arguments: list[str]) -> list[str]:
    """The arguments of ``run FILE.toml`` and of ``run --model ...`` in full, with a workload; others as they are."""
    if "run" not in arguments[:2]:
        return arguments
    start = arguments.index("run") + 1
    before, after = arguments[:start], arguments[start:]
    if after and after[0].endswith(".toml"):
        return before + options_in_file(Path(after[0])) + after[1:]
    if after and after[0].startswith("--") and after[0] != "--help":
        return [*before, OWN, *after]
    return arguments


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Within it warnings to users are single lines, without the place in the code that they come from."""
    before = warnings.showwarning

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        if category is UserWarning:
            print(f"ffw-fast: warning: {message}", file=file or sys.stderr)
        else:
            before(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def _what_is_left(options: argparse.Namespace) -> str:
    """What an interrupted command left in its folder, and how to go on."""
    if "out" not in options or not (out := Path(options.out)).exists():
        return ""
    if options.command is _run and (out / CHECKPOINT).exists() and not (out / VANILLA_CHECKPOINTS.newest).exists():
        return f"; {out} keeps what was reached, continue with --resume"
    if any(not path.name.startswith(".") for path in out.iterdir()):
        return f"; {out} keeps what was finished, the same command goes on from there"
    return ""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="ffw-fast",
        description="Finds the unbiased sub-network inside a biased neural network.",
        epilog="ffw-fast COMMAND --help shows what a command takes.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ffw-fast {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error comes from")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_compare(commands)
    _add_sweep(commands)
    _add_compact(commands)
    _add_export(commands)
    _add_report(commands)
    _add_figure(commands)
    _add_bench(commands)
    _add_info(commands)
    return parser


def _add_run(commands: Commands) -> None:
    run = commands.add_parser(
        "run",
        help="train the biased network of a workload and extract its unbiased sub-network",
        description="Trains the biased network of a workload, extracts its unbiased sub-network and measures both.",
        usage=(
            "ffw-fast run WORKLOAD [options]\n"
            "       ffw-fast run --model MODULE:FUNCTION --data MODULE:FUNCTION [options]\n"
            "       ffw-fast run FILE.toml [options]"
        ),
        epilog="ffw-fast run WORKLOAD --help shows the options of a workload. A file has them as lines: gamma = 3",
    )
    workloads = _add_workloads(run, "ffw-fast run")
    for workload in WORKLOADS.values():
        parser = _workload_parser(workloads, workload, out=f"runs/{workload.name}")
        _add_setting(parser, workload.default_gamma)
        _add_run_options(parser)
    parser = _own_parser(workloads)
    _add_setting(parser, 10.0)
    _add_run_options(parser)


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    choose = parser.add_argument
    choose("--correlations", type=float, nargs="+", metavar="RHO", help="BISE: of each bias and the target")
    choose("--aligned", type=int, nargs="+", metavar="B", help="BISE: the bias label that goes with each target")
    choose("--without-val", action="store_true", help="BISE: no unbiased validation set; the last scores are the best")
    choose("--guess-bias", action="store_true", help="BISE: bias labels are what a network answers after one epoch")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the run folder's checkpoint, where there is one"
    )
    choose("--shard", action="store_true", help="on several processes: each keeps the state of its share of the gates")
    parser.add_argument("--vanilla-only", action="store_true", help="train the biased network and stop there")
    choose("--log-epochs", metavar="FILE", help="append the row of every epoch of the extraction to it, as JSON lines")
    parser.set_defaults(command=_run)


def _own_parser(workloads: Commands) -> argparse.ArgumentParser:
    """The parser of a user's own model and data."""
    parser = workloads.add_parser(OWN, help=OWN_TITLE, description=f"Debiases {OWN_TITLE}.", allow_abbrev=False)
    named = "MODULE:FUNCTION"
    choose = parser.add_argument
    choose("--model", metavar=named, required=True, help="gives the trained network, an nn.Module")
    choose("--data", metavar=named, required=True, help="gives (train, val) or (train, val, test), as for extract()")
    choose("--bottleneck", metavar="NAME", required=True, help="module whose output must not tell the bias")
    choose("--num-bias-classes", type=int, metavar="K", required=True, help="classes of each bias")
    choose("--weights", metavar="FILE", help="a state dict for the network, .safetensors or .pt (tensors alone)")
    choose("--bias-names", metavar="NAME", nargs="+", default=[], help="of the biases, for tables")
    choose(
        "--cache-augmented",
        action="store_true",
        help="with data that augment at random: each fit of the heads learns from one draw, read once",
    )
    _add_common_options(parser, out="runs/own", batch_size=100)
    return parser


def _add_setting(parser: argparse.ArgumentParser, gamma: float) -> None:
    """What one extraction differs in from another of the same workload."""
    add = _adder(parser)
    add("--seed", int, 0, "N", "seed of data, networks, heads and orders")
    choose = parser.add_argument
    choose("--method", choices=METHODS, default="ffw", help=f"from the unbiased or from the biased set {DEFAULT}")
    choose(
        "--gamma",
        type=float,
        metavar="W",
        help=f"weight of the mutual information in the objective (default: {gamma:g}, BISE 1)",
    )
    choose("--schedule", choices=SCHEDULES, help="how the temperature falls (default: published, BISE halving)")


def _add_compare(commands: Commands) -> None:
    compare = commands.add_parser(
        "compare",
        help="FFW and BISE beside baselines over seeds: task accuracy, leakage, sparsity, time",
        description="Compares the vanilla network, magnitude pruning, DFR, training on the unbiased set, FFW and BISE.",
        usage="ffw-fast compare WORKLOAD [options]",
        epilog="ffw-fast compare WORKLOAD --help shows the options of a workload.",
    )
    workloads = _add_workloads(compare, "ffw-fast compare")
    for workload in WORKLOADS.values():
        parser = _workload_parser(workloads, workload, out=f"runs/compare-{workload.name}")
        for flag, kind, values, known, text in (
            ("--seeds", int, [1, 2, 3], None, "each one row of every method"),
            ("--gammas", float, [1, 10], None, "weights of the mutual information in FFW"),
            ("--schedules", str, ["published", "adaptive"], SCHEDULES, "how the temperature falls in FFW"),
            ("--granularities", str, None, GRANULARITIES, "several instead of --granularity"),
            ("--methods", str, ["ffw", "bise"], METHODS, "beside the baselines"),
        ):
            shown = f" (default: {' '.join(map(str, values))})" if values else ""
            parser.add_argument(
                flag,
                type=kind,
                nargs="+",
                choices=known,
                metavar=None if known else "N",
                default=values,
                help=text + shown,
            )
        parser.set_defaults(command=_compare)


def _add_sweep(commands: Commands) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="many extractions over a grid of settings, beside each other, into one table",
        description="Extracts at every combination of settings: of any option that takes one value it takes several.",
        usage="ffw-fast sweep WORKLOAD [options, each with one value or several: --gamma 1,3,10 --seed 0..9]",
        epilog="ffw-fast sweep WORKLOAD --help shows the options of a workload.",
    )
    workloads = _add_workloads(sweep, "ffw-fast sweep")
    for workload in WORKLOADS.values():
        parser = _workload_parser(workloads, workload, out=f"runs/sweep-{workload.name}")
        _add_setting(parser, workload.default_gamma)
        engine = parser.add_argument_group(
            "sweep",
            "Every option above takes several values (1,3,10 or 0..9), but for the folders, the device and those "
            "without a value. What is finished in the folder is not run again, the rest goes on from its checkpoints.",
        )
        for flag, text in (
            ("--processes", "how many run beside each other (default: as many as there are cores)"),
            ("--threads", "of each (default: the cores shared out; on Ray 1)"),
        ):
            engine.add_argument(flag, type=int, metavar="N", help=text)
        add = _adder(engine)
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
        parser.set_defaults(command=_sweep, parser=parser)


def _add_workloads(command: argparse.ArgumentParser, prog: str) -> Commands:
    return command.add_subparsers(title="workloads", required=True, metavar="WORKLOAD", dest="workload", prog=prog)


def _workload_parser(workloads: Commands, workload: Workload, out: str) -> argparse.ArgumentParser:
    """The parser of a workload, with the arguments that every command on workloads has."""
    parser = workloads.add_parser(workload.name, help=workload.title, description=workload.title, allow_abbrev=False)
    choose = parser.add_argument
    choose(
        "--data-dir",
        metavar="DIR",
        required=workload.shipped_recipe is None,
        help="folder of the data set" + ("" if workload.shipped_recipe is None else " (default: the shipped digits)"),
    )
    choose(
        "--vanilla-epochs",
        type=int,
        metavar="N",
        help="epochs of the biased network's training (default: the workload's)",
    )
    _add_common_options(parser, out, workload.batch_size)
    own = parser.add_argument_group("data", "Where one is left out, the data set decides.")
    for option in workload.options:
        if option.type is bool:
            own.add_argument(option.flag, action=argparse.BooleanOptionalAction, help=option.help)
        else:
            metavar = {int: "N", float: "X", str: "DIR"}[option.type]
            own.add_argument(option.flag, type=option.type, metavar=metavar, help=option.help)
    return parser


def _add_common_options(parser: argparse.ArgumentParser, out: str, batch_size: int) -> None:
    add, choose = _adder(parser), parser.add_argument
    add("--out", str, out, "DIR", "the folder of results")
    add("--max-epochs", int, 200, "N", "epochs of the extraction at most")
    add("--alpha", float, 1.0, "W", "weight of the cross-entropy in the objective")
    choose("--gate", choices=GATES, help="kind of gate (default: ffw, BISE hard)")
    choose("--granularity", choices=GRANULARITIES, help="what a gate belongs to (default: weight, BISE channel)")
    choose("--where", metavar="PATTERNS", help="with channel gates: of which layers, such as 'layer1.*, layer2.*'")
    add("--anneal-rate", float, 1e-4, "RATE", "how far the adaptive schedule moves the mean gate in a step at most")
    add("--batch-size", int, batch_size, "N", "samples a step, of gates and heads, and of the validation MI")
    choose("--precision", choices=PRECISIONS, default="fp32", help=f"of the network's passes {DEFAULT}")
    choose("--device", help="where to run, such as cpu or cuda:0 (default: cpu)")
    choose("--quiet", action="store_true", help="show no progress")


def _adder(parser: argparse._ActionsContainer) -> Callable[[str, Callable[[str], object], object, str, str], object]:
    """Adds an argument whose help ends with its default."""

    def add(flag: str, kind: Callable[[str], object], default: object, metavar: str, text: str) -> object:
        return parser.add_argument(flag, type=kind, default=default, metavar=metavar, help=f"{text} {DEFAULT}")

    return add


def _request(options: argparse.Namespace) -> Request:
    given = vars(options)
    workload = _own(options) if options.workload == OWN else WORKLOADS[options.workload]
    return Request(
        workload=workload,
        out=Path(options.out),
        seed=given.get("seed", 0),
        data_dir=given.get("data_dir"),
        data_options={
            option.name: given[option.name] for option in workload.options if given.get(option.name) is not None
        },
        extraction={name: given[name] for name in EXTRACTION_OPTIONS if name in given},
        vanilla_epochs=given.get("vanilla_epochs"),
        device=options.device,
        resume=given.get("resume", False),
        shard=given.get("shard", False),
        guess_bias=given.get("guess_bias", False),
        without_val=given.get("without_val", False),
    )


def _own(options: argparse.Namespace) -> Workload:
    return own_workload(
        options.model,
        options.data,
        bottleneck=options.bottleneck,
        num_bias_classes=options.num_bias_classes,
        weights=options.weights,
        bias_names=tuple(options.bias_names),
    )


def _run(options: argparse.Namespace) -> int:
    request = _request(options)
    workload = request.workload
    if options.vanilla_only:
        if is_first():
            prepare_vanilla(request, make_progress(not options.quiet))
        return 0
    with started_by_torchrun(request.device) as device:
        progress = make_progress(is_first() and not options.quiet)
        if options.log_epochs and is_first():
            progress = EpochLines(progress, options.log_epochs)
        metrics = run_workload(replace(request, device=device), progress)
    if not is_first():
        return 0
    print_table(metrics_table(metrics, tuple(metrics["bias_names"]), workload.num_bias_classes))
    stages = ", ".join(f"{stage} {describe_time(seconds)}" for stage, seconds in metrics["stages"].items())
    print(f"{metrics['epochs']} epochs; {stages}")
    _write_report(options.out)
    print(f"run folder: {options.out}")
    return 0


def _sweep(options: argparse.Namespace) -> int:
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
        _write_report(out)
    print(f"table of all settings: {out / TABLE}")
    for row in failed:
        print(f"ffw-fast: error: {row['trial']}: {row['status']}", file=sys.stderr)
    return 2 if failed else 0


def _trial(out: Path, workload: str, varied: dict[str, Any], arguments: list[str]) -> Trial:
    command = ("run", workload, *arguments)
    folder = ("--out", str(out / trial_name(varied)))
    return Trial(varied, _request(build_parser().parse_args([*command, *folder])), command)


@contextmanager
def _engine(options: argparse.Namespace, trials: int) -> Iterator[Engine]:
    """Where the sweep's commands run."""
    for name, least in (("processes", 1), ("threads", 1), ("retries", 0), ("grace", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if options.ray or options.address is not None or options.scheduler is not None:
        gpus = int((options.device or "cpu").startswith("cuda"))
        place = (options.address, options.threads or 1, gpus, options.retries)
        watch = {"scheduler": options.scheduler, "metric": options.metric, "grace": options.grace}
        cluster = RayCluster(*place) if options.scheduler is None else RayTune(*place, **watch)
        try:
            yield cluster
        finally:
            cluster.close()
        return
    cores = len(os.sched_getaffinity(0))
    processes = options.processes or min(trials, max(1, cores // (options.threads or 1)))
    yield LocalProcesses(processes, options.threads or max(1, cores // processes), options.retries)


def _write_report(out: str | Path) -> None:
    """Write the report of what has just ended, or say what it needs."""
    try:
        print(f"report: {write_report(out)}")
    except ImportError as error:
        print(f"no report yet: {error}; then: ffw-fast report {out}")


def _compare(options: argparse.Namespace) -> int:
    request = _request(options)
    granularities = options.granularities or [options.granularity or "weight"]
    settings = all_settings(options.methods, options.schedules, options.gammas, granularities)
    with make_progress(not options.quiet) as progress:
        rows = compare(request, options.seeds, settings, progress)
    title = f"unbiased test set, mean and standard deviation over {max(map(len, rows.values()))} seeds"
    columns = [*outcome_columns(request.workload.bias_names), *cost_columns()]
    print_table(comparison_lines(title, rows, columns).as_table())
    _write_report(options.out)
    return 0


def _add_compact(commands: Commands) -> None:
    compact = commands.add_parser(
        "compact",
        help="cut the channels out of a run's network that its zeros made useless",
        description="Writes the smaller network's weights, which ffw_fast.load_compacted reads, and sizes.json: "
        "parameters, MACs, latency and bytes before and after. Needs the extra compact.",
    )
    _add_folder(compact)
    compact.add_argument("--out", dest="file", metavar="FILE", help=f"where to (default: DIR/{COMPACT})")
    compact.set_defaults(command=_compact)


def _compact(options: argparse.Namespace) -> int:
    folder = Path(options.folder)
    found = load_run(folder, options.model)
    pruned, small = found.model(options.best), found.model(options.best, compact=True)
    file = Path(options.file or folder / COMPACT)
    write_tensors(file, {name: value.clone() for name, value in small.state_dict().items()})
    sizes = compare_sizes({"with zeros": pruned, "compact": small}, found.example(found.settings.batch_size))
    write_json(folder / SIZES, sizes)
    print_table(sizes_table(sizes))
    print(f"compact network: {file}")
    return 0


def _add_export(commands: Commands) -> None:
    export_parser = commands.add_parser(
        "export",
        help="write a run's network as a program that runs without this package",
        description="Writes the pruned network for batches of any size, and compares what the file computes.",
    )
    _add_folder(export_parser)
    choose = export_parser.add_argument
    choose("--format", choices=FORMATS, required=True, help="onnx (needs the extra onnx) or pt2, of torch.export")
    choose("--compact", action="store_true", help="the compact network; needs the extra compact")
    choose("--out", dest="file", metavar="FILE", help="where to (default: DIR/model.onnx or DIR/model.pt2)")
    export_parser.set_defaults(command=_export)


def _export(options: argparse.Namespace) -> int:
    found = load_run(options.folder, options.model)
    file = Path(options.file or Path(options.folder) / f"model.{options.format}")
    difference = export(found.model(options.best, compact=options.compact), found.example(), file, options.format)
    print(f"{file}: outputs differ by at most {difference:.2g}")
    return 0


def _add_folder(parser: argparse.ArgumentParser) -> None:
    """The arguments of commands that read a run's network."""
    parser.add_argument("folder", metavar="DIR", help="the run folder")
    parser.add_argument(
        "--model",
        metavar="MODULE:FUNCTION",
        help=f"of a run of {OWN}: gives the network, as for the run; the name in the folder is not called",
    )
    parser.add_argument(
        "--best", action="store_true", help="the network with the best scores (default: that with the final ones)"
    )


def _add_report(commands: Commands) -> None:
    report = commands.add_parser(
        "report",
        help="write a page about a run, comparison or sweep: one HTML file that needs no network",
        description="Writes report.html into a folder of results. Needs the extra report.",
    )
    report.add_argument("folder", metavar="DIR", help="of ffw-fast run, compare or sweep, or of Extraction.save")
    report.set_defaults(command=_report)


def _report(options: argparse.Namespace) -> int:
    print(write_report(options.folder))
    return 0


def _add_figure(commands: Commands) -> None:
    lines = [f"  {name:16} {figure.shows}; from {figure.reads}" for name, figure in FIGURES.items()]
    figure = commands.add_parser(
        "figure",
        help="draw a figure of runs or comparisons, with the numbers behind it",
        description="Writes NAME.png, NAME.svg and NAME.csv, the numbers behind them. Needs the extra figures.",
        epilog="\n".join(["figures:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    figure.add_argument("name", metavar="NAME", choices=FIGURES, help="which one, see below")
    figure.add_argument("paths", metavar="DIR", nargs="+", help="run folders, folders of runs, or of comparisons")
    _adder(figure)("--out", str, "figures", "DIR", "the folder to write to")
    figure.set_defaults(command=_figure)


def _figure(options: argparse.Namespace) -> int:
    for path in make_figure(options.name, options.paths, options.out):
        print(path)
    return 0


def _add_bench(commands: Commands) -> None:
    width = max(map(len, BENCHES))
    bench = commands.add_parser(
        "bench",
        help="measure this package against its reference and the machine",
        description="Measures this package against its reference and the machine.\n\nbenchmarks:\n"
        + "\n".join(f"  {name:{width}}  {text}" for name, text in BENCHES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_argument("benchmark", choices=BENCHES, metavar="NAME", help="which one; it takes --help, too")
    bench.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="the benchmark's own options")
    bench.set_defaults(command=_bench)


def _bench(options: argparse.Namespace) -> int:
    importlib.import_module(f"ffw_fast.benchmarks.{options.benchmark}").main(options.rest)
    return 0


def _add_info(commands: Commands) -> None:
    text = "which kernels are compiled, loaded and used, and why not where not"
    info = commands.add_parser("info", help=text, description=f"Tells {text}.")
    info.add_argument("--json", action="store_true", help="print it as JSON")
    info.set_defaults(command=_info)


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
            for title, shown in _shown(key, entry):
                print(f"  {title}: {shown if shown not in (None, '') else '-'}")
    return 0


def _shown(key: str, entry: object) -> list[tuple[str, object]]:
    """What is printed of one entry: operators line by line, by what serves them."""
    if isinstance(entry, dict):
        servers = dict.fromkeys(entry.values())
        return [(f"{key} by {server}", ", ".join(k for k, v in entry.items() if v == server)) for server in servers]
    return [(key, ", ".join(map(str, entry)) if isinstance(entry, list) else entry)]


if __name__ == "__main__":
    sys.exit(main())
