"""What annealing by the gates' movement costs: the step of the gates with it and without it, for every kind of gate.

Both sides are one ``GatedAdam`` on the weights of a network of Table 8, and take turns: with buffers of their own, the
places of these in memory alone would make a difference. The reduction that the adaptive schedule asks for is part of
the fused pass; what else it adds is a few scalars.
"""

from functools import partial
from statistics import median
from typing import Any

import torch
from ffw_fast.benchmarks.command import add_job, add_json, bench_parser, write_record
from ffw_fast.benchmarks.jobs import Job, one_job
from ffw_fast.benchmarks.machine import describe, take_turns
from rich.table import Table

from ffw_fast.flat_gates import FlatGates
from ffw_fast.gates import GateKind
from ffw_fast.masking import maskable_layers
from ffw_fast.optim import GatedAdam
from ffw_fast.tables import print_table

KINDS = [kind for kind in GateKind if kind is not GateKind.HARD]  # whose forward has no T
ANNEAL_RATE = 1e-12  # so slow that all turns are at the same T
SECONDS = 3.0  # that both sides of a kind are measured for
FEWEST = 7  # turns


def make_optimizer(job: Job, kind: GateKind) -> GatedAdam:
    """On gates of all kinds of openness, with a gradient."""
    torch.manual_seed(0)
    weights = {name: layer.weight.detach() for name, layer in maskable_layers(job.network()).items()}
    gates = FlatGates(weights, kind, seed=0)
    for scores in gates.views(gates.scores).values():
        scores.normal_()
    gates.grad.normal_()
    gates.refresh()
    return GatedAdam(gates, anneal_rate=ANNEAL_RATE)


def step(optimizer: GatedAdam, anneal_rate: float | None) -> None:
    optimizer.param_groups[0]["anneal_rate"] = anneal_rate
    optimizer.step()


def measure(job: Job, kind: GateKind, seconds: float) -> dict[str, Any]:
    """Times of both sides in seconds, and their ratio."""
    optimizer = make_optimizer(job, kind)
    sides = [partial(step, optimizer, rate) for rate in (None, ANNEAL_RATE)]
    for side in sides:
        side()
    plain, annealing = take_turns(sides, seconds, FEWEST)
    return {
        "kind": kind.name.lower(),
        "without_seconds": median(plain),
        "with_seconds": median(annealing),
        "ratio": median(annealing) / median(plain),
        "best_ratio": min(annealing) / min(plain),
        "turns": len(plain),
    }


def table(job: Job, rows: list[dict[str, Any]]) -> Table:
    shown = Table(title=f"a step of the gates of {job.name}, with and without annealing", title_justify="left")
    shown.add_column("gate")
    for column in ("without\nmedian, ms", "with\nmedian, ms", "ratio\nof medians", "ratio\nof best times", "turns"):
        shown.add_column(column, justify="right")
    for row in rows:
        times = (f"{1e3 * row[f'{side}_seconds']:.3f}" for side in ("without", "with"))
        shown.add_row(row["kind"], *times, f"{row['ratio']:.3f}", f"{row['best_ratio']:.3f}", str(row["turns"]))
    return shown


def main(arguments: list[str] | None = None) -> None:
    parser = bench_parser("annealing", __doc__)
    add_job(parser)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each kind of gate (default: %(default)s)")
    add_json(parser)
    options = parser.parse_args(arguments)
    job = one_job(options.job, options.tiny)
    rows = [measure(job, kind, options.seconds) for kind in KINDS]
    print_table(table(job, rows))
    write_record(options.json, {"machine": describe(), "job": job.name, "rows": rows})


if __name__ == "__main__":
    main()
