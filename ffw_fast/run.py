"""One workload from data to metrics, in a run folder that can be left and taken up again."""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ffw_fast.backend import backend_info
from ffw_fast.data.samples import Samples, Splits
from ffw_fast.evaluation import evaluate_predictions
from ffw_fast.extract import extract
from ffw_fast.extraction import CONFIG, METRICS, Extraction, read_json, write_json
from ffw_fast.gated_network import outputs_of
from ffw_fast.heads import PrivateHeads
from ffw_fast.measure import measure
from ffw_fast.ops import joint_distribution, joint_information
from ffw_fast.progress import Progress
from ffw_fast.seeding import seeded_generator
from ffw_fast.settings import Settings
from ffw_fast.vanilla import Recipe, train_vanilla
from ffw_fast.version import __version__
from ffw_fast.workloads import Workload

VANILLA = "vanilla.safetensors"
VANILLA_RECORD = "vanilla.json"
SHUFFLES = 10  # of the labels, for the floor of the MI
EVALUATION_BATCH = 500


@dataclass(frozen=True)
class Request:
    """What ``ffw-fast run`` was asked for.

    Attributes:
        data_dir: folder of the full data set; None for the digits that a package ships.
        data_options: the workload's own options.
        extraction: arguments of ``ffw_fast.extract`` that differ from its defaults.
        vanilla_epochs: of the biased network's training; None for the published number.
    """

    workload: Workload
    out: Path
    seed: int = 0
    data_dir: str | None = None
    data_options: dict[str, Any] = field(default_factory=dict)
    extraction: dict[str, Any] = field(default_factory=dict)
    vanilla_epochs: int | None = None
    device: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        if self.vanilla_epochs is not None and self.vanilla_epochs < 1:
            raise ValueError(f"vanilla_epochs must be at least 1, got {self.vanilla_epochs}")

    @property
    def settings(self) -> Settings:
        """The settings of the extraction; ``ValueError`` where one of them is bad."""
        workload = self.workload
        defaults = {"gamma": workload.default_gamma, "batch_size": workload.batch_size}
        given = {**defaults, **self.extraction, "seed": self.seed}
        return Settings(bottleneck=workload.bottleneck, num_bias_classes=workload.num_bias_classes, **given)

    @property
    def recipe(self) -> Recipe:
        """How the biased network is trained."""
        recipe = self.workload.recipe(full=self.data_dir is not None)
        return recipe if self.vanilla_epochs is None else replace(recipe, epochs=self.vanilla_epochs)


def run_workload(request: Request, progress: Progress) -> dict[str, Any]:
    """Train the biased network, extract the sub-network, measure both, write the run folder; the metrics.

    Raises:
        OSError: the folder cannot be written, before any training.
        ValueError, ImportError, FloatingPointError: bad settings or data, a missing extra, a loss that diverges.
    """
    started = time.perf_counter()
    settings = request.settings
    request.out.mkdir(parents=True, exist_ok=True)
    write_json(request.out / CONFIG, _config(request))
    splits = request.workload.load(request.data_dir, request.seed, **request.data_options)
    vanilla = trained_vanilla(request, splits, progress)
    found = extract(
        vanilla,
        splits.train,
        splits.val,
        run_dir=request.out,
        resume=request.resume,
        progress=progress,
        **settings.as_dict(),
    )
    found.save(request.out)
    write_json(request.out / CONFIG, _config(request))
    metrics = _test_metrics(found, splits, request.seed)
    metrics |= {"epochs": len(found.history), "seconds": time.perf_counter() - started, "validation": found.metrics}
    write_json(request.out / METRICS, metrics)
    return metrics


