"""``ffw-fast compare``: FFW and BISE beside baselines."""

import argparse

from ffw_fast.cli.options import Commands, add_workloads, asked_for, workload_parser
from ffw_fast.cli.pages import tell_report
from ffw_fast.comparison.compare import all_settings, compare
from ffw_fast.comparison.record import comparison_lines, cost_columns, outcome_columns
from ffw_fast.gates import GRANULARITIES
from ffw_fast.progress import make_progress
from ffw_fast.schedule import SCHEDULES
from ffw_fast.settings import METHODS
from ffw_fast.tables import print_table
from ffw_fast.workloads import WORKLOADS


def add_to(commands: Commands) -> None:
    command = commands.add_parser(
        "compare",
        help="FFW and BISE beside baselines over seeds: task accuracy, leakage, sparsity, time",
        description="Compares the vanilla network, magnitude pruning, DFR, training on the unbiased set, FFW and BISE.",
        usage="ffw-fast compare WORKLOAD [options]",
        epilog="ffw-fast compare WORKLOAD --help shows the options of a workload.",
    )
    workloads = add_workloads(command, "ffw-fast compare")
    for workload in WORKLOADS.values():
        parser = workload_parser(workloads, workload, out=f"runs/compare-{workload.name}")
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
        parser.set_defaults(command=_run_comparison)


def _run_comparison(options: argparse.Namespace) -> int:
    request = asked_for(options)
    granularities = options.granularities or [options.granularity or "weight"]
    settings = all_settings(options.methods, options.schedules, options.gammas, granularities)
    with make_progress(not options.quiet) as progress:
        rows = compare(request, options.seeds, settings, progress)
    title = f"unbiased test set, mean and standard deviation over {max(map(len, rows.values()))} seeds"
    columns = [*outcome_columns(request.workload.bias_names), *cost_columns()]
    print_table(comparison_lines(title, rows, columns).as_table())
    tell_report(options.out)
    return 0
