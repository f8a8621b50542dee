"""Extractions from start to end, by ``ffw_fast`` and by its plain reference, in one run and from one biased network.

Multi-Color MNIST on the shipped digits: the published schedule both ways, at its defaults, and the adaptive one at
gamma 1. Nothing is multiplied out: the times are those of the extractions, without the biased network's training, which
all are given; the metrics are on the unbiased test set, with heads freshly fitted. So the table also tells how long it
takes to reach the quality that the published schedule ends with.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table
from torch import nn

from ffw_fast import extract, reference
from ffw_fast.data.samples import Splits
from ffw_fast.extraction import Extraction, sparsity
from ffw_fast.leakage import leakage
from ffw_fast.settings import Settings
from ffw_fast.vanilla import train_vanilla
from ffw_fast.workloads import WORKLOADS

WORKLOAD = WORKLOADS["multi-color-mnist"]
ADAPTIVE = {"schedule": "adaptive", "gamma": 1.0}
SIDES: dict[str, tuple[Callable[..., Extraction], dict[str, Any]]] = {
    "reference": (reference.extract, {}),
    "ffw_fast": (extract, {}),
    "ffw_fast, adaptive": (extract, ADAPTIVE),
}


@dataclass(frozen=True)
class Biased:
    """A workload's data, the network that was trained on its biased set, and the extraction's settings."""

    title: str
    splits: Splits
    model: nn.Module
    settings: Settings

    def extract_by(self, run: Callable[..., Extraction], **own: Any) -> dict[str, Any]:
        """Seconds, epochs and final metrics of one extraction, whose own settings go before the common ones."""
        splits, settings = self.splits, self.settings
        started = time.perf_counter()
        found = run(self.model, splits.train, splits.val, progress=False, **settings.as_dict() | own)
        return {
            "seconds": time.perf_counter() - started,
            "epochs": len(found.history),
            "pruned": self.measured(found.model(), sparsity(found.masks)),
            "best": self.measured(found.model(best=True), sparsity(found.best_masks)),
        }

    def measured(self, network: nn.Module, removed: float = 0.0) -> dict[str, Any]:
        """The network on the unbiased test set."""
        return leakage(network, self.settings, self.splits, removed)


def train_biased(
    name: str, seed: int, *, max_epochs: int, vanilla_epochs: int | None, device: str = "cpu", **data_options: Any
) -> Biased:
    """Load a workload's shipped data and train its biased network."""
    workload = WORKLOADS[name]
    splits, model = workload.load(None, seed, **data_options), workload.build_model(seed)
    recipe = workload.recipe(full=False)
    assert recipe is not None and splits.vanilla is not None
    recipe = replace(recipe, epochs=vanilla_epochs or recipe.epochs)
    train_vanilla(model, splits.vanilla, recipe, seed=seed, device=device)
    settings = Settings(
        workload.bottleneck,
        workload.num_bias_classes,
        gamma=workload.default_gamma,
        batch_size=workload.batch_size,
        max_epochs=max_epochs,
        seed=seed,
    )
    return Biased(workload.title, splits, model, settings)


def biased_network(seed: int, epochs: int | None = None, **data_options: Any) -> tuple[nn.Module, Splits]:
    """Multi-Color MNIST's biased network, after the workload's epochs or so many, and the data."""
    biased = train_biased(WORKLOAD.name, seed, max_epochs=1, vanilla_epochs=epochs, **data_options)
    return biased.model, biased.splits


def run_whole(max_epochs: int = 200, vanilla_epochs: int | None = None, **data_options: Any) -> dict[str, Any]:
    """Seconds, epochs and final metrics of all sides, and the biased network's metrics."""
    title = WORKLOAD.title
    print(f"{title}, whole: the biased network ...", flush=True)
    biased = train_biased(WORKLOAD.name, 0, max_epochs=max_epochs, vanilla_epochs=vanilla_epochs, **data_options)
    results: dict[str, Any] = {"workload": title, "vanilla": biased.measured(biased.model)}
    for side, (run, own) in SIDES.items():
        print(f"{title}, whole: {side} ...", flush=True)
        results[side] = biased.extract_by(run, **own)
        results[side]["ratio"] = results["reference"]["seconds"] / results[side]["seconds"]
    return results


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
