"""The adaptive schedule with other learning rates of the scores: what comes out on Multi-Color MNIST.

The scores learn at 1e-3, the published rate, times a factor that falls with T. Here the same extraction is made with
other rates in its place, from one biased network a seed, on the shipped digits.
"""

from itertools import product
from statistics import mean
from typing import Any

from ffw_fast.benchmarks.command import add_json, bench_parser, write_record
from ffw_fast.benchmarks.machine import describe
from ffw_fast.benchmarks.whole import WORKLOAD, biased_network
from torch import nn

from ffw_fast.data import Splits
from ffw_fast.extraction import Extraction, sparsity
from ffw_fast.inputs import prepare
from ffw_fast.leakage import leakage
from ffw_fast.loop import Loop
from ffw_fast.optim import LR
from ffw_fast.progress import Progress
from ffw_fast.run_state import RunState
from ffw_fast.settings import Settings
from ffw_fast.tables import Lines, print_table, spread


def extraction(model: nn.Module, splits: Splits, settings: Settings, lr: float) -> Extraction:
    """``ffw_fast.extract`` with another learning rate of the scores."""
    loop = Loop(prepare(model, splits.train, splits.val, settings))
    for group in loop.optimizer.param_groups:
        group["lr"] = lr
    with RunState(None, {}, resume=False) as state:
        loop.run(state, Progress())
    return loop.extraction(model)


def row(model: nn.Module, splits: Splits, settings: Settings, lr: float) -> dict[str, Any]:
    """What one of them gave."""
    found = extraction(model, splits, settings, lr)
    measured = leakage(found.model(), settings, splits, sparsity(found.masks))
    result = {name: measured[name] for name in ("task_accuracy", "bias_accuracy", "sparsity")}
    return {"lr": lr, "anneal_rate": settings.anneal_rate, "gamma": settings.gamma, "seed": settings.seed, **result,
            "epochs": len(found.history)}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = bench_parser("learning_rate", __doc__)
    add = parser.add_argument
    add("--rates", type=float, nargs="+", default=[LR, 3 * LR], help=f"of the scores (default: {LR:g} {3 * LR:g})")
    add("--anneal-rates", type=float, nargs="+", default=[2e-4, 1e-4], help="default: 2e-4 1e-4")
    add("--gammas", type=float, nargs="+", default=[1.0, 3.0], help="default: 1 3")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    add("--max-epochs", type=int, default=200, help="of an extraction")
    add("--vanilla-epochs", type=int, help="of the biased network (default: the workload's)")
    add("--unbiased-size", type=int, help="images of the unbiased set (default: the workload's)")
    add_json(parser)
    options = parser.parse_args(arguments)
    rows = []
    for seed in options.seeds:
        model, splits = biased_network(seed, options.vanilla_epochs, unbiased_size=options.unbiased_size)
        for lr, anneal_rate, gamma in product(options.rates, options.anneal_rates, options.gammas):
            settings = Settings(
                WORKLOAD.bottleneck,
                WORKLOAD.num_bias_classes,
                schedule="adaptive",
                gamma=gamma,
                anneal_rate=anneal_rate,
                seed=seed,
                max_epochs=options.max_epochs,
            )
            rows.append(row(model, splits, settings, lr))
    print_table(lines(rows).as_table())
    write_record(options.json, {"machine": describe(), "rows": rows})


def lines(rows: list[dict[str, Any]]) -> Lines:
    """One line a setting, over seeds; the accuracy of the heads is their mean."""
    settings: dict[tuple[float, float, float], list[dict[str, Any]]] = {}
    for found in rows:
        settings.setdefault((found["anneal_rate"], found["gamma"], found["lr"]), []).append(found)
    return Lines(
        "Multi-Color MNIST, adaptive schedule, unbiased test set",
        ["anneal_rate", "gamma", "learning rate", "task accuracy", "read by heads", "sparsity", "epochs"],
        [
            [
                *(f"{value:g}" for value in setting),
                spread([found["task_accuracy"] for found in own]),
                spread([mean(found["bias_accuracy"]) for found in own]),
                f"{mean(found['sparsity'] for found in own):.2f}",
                f"{mean(found['epochs'] for found in own):.0f}",
            ]
            for setting, own in sorted(settings.items())
        ],
    )


if __name__ == "__main__":
    main()
