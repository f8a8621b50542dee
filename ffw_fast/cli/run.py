"""``ffw-fast run``: one workload, or a user's own model and data."""

import argparse
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from ffw_fast.cli.options import (
    Commands,
    add_common_options,
    add_setting,
    add_workloads,
    asked_for,
    workload_parser,
)
from ffw_fast.cli.pages import tell_report
from ffw_fast.cli.summary import metrics_table
from ffw_fast.own import NAME as OWN
from ffw_fast.own import TITLE as OWN_TITLE
from ffw_fast.own import options_in_file
from ffw_fast.progress import EpochLines, describe_time, make_progress
from ffw_fast.runs.biased_network import prepare_vanilla
from ffw_fast.runs.run import run_workload
from ffw_fast.tables import print_table
from ffw_fast.torchrun import is_first, started_by_torchrun
from ffw_fast.workloads import WORKLOADS


def add_to(commands: Commands) -> Commands:
    """Adds the command; its workloads."""
    command = commands.add_parser(
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
    workloads = add_workloads(command, "ffw-fast run")
    for workload in WORKLOADS.values():
        parser = workload_parser(workloads, workload, out=f"runs/{workload.name}")
        add_setting(parser, workload.default_gamma)
        _add_options(parser)
        guess = "BISE: bias labels are what a network answers after one epoch of training"
        parser.add_argument("--guess-bias", action="store_true", help=guess)
    parser = _own_parser(workloads)
    add_setting(parser, 10.0)
    _add_options(parser)
    return workloads


def _add_options(parser: argparse.ArgumentParser) -> None:
    choose = parser.add_argument
    choose("--correlations", type=float, nargs="+", metavar="RHO", help="BISE: of each bias and the target")
    choose("--aligned", type=int, nargs="+", metavar="B", help="BISE: the bias label that goes with each target")
    choose("--without-val", action="store_true", help="BISE: no unbiased validation set; the last scores are the best")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the run folder's checkpoint, where there is one"
    )
    choose("--shard", action="store_true", help="on several processes: each keeps the state of its share of the gates")
    parser.add_argument("--vanilla-only", action="store_true", help="train the biased network and stop there")
    choose(
        "--log-epochs",
        metavar="FILE",
        help="append the row of every epoch of the extraction to it, as JSON lines (default: nowhere)",
    )
    parser.set_defaults(command=run)


def parse_run(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of ``ffw-fast`` with these arguments, which are of ``run``."""
    parser = argparse.ArgumentParser(prog="ffw-fast", allow_abbrev=False)
    add_to(parser.add_subparsers(required=True))
    return parser.parse_args(arguments)


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
    add_common_options(parser, out="runs/own", batch_size=100)
    return parser


def with_workload(arguments: list[str]) -> list[str]:
    """The arguments of ``run FILE.toml`` and of ``run --model ...`` in full, with a workload; others as they are."""
    start = next((place for place, word in enumerate(arguments, 1) if not word.startswith("-")), 0)
    if arguments[start - 1 : start] != ["run"]:
        return arguments
    before, after = arguments[:start], arguments[start:]
    if after and after[0].endswith(".toml"):
        return before + options_in_file(Path(after[0]), _flags_of) + after[1:]
    if after and after[0].startswith("--") and after[0] != "--help":
        return [*before, OWN, *after]
    return arguments


def _flags_of(workload: str) -> Collection[str]:
    """The options of ``run`` for a workload; none of an unknown one."""
    parser = argparse.ArgumentParser()
    workloads = add_to(parser.add_subparsers())
    return workloads.choices[workload]._option_string_actions.keys() if workload in workloads.choices else ()


def run(options: argparse.Namespace) -> int:
    request = asked_for(options)
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
    tell_report(options.out)
    print(f"run folder: {options.out}")
    return 0
