"""BISE's full schedule on Multi-Color MNIST's network against its plain reference, one after the other in one run.

The schedule is the published one: 100 epochs of the scores, and 11 fits of the heads of 50 epochs each, which the
reference runs as that many passes through the network. Random images stand in for the digits, with two biases at the
published correlations: the work is the same. The result counts only where both go the same way, in the loss of the
median epoch: in the last ones, where T is small, a rounding error may flip a gate, after which scores part.
"""

import time
from typing import Any

import torch
from ffw_fast.benchmarks.command import add_json, bench_parser, write_record
from ffw_fast.benchmarks.machine import measure_rates, record
from rich.console import Console

from ffw_fast import bise, reference
from ffw_fast.data.multi_color_mnist import RHOS
from ffw_fast.data.samples import Samples
from ffw_fast.extract import extract
from ffw_fast.extraction import Extraction
from ffw_fast.models import MLP

CLASSES = 10
LIKENESS = 1e-4  # of the median epoch's loss, relative


def biased_samples(count: int) -> Samples:
    """Random images (count, 3, 28, 28) whose mean and halves tell the target and the two biases."""
    source = torch.Generator().manual_seed(0)
    y = torch.randint(CLASSES, (count,), generator=source)
    columns = []
    for rho in RHOS:
        conflicting = torch.rand(count, generator=source) >= rho
        columns.append((y + conflicting * torch.randint(1, CLASSES, (count,), generator=source)) % CLASSES)
    b = torch.stack(columns, dim=1)
    patterns = torch.rand(3, CLASSES, 3, 28, 28, generator=source)
    x = torch.rand(count, 3, 28, 28, generator=source) + patterns[0, y] + patterns[1, b[:, 0]] + patterns[2, b[:, 1]]
    return Samples(x / 4, y, b)


def compare(samples: int, val: int, max_epochs: int) -> dict[str, Any]:
    """Seconds of both sides, and how far their scores are apart."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MLP().eval()
    train, unbiased = biased_samples(samples), biased_samples(val)
    arguments: dict[str, Any] = {
        "bottleneck": "relu3",
        "num_bias_classes": CLASSES,
        "method": "bise",
        "correlations": RHOS,
        "max_epochs": max_epochs,
        "progress": False,
    }
    found: dict[str, Extraction] = {}
    seconds: dict[str, float] = {}
    extract(model, biased_samples(200), unbiased, **{**arguments, "max_epochs": 1})  # warm
    for name, function in (("fast", extract), ("reference", reference.extract)):
        started = time.perf_counter()
        found[name] = function(model, train, unbiased, **arguments)
        seconds[name] = time.perf_counter() - started
    ours, theirs = (torch.cat(list(each.scores.values())) for each in found.values())
    losses = torch.tensor([[row["loss"] for row in each.history] for each in found.values()])
    return {
        "samples": samples,
        "epochs": len(found["fast"].history),
        "head_epochs": bise.HEAD_EPOCHS * (1 + sum("head_epochs" in row for row in found["fast"].history)),
        "seconds": seconds,
        "ratio": seconds["reference"] / seconds["fast"],
        "loss_difference": ((losses[0] - losses[1]).abs() / losses[1].abs()).median().item(),
        "score_difference": ((ours - theirs).norm() / theirs.norm()).item(),
        "same_masks": ((ours >= 0) == (theirs >= 0)).double().mean().item(),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = bench_parser("bise", __doc__)
    parser.add_argument("--samples", type=int, default=32000, help="of the biased training set (default: 32000)")
    parser.add_argument("--val", type=int, default=2000, help="of the validation set (default: 2000)")
    parser.add_argument("--max-epochs", type=int, default=200, help="ends earlier than the schedule where below 100")
    add_json(parser)
    options = parser.parse_args(arguments)
    row = compare(options.samples, options.val, options.max_epochs)
    console = Console()
    console.print(f"{row['epochs']} epochs of the scores, {row['head_epochs']} of the heads, {row['samples']} samples")
    console.print(f"fast {row['seconds']['fast']:.1f} s, reference {row['seconds']['reference']:.1f} s")
    console.print(f"the median epoch's loss differs by {row['loss_difference']:.1e}")
    console.print(f"scores differ by {row['score_difference']:.1e}, masks are equal to {100 * row['same_masks']:.1f}%")
    if not row["loss_difference"] < LIKENESS:
        raise SystemExit("the two did not go the same way: their times are not compared")
    console.print(f"{row['ratio']:.1f} times faster")
    if options.json:
        write_record(options.json, {"machine": record(measure_rates()), **row})


if __name__ == "__main__":
    main()