def _config(request: Request) -> dict[str, Any]:
    """What was asked for, and of which software on which machine."""
    return {
        "workload": request.workload.name,
        "seed": request.seed,
        "data_dir": request.data_dir,
        "data_options": request.data_options,
        "vanilla_recipe": _as_json(request.recipe),
        "settings": request.settings.as_dict(),
        "versions": {"ffw_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": platform.platform(),
        "backend": backend_info(),
    }


def _as_json(recipe: Recipe) -> dict[str, Any]:
    return {**asdict(recipe), "milestones": list(recipe.milestones)}


def trained_vanilla(request: Request, splits: Splits, progress: Progress) -> nn.Module:
    """The biased network: from the run folder where it was trained there in the same way, else trained now."""
    recipe = request.recipe
    model = request.workload.build_model(request.seed)
    record = {
        "recipe": _as_json(recipe),
        "seed": request.seed,
        "data_dir": request.data_dir and os.path.abspath(request.data_dir),
        "data_options": request.data_options,
        "samples": len(splits.vanilla.y),
        "workload": request.workload.name,
    }
    weights, kept = request.out / VANILLA, request.out / VANILLA_RECORD
    if weights.exists() and kept.exists() and read_json(kept) == record:
        model.load_state_dict(load_file(weights))
        return model.to(request.device or "cpu").eval()
    progress.stage("vanilla training", recipe.epochs)
    train_vanilla(
        model,
        splits.vanilla,
        recipe,
        seed=request.seed,
        device=request.device,
        on_epoch=lambda epoch, loss: progress.tick(epoch, f"loss {loss:.4f}"),
    )
    kept.unlink(missing_ok=True)  # the record is written last: a kill between the two leaves no pair that lies
    save_file({name: value.contiguous().cpu() for name, value in model.state_dict().items()}, weights)
    write_json(kept, record)
    return model


def _test_metrics(found: Extraction, splits: Splits, seed: int) -> dict[str, Any]:
    """The biased network, the pruned one and the best one on the unbiased test set."""
    networks: dict[str, Callable[[], nn.Module]] = {
        "vanilla": lambda: found.dense_model.eval(),
        "pruned": lambda: found.model(),
        "best": lambda: found.model(best=True),
    }
    total = sum(mask.numel() for mask in found.masks.values())
    removed = {
        "vanilla": 0.0,
        "pruned": sum(int((~mask).sum()) for mask in found.masks.values()) / total,
        "best": sum(int((~mask).sum()) for mask in found.best_masks.values()) / total,
    }
    settings = found.settings
    return {
        name: leakage(
            network(),
            settings.bottleneck,
            settings.num_bias_classes,
            splits.train,
            splits.test,
            seed=seed,
            batch_size=settings.batch_size,
            sparsity=removed[name],
        )
        for name, network in networks.items()
    }


def leakage(
    network: nn.Module,
    bottleneck: str,
    num_bias_classes: int,
    train: Samples,
    test: Samples,
    *,
    seed: int,
    batch_size: int,
    sparsity: float = 0.0,
) -> dict[str, Any]:
    """Task accuracy of a network and what private heads, fitted afresh on its features, read of the biases.

    Heads are fitted on ``train`` and measured on ``test``. ``bias_mi_floor`` is the MI of the same predictions with
    shuffled labels: what the formula gives where there is nothing to read.
    """
    device = next(network.parameters()).device
    train, test = train.to(device), test.to(device)
    _, features = _outputs(network, bottleneck, train.x)
    logits, test_features = _outputs(network, bottleneck, test.x)
    heads = PrivateHeads.create(
        train.b.shape[1], num_bias_classes, features.shape[1], seed=seed, batch_size=batch_size, device=device
    )
    heads.fit(features, train.b)
    head_logits = heads.logits(test_features)
    groups = evaluate_predictions(logits.argmax(1).cpu(), test.y.cpu(), test.b.cpu())
    return {
        **measure(logits, head_logits, test.y, test.b, sparsity).as_dict(),
        "bias_mi_floor": information_floor(head_logits, test.b, seed),
        "groups": groups.as_dict(),
    }


def _outputs(network: nn.Module, bottleneck: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (n, C) and features (n, D) of all samples."""
    parts = [outputs_of(network, bottleneck, batch) for batch in x.split(EVALUATION_BATCH)]
    logits, features = zip(*parts, strict=True)
    return torch.cat(logits), torch.cat(features).flatten(1)


def information_floor(head_logits: Tensor, b: Tensor, seed: int) -> list[float]:
    """Mean MI of each head's predictions with labels in random order: logits (n, heads, K), labels (n, heads)."""
    source = seeded_generator(seed, "shuffled labels")
    shuffled = [b[torch.randperm(len(b), generator=source).to(b.device)] for _ in range(SHUFFLES)]
    values = [joint_information(joint_distribution(head_logits, labels)) for labels in shuffled]
    return torch.stack(values).mean(0).tolist()
