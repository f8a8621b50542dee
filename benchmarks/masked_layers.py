"""Masked layers against the dense layers that they stand in for: forward and backward, float32, the ratio per shape.

Both sides compute the output and the gradients that training needs: of the input, except in the first layer, and of the
dense layer's weight or the masked layer's scores, whose weight is frozen. Biases are frozen on both sides. Sides take
turns, so that a disturbance meets both; the ratio of their medians stands beside that of their best times.
"""

from statistics import median
from typing import Any

import torch
from ffw_fast.benchmarks.command import add_json, bench_parser, write_record
from ffw_fast.benchmarks.jobs import JOBS, TINY_JOBS, Layer, chosen_jobs, layers_of
from ffw_fast.benchmarks.machine import describe, take_turns
from ffw_fast.benchmarks.operators import check_same, forward_or_both, layer_tensors
from rich.table import Table

from ffw_fast.modules import MASKED_CLASSES
from ffw_fast.tables import print_table

SECONDS = 1.0  # that both sides of a layer are measured for
FEWEST = 7  # turns


def measure_layer(layer: Layer, batch: int, seconds: float) -> dict[str, Any]:
    """Times of both sides in seconds and their ratios. ``AssertionError`` where the open gate's results differ."""
    dense = layer.dense.requires_grad_(False)
    masked: Any = MASKED_CLASSES[type(dense)].from_dense(dense)
    dense.weight.requires_grad_()
    x, grad = layer_tensors(layer, batch, "both")
    sides = [
        forward_or_both(lambda: dense(x), (dense.weight, x), grad, "both"),
        forward_or_both(lambda: masked(x), (masked.scores, x), grad, "both"),
    ]
    (y, by_weight, *by_input), (masked_y, by_scores, *masked_by_input) = (side() for side in sides)
    # with scores 0 at temperature 1 the gate is 1 and its straight-through slope 1/2
    check_same([masked_y, by_scores, *masked_by_input], [y, by_weight * dense.weight.detach() / 2, *by_input])
    plain, gated = take_turns(sides, seconds, FEWEST)
    return {
        "network": layer.network,
        "layer": layer.shape,
        "dense_seconds": median(plain),
        "masked_seconds": median(gated),
        "ratio": median(gated) / median(plain),
        "best_ratio": min(gated) / min(plain),
        "turns": len(plain),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(title="forward and backward, float32: masked layers against dense ones with a trained weight")
    for column in ("network", "layer"):
        shown.add_column(column)
    for column in ("dense\nmedian, ms", "masked\nmedian, ms", "ratio\nof medians", "ratio\nof best times", "turns"):
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(
            row["network"],
            row["layer"],
            f"{1e3 * row['dense_seconds']:.3f}",
            f"{1e3 * row['masked_seconds']:.3f}",
            f"{row['ratio']:.3f}",
            f"{row['best_ratio']:.3f}",
            str(row["turns"]),
        )
    return shown


def main(arguments: list[str] | None = None) -> None:
    parser = bench_parser("masked_layers", __doc__)
    parser.add_argument("--only", nargs="*", default=[], help="names of workloads, or parts of them (default: all)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each layer (default: %(default)s)")
    add_json(parser)
    parser.add_argument("--tiny", action="store_true", help="a dry run on tiny shapes, whose times say nothing")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    rows = [
        measure_layer(layer, job.batch_size, options.seconds)
        for job in chosen_jobs(options.only, TINY_JOBS if options.tiny else JOBS)
        for layer in layers_of(job)
    ]
    print_table(table(rows))
    write_record(options.json, {"machine": describe(), "rows": rows})


if __name__ == "__main__":
    main()
