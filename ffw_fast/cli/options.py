"""Options that several commands on workloads have, and what they ask for."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from ffw_fast.gates import GATES, GRANULARITIES
from ffw_fast.own import NAME as OWN
from ffw_fast.own import own_workload
from ffw_fast.precision import PRECISIONS
from ffw_fast.runs.request import Request
from ffw_fast.schedule import SCHEDULES
from ffw_fast.settings import DEFAULTS, METHODS
from ffw_fast.workloads import WORKLOADS, Workload

DEFAULT = "(default: %(default)s)"
EXTRACTION_OPTIONS = DEFAULTS.keys() - {"seed"}  # which is of the data and networks, too

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_workloads(command: argparse.ArgumentParser, prog: str) -> Commands:
    return command.add_subparsers(title="workloads", required=True, metavar="WORKLOAD", dest="workload", prog=prog)


def workload_parser(workloads: Commands, workload: Workload, out: str) -> argparse.ArgumentParser:
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
        help=f"epochs of the biased network's training (default: {_epochs(workload)})",
    )
    add_common_options(parser, out, workload.batch_size)
    own = parser.add_argument_group("data", "Where one is left out, the data set decides.")
    for option in workload.options:
        if option.type is bool:
            own.add_argument(option.flag, action=argparse.BooleanOptionalAction, help=option.help)
        else:
            metavar = {int: "N", float: "X", str: "DIR"}[option.type]
            own.add_argument(option.flag, type=option.type, metavar=metavar, help=option.help)
    return parser


def _epochs(workload: Workload) -> str:
    recipes = {"on the shipped digits": workload.shipped_recipe, "on the full data": workload.full_recipe}
    return ", ".join(f"{recipe.epochs} {data}" for data, recipe in recipes.items() if recipe is not None)


def add_setting(parser: argparse.ArgumentParser, gamma: float) -> None:
    """What one extraction differs in from another of the same workload."""
    add = adder(parser)
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


def add_common_options(parser: argparse.ArgumentParser, out: str, batch_size: int) -> None:
    add, choose = adder(parser), parser.add_argument
    add("--out", str, out, "DIR", "the folder of results")
    add("--max-epochs", int, DEFAULTS["max_epochs"], "N", "epochs of the extraction at most")
    add("--alpha", float, DEFAULTS["alpha"], "W", "weight of the cross-entropy in the objective")
    choose("--gate", choices=GATES, help="kind of gate (default: ffw, BISE hard)")
    choose("--granularity", choices=GRANULARITIES, help="what a gate belongs to (default: weight, BISE channel)")
    choose(
        "--where",
        metavar="PATTERNS",
        help="with channel gates: of which layers, such as 'layer1.*, layer2.*' (default: all)",
    )
    add(
        "--anneal-rate",
        float,
        DEFAULTS["anneal_rate"],
        "RATE",
        "most that the adaptive schedule moves the mean gate a step",
    )
    add("--batch-size", int, batch_size, "N", "samples a step, of gates and heads, and of the validation MI")
    choose("--precision", choices=PRECISIONS, default="fp32", help=f"of the network's passes {DEFAULT}")
    choose("--device", help="where to run, such as cpu or cuda:0 (default: cpu)")
    choose("--quiet", action="store_true", help="show no progress")


def adder(parser: argparse._ActionsContainer) -> Callable[[str, Callable[[str], object], object, str, str], object]:
    """Adds an argument whose help ends with its default."""

    def add(flag: str, kind: Callable[[str], object], default: object, metavar: str, text: str) -> object:
        return parser.add_argument(flag, type=kind, default=default, metavar=metavar, help=f"{text} {DEFAULT}")

    return add


def asked_for(options: argparse.Namespace) -> Request:
    """What the options of a command on a workload ask for."""
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
