"""What a fall of the temperature does to the gates: the published tenfold cut beside the adaptive schedule.

Two extractions of Multi-Color MNIST on the shipped digits from one biased network, followed from the outside. After
every epoch: T, how far gates are from binary (mean of ``min(g, 1 - g)``), and validation accuracy of the gated network
and of those pruned at ``m >= 0`` and at ``g >= 1/2``. Around the published schedule's first cut the histogram of all
gates, before and after.
"""

import itertools
from typing import Any

import torch
from ffw_fast.benchmarks.command import add_json, bench_parser, write_record
from ffw_fast.benchmarks.whole import WORKLOAD, biased_network
from rich.table import Table
from torch import Tensor, nn

from ffw_fast.data import Splits
from ffw_fast.gates import gate
from ffw_fast.inputs import prepare
from ffw_fast.loop import Loop
from ffw_fast.measure import accuracy
from ffw_fast.schedule import judging_shift
from ffw_fast.settings import Settings
from ffw_fast.tables import print_table

BINS = 20
SCHEDULES = ("published", "adaptive")  # the ones compared


def follow(model: nn.Module, splits: Splits, settings: Settings) -> dict[str, Any]:
    """One extraction, epoch by epoch."""
    loop = Loop(prepare(model, splits.train, splits.val, settings))
    loop.start()
    epochs: list[dict[str, float]] = []
    histograms: dict[str, list[int]] = {}
    while len(epochs) < settings.max_epochs and not loop.has_ended():
        before = loop.gates.temperature.clone()
        loop.epoch()
        if settings.schedule == "published" and not histograms and loop.gates.temperature < before:
            histograms = {"before": _histogram(loop, before), "after": _histogram(loop, loop.gates.temperature)}
        epochs.append({"epoch": len(epochs) + 1, **_state(loop)})
    return {"epochs": epochs, "histograms": histograms}


def _state(loop: Loop) -> dict[str, float]:
    gates = gate(loop.settings.kind, loop.gates.scores, loop.gates.temperature)
    half = judging_shift(loop.settings.kind, loop.gates.temperature.item(), anneals=True)
    return {
        "temperature": loop.gates.temperature.item(),
        "distance_from_binary": torch.minimum(gates, 1 - gates).sum().item() / loop.gates.count,
        "gated": _accuracy(loop),
        "pruned_at_zero": _pruned_accuracy(loop, 0.0),
        "pruned_at_half": _pruned_accuracy(loop, half),
    }


def _accuracy(loop: Loop) -> float:
    _features, logits = loop.network.outputs(loop.val.x)
    return accuracy(logits, loop.val.y).item()


def _pruned_accuracy(loop: Loop, shift: float) -> float:
    with loop.gates.pruned(shift):
        return _accuracy(loop)


def _histogram(loop: Loop, temperature: Tensor) -> list[int]:
    """How many gates lie in each of ``BINS`` equal parts of [0, 1]."""
    gates = [gate(loop.settings.kind, scores, temperature) for scores in loop.gates.views(loop.gates.scores).values()]
    return torch.cat([values.flatten() for values in gates]).histc(BINS, 0, 1).int().tolist()


def measure(seed: int, gamma: float, anneal_rate: float, max_epochs: int, **options: Any) -> dict[str, Any]:
    """Both schedules from one biased network."""
    model, splits = biased_network(seed, **options)
    results: dict[str, Any] = {"seed": seed, "gamma": gamma, "anneal_rate": anneal_rate}
    for schedule in SCHEDULES:
        settings = Settings(
            WORKLOAD.bottleneck,
            WORKLOAD.num_bias_classes,
            gamma=gamma,
            schedule=schedule,
            anneal_rate=anneal_rate,
            max_epochs=max_epochs,
            batch_size=WORKLOAD.batch_size,
            seed=seed,
        )
        results[schedule] = follow(model, splits, settings)
    return results


def table(results: dict[str, Any]) -> Table:
    """Epochs around falls of T."""
    shown = Table(title=f"Multi-Color MNIST, gamma {results['gamma']:g}, validation accuracy after each fall of T")
    for column in ("schedule", "epoch", "T", "from binary", "gated", "pruned at m >= 0", "pruned at g >= 1/2"):
        shown.add_column(column, justify="left" if column == "schedule" else "right")
    for schedule in SCHEDULES:
        for row in _around_falls(results[schedule]["epochs"]):
            shown.add_row(
                schedule,
                str(row["epoch"]),
                f"{row['temperature']:.2g}",
                f"{row['distance_from_binary']:.4f}",
                *(f"{row[name]:.3f}" for name in ("gated", "pruned_at_zero", "pruned_at_half")),
            )
    return shown


def _around_falls(epochs: list[dict[str, float]]) -> list[dict[str, float]]:
    """The epoch before and the one after each time that T has fallen by ten or more, and the last."""
    kept, reference = [epochs[0]], epochs[0]["temperature"]
    for before, row in itertools.pairwise(epochs):
        if row["temperature"] <= reference / 9.9:
            kept += [before, row] if before is not kept[-1] else [row]
            reference = row["temperature"]
    return kept if kept[-1] is epochs[-1] else [*kept, epochs[-1]]


def main(arguments: list[str] | None = None) -> None:
    parser = bench_parser("cooling", __doc__)
    parser.add_argument("--seed", type=int, default=1, help="default: 1")
    parser.add_argument("--gamma", type=float, default=1.0, help="default: 1")
    parser.add_argument("--anneal-rate", type=float, default=1e-4, help="of the adaptive schedule (default: 1e-4)")
    parser.add_argument("--max-epochs", type=int, default=200, help="of each extraction (default: 200)")
    add_json(parser, "all figures")
    options = parser.parse_args(arguments)
    results = measure(options.seed, options.gamma, options.anneal_rate, options.max_epochs)
    print_table(table(results))
    for when, counts in results["published"]["histograms"].items():
        print(f"gates {when} the first cut, from 0 to 1 in {BINS} equal parts: {' '.join(map(str, counts))}")
    write_record(options.json, results)


if __name__ == "__main__":
    main()
