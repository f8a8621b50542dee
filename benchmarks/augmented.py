"""Heads on new draws of augmented data in every epoch, or on one draw a fit (``cache_augmented``): what it changes.

Multi-Color MNIST on the shipped digits, whose unbiased images are moved by up to a pixel whenever they are read. From
one biased network a seed, one extraction of each kind with the adaptive schedule. Networks are measured on the unbiased
test set as it is, with heads fitted afresh on the training set as it is.
"""

from statistics import mean
from typing import Any

import torch
from ffw_fast.benchmarks.command import add_json, bench_parser, write_record
from ffw_fast.benchmarks.machine import measure_rates, record
from ffw_fast.benchmarks.whole import WORKLOAD, biased_network
from torch import Tensor, nn
from torch.utils.data import Dataset

from ffw_fast.data import Splits
from ffw_fast.data.samples import Samples
from ffw_fast.extract import extract
from ffw_fast.extraction import sparsity
from ffw_fast.leakage import leakage
from ffw_fast.tables import Lines, print_table, spread

KINDS = {"a new draw in every epoch": False, "one draw a fit": True}
FARTHEST = 1  # pixels that an image is moved by at most, in each direction


class Moved(Dataset):
    """Samples whose images are moved at random whenever they are read; it counts how often one is."""

    def __init__(self, samples: Samples) -> None:
        self.x, self.y, self.b = samples.x[torch.arange(len(samples.y))], samples.y, samples.b
        self.reads = 0

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        self.reads += 1
        moves = torch.randint(-FARTHEST, FARTHEST + 1, (2,)).tolist()
        return self.x[index].roll(moves, dims=(1, 2)), self.y[index], self.b[index]


def extracted(model: nn.Module, splits: Splits, seed: int, cache_augmented: bool, max_epochs: int) -> dict[str, Any]:
    """What one extraction took, and what its network does."""
    train = Moved(splits.train)
    found = extract(
        model,
        train,
        splits.val,
        bottleneck=WORKLOAD.bottleneck,
        num_bias_classes=WORKLOAD.num_bias_classes,
        schedule="adaptive",
        gamma=1.0,
        seed=seed,
        max_epochs=max_epochs,
        cache_augmented=cache_augmented,
        progress=False,
    )
    row = leakage(found.model(), found.settings, splits, sparsity(found.masks))
    kept = {name: row[name] for name in ("task_accuracy", "bias_accuracy")}
    seconds = found.metrics["seconds"]
    return {"seed": seed, "seconds": seconds, "passes": train.reads / len(train), "epochs": len(found.history), **kept}


def main(arguments: list[str] | None = None) -> None:
    parser = bench_parser("augmented", __doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    parser.add_argument("--max-epochs", type=int, default=200, help="of an extraction")
    parser.add_argument("--vanilla-epochs", type=int, help="of the biased network (default: the workload's)")
    parser.add_argument("--unbiased-size", type=int, default=2000, help="images of the unbiased set (default: 2000)")
    add_json(parser)
    options = parser.parse_args(arguments)
    rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for seed in options.seeds:
        model, splits = biased_network(seed, options.vanilla_epochs, unbiased_size=options.unbiased_size)
        for kind, cached in KINDS.items():
            rows[kind].append(extracted(model, splits, seed, cached, options.max_epochs))
    print_table(lines(rows).as_table())
    if options.json:
        write_record(options.json, {"machine": record(measure_rates()), "rows": rows})


def lines(rows: dict[str, list[dict[str, Any]]]) -> Lines:
    """One line a kind, over seeds."""
    columns = ["heads learn from", "passes over\nthe data", "seconds", "epochs", "task accuracy"]
    columns += [f"{name}\nread by a head" for name in WORKLOAD.bias_names]
    found = [
        [
            kind,
            *(f"{mean(row[name] for row in own):.0f}" for name in ("passes", "seconds", "epochs")),
            spread([row["task_accuracy"] for row in own]),
            *(spread([row["bias_accuracy"][index] for row in own]) for index in range(len(WORKLOAD.bias_names))),
        ]
        for kind, own in rows.items()
    ]
    return Lines("Multi-Color MNIST, unbiased images moved at random", columns, found)


if __name__ == "__main__":
    main()
