"""Extractions from start to end, by ``ffw_fast`` and by its plain reference, in one run and from one biased network.

Multi-Color MNIST on the shipped digits: the published schedule both ways, at its defaults, and the adaptive one at
gamma 1. Nothing is multiplied out: the times are those of the extractions, without the biased network's training, which
all are given; the metrics are on the unbiased test set, with heads freshly fitted. So the table also tells how long it
takes to reach the quality that the published schedule ends with.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rich.table import Table
from torch import nn

from ffw_fast import extract, reference
from ffw_fast.data import Splits
from ffw_fast.extraction import Extraction, sparsity
from ffw_fast.run import leakage
from ffw_fast.settings import Settings
from ffw_fast.vanilla import train_vanilla
from ffw_fast.workloads import WORKLOADS

ADAPTIVE = {"schedule": "adaptive", "gamma": 1.0}
SIDES: dict[str, tuple[Callable[..., Extraction], dict[str, Any]]] = {
    "reference": (reference.extract, {}),
    "ffw_fast": (extract, {}),
    "ffw_fast, adaptive": (extract, ADAPTIVE),
}


def run_whole(
    name: str = "multi-color-mnist",
    seed: int = 0,
    max_epochs: int = 200,
    vanilla_epochs: int | None = None,
    **data_options: Any,
) -> dict[str, Any]:
    """Seconds, epochs and final metrics of all sides, and the biased network's metrics."""
    workload = WORKLOADS[name]
    print(f"{workload.title}, whole: the biased network ...", flush=True)
    splits, model = workload.load(None, seed, **data_options), workload.build_model(seed)
    recipe = workload.recipe(full=False)
    assert recipe is not None and splits.vanilla is not None
    train_vanilla(model, splits.vanilla, replace(recipe, epochs=vanilla_epochs or recipe.epochs), seed=seed)
    settings = Settings(
        workload.bottleneck,
        workload.num_bias_classes,
        gamma=workload.default_gamma,
        batch_size=workload.batch_size,
        max_epochs=max_epochs,
        seed=seed,
    )
    results: dict[str, Any] = {"workload": workload.title, "vanilla": _leakage(model, settings, splits)}
    for side, (run, own) in SIDES.items():
        print(f"{workload.title}, whole: {side} ...", flush=True)
        started = time.perf_counter()
        found = run(model, splits.train, splits.val, progress=False, **settings.as_dict() | own)
        results[side] = {
            "seconds": time.perf_counter() - started,
            "epochs": len(found.history),
            "pruned": _leakage(found.model(), settings, splits, sparsity(found.masks)),
            "best": _leakage(found.model(best=True), settings, splits, sparsity(found.best_masks)),
        }
        results[side]["ratio"] = results["reference"]["seconds"] / results[side]["seconds"]
    return results


def _leakage(network: nn.Module, settings: Settings, splits: Splits, removed: float = 0.0) -> dict[str, Any]:
    return leakage(
        network,
        settings.bottleneck,
        settings.num_bias_classes,
        splits.train,
        splits.test,
        seed=settings.seed,
        batch_size=settings.batch_size,
        sparsity=removed,
    )


def whole_table(results: dict[str, Any]) -> Table:
    """One row for the biased network and for what each side found."""
    table = Table(title=f"{results['workload']}, whole")
    for column in ("", "seconds", "faster", "epochs", "task accuracy", "biases read by heads", "MI", "sparsity"):
        table.add_column(column, justify="right" if column else "left")
    _add_row(table, "vanilla", ("", "", ""), results["vanilla"])
    for side in SIDES:
        found = results[side]
        took = (f"{found['seconds']:.1f}", f"{found['ratio']:.1f}x", str(found["epochs"]))
        _add_row(table, f"{side}, pruned", took, found["pruned"])
        _add_row(table, f"{side}, best", ("", "", ""), found["best"])
    return table


def _add_row(table: Table, title: str, took: tuple[str, str, str], row: dict[str, Any]) -> None:
    heads, information = (" ".join(f"{value:.3f}" for value in row[name]) for name in ("bias_accuracy", "bias_mi"))
    table.add_row(title, *took, f"{row['task_accuracy']:.3f}", heads, information, f"{row['sparsity']:.3f}")
