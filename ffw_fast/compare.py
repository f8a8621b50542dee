"""FFW beside what it is up against, over seeds: what each network does, what still leaks, and what it took."""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import product
from statistics import mean, stdev
from typing import Any

from rich.table import Table
from torch import nn

from ffw_fast.baselines import MAGNITUDE_SPARSITIES, prune_by_magnitude, refit_last_layer, train_on_unbiased
from ffw_fast.data.samples import Splits
from ffw_fast.extract import extract
from ffw_fast.extraction import masks_of, sparsity
from ffw_fast.files import read_json, write_json
from ffw_fast.progress import Progress
from ffw_fast.run import Request, leakage, trained_vanilla
from ffw_fast.settings import Settings

BASELINE_STEPS = 3600  # of the baselines that train on the unbiased set; the best epoch by validation is kept
RESULTS = "compare.json"


@dataclass(frozen=True)
class Setting:
    """One way of extracting that is compared."""

    schedule: str
    gamma: float
    granularity: str = "weight"

    def __str__(self) -> str:
        kind = "" if self.granularity == "weight" else f" {self.granularity} gates,"
        return f"FFW{kind} {self.schedule}, gamma {self.gamma:g}"


def compare(
    request: Request, seeds: list[int], settings: list[Setting], progress: Progress
) -> dict[str, list[dict[str, Any]]]:
    """Method -> one row of metrics a seed, on the unbiased test set with heads fitted afresh.

    Results are written to ``compare.json`` in the request's folder after every method; what is there already for the
    same data and settings is not computed again.
    """
    request.out.mkdir(parents=True, exist_ok=True)
    path = request.out / RESULTS
    identity = json.loads(json.dumps(_identity(request)))
    kept = read_json(path) if path.exists() else {}
    rows: dict[str, list[dict[str, Any]]] = kept.get("methods", {}) if kept.get("identity") == identity else {}
    for seed in seeds:
        ours = replace(request, seed=seed, out=request.out / f"seed-{seed}")
        ours.out.mkdir(parents=True, exist_ok=True)
        splits = request.workload.load(request.data_dir, seed, **request.data_options)
        vanilla = trained_vanilla(ours, splits, progress)
        for name, make in _methods(ours, splits, vanilla, settings, progress):
            done = rows.setdefault(name, [])
            if any(row["seed"] == seed for row in done):
                continue
            started = time.perf_counter()
            network, removed, epochs = make()
            seconds = time.perf_counter() - started
            row = leakage(
                network,
                ours.settings.bottleneck,
                ours.settings.num_bias_classes,
                splits.for_heads,
                splits.test,
                seed=seed,
                batch_size=ours.settings.batch_size,
                sparsity=removed,
            )
            done.append({"seed": seed, **row, "seconds": seconds, "epochs": epochs})
            write_json(path, {"identity": identity, "methods": rows})
    return rows


def _identity(request: Request) -> dict[str, Any]:
    """What results must agree in to stand in one table, whatever the methods and seeds."""
    settings = request.settings.as_dict()
    for name in ("seed", *(field.name for field in fields(Setting))):
        del settings[name]
    return {
        "workload": request.workload.name,
        "data_dir": request.data_dir and os.path.abspath(request.data_dir),
        "data_options": request.data_options,
        "vanilla_epochs": request.recipe and request.recipe.epochs,
        "settings": settings,
    }


Made = tuple[nn.Module, float, int]  # the network, its sparsity, the epochs that it took


def _methods(
    request: Request, splits: Splits, vanilla: nn.Module, settings: list[Setting], progress: Progress
) -> Iterator[tuple[str, Callable[[], Made]]]:
    """Every method by name, and how its network is made. Baselines get the same validation set."""
    base: Settings = request.settings
    train, val = splits.train, splits.val
    epochs = max(1, BASELINE_STEPS // -(-len(train.y) // base.batch_size))

    yield "vanilla", lambda: (vanilla, 0.0, 0)
    for share in MAGNITUDE_SPARSITIES:
        yield f"magnitude {share:g}", partial(_by_magnitude, vanilla, share)
    yield "DFR", lambda: (refit_last_layer(vanilla, train, val, base, epochs), 0.0, epochs)
    yield "all weights fine-tuned", lambda: (train_on_unbiased(vanilla, train, val, base, epochs), 0.0, epochs)
    fresh = request.workload.build_model(request.seed)
    yield "trained on the unbiased set alone", lambda: (train_on_unbiased(fresh, train, val, base, epochs), 0.0, epochs)
    for setting in settings:
        found: list[Any] = []  # the extraction, shared by the two rows made of it

        def extracted(setting: Setting = setting, found: list[Any] = found) -> Any:
            if not found:
                given = {**base.as_dict(), **asdict(setting)}
                found.append(extract(vanilla, train, val, progress=progress, **given))
            return found[0]

        def pruned(extracted: Callable[[], Any] = extracted) -> Made:
            result = extracted()
            return result.model(), sparsity(masks_of(result.scores)), len(result.history)

        def tuned(extracted: Callable[[], Any] = extracted) -> Made:
            result = extracted()
            return result.finetune(train, val), sparsity(masks_of(result.scores)), len(result.history)

        yield str(setting), pruned
        yield f"{setting}, fine-tuned", tuned


def _by_magnitude(vanilla: nn.Module, share: float) -> Made:
    return prune_by_magnitude(vanilla, share), share, 0


def comparison_table(rows: dict[str, list[dict[str, Any]]], bias_names: tuple[str, ...]) -> Table:
    """Mean and standard deviation over seeds of every method."""
    seeds = max(len(found) for found in rows.values())
    table = Table(title=f"unbiased test set, mean and standard deviation over {seeds} seeds")
    table.add_column("network")
    for column in ("task accuracy", "worst group\nof a bias", *(f"{name}\nread by a head" for name in bias_names)):
        table.add_column(column, justify="right")
    for column in ("sparsity", "epochs", "seconds"):
        table.add_column(column, justify="right")
    for name, found in rows.items():
        biases = [spread([row["bias_accuracy"][index] for row in found]) for index in range(len(bias_names))]
        table.add_row(
            name,
            spread([row["task_accuracy"] for row in found]),
            spread([min(row["groups"]["bias_worst_group"]) for row in found]),
            *biases,
            f"{mean(row['sparsity'] for row in found):.2f}",
            f"{mean(row['epochs'] for row in found):.0f}",
            f"{mean(row['seconds'] for row in found):.0f}",
        )
    return table


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def all_settings(schedules: list[str], gammas: list[float], granularities: list[str]) -> list[Setting]:
    """Every combination."""
    return [Setting(*combination) for combination in product(schedules, gammas, granularities)]

