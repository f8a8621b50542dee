"""What a run is asked for, and what its folder says of that."""

import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ffw_fast.backend import backend_info, without_folders
from ffw_fast.settings import Settings
from ffw_fast.vanilla import Recipe
from ffw_fast.version import __version__
from ffw_fast.workloads import Option, Workload


@dataclass(frozen=True)
class Request:
    """What ``ffw-fast run`` was asked for.

    Attributes:
        data_dir: folder of the full data set; None for the digits that a package ships.
        data_options: the workload's own options.
        extraction: arguments of ``ffw_fast.extract`` that differ from its defaults.
        vanilla_epochs: of the biased network's training; None for the published number.
        guess_bias: BISE's bias labels are what a network says that was trained for one epoch.
        without_val: BISE gets no unbiased validation set.
        shard: as in ``ffw_fast.extract``.
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
    guess_bias: bool = False
    without_val: bool = False
    shard: bool = False

    def __post_init__(self) -> None:
        if (self.guess_bias or self.without_val) and self.extraction.get("method") != "bise":
            raise ValueError("guessed bias labels and running without a validation set go with method 'bise'")
        if self.vanilla_epochs is not None and self.vanilla_epochs < 1:
            raise ValueError(f"vanilla_epochs must be at least 1, got {self.vanilla_epochs}")

    @property
    def settings(self) -> Settings:
        """The settings of the extraction; ``ValueError`` where one of them is bad."""
        workload = self.workload
        given = {name: value for name, value in self.extraction.items() if value is not None}
        own: dict[str, Any] = {"gamma": workload.default_gamma}
        if given.get("method") == "bise":
            own = {"where": workload.bise_where} if given.get("granularity") != "weight" else {}
        classes = workload.num_classes if self.guess_bias else workload.num_bias_classes
        basis = {"bottleneck": workload.bottleneck, "num_bias_classes": classes, "batch_size": workload.batch_size}
        return Settings.of(**{**basis, **own, **given, "seed": self.seed})

    @property
    def recipe(self) -> Recipe | None:
        """How the biased network is trained; None where it is trained already."""
        recipe = self.workload.recipe(full=self.data_dir is not None)
        if recipe is None or self.vanilla_epochs is None:
            return recipe
        return replace(recipe, epochs=self.vanilla_epochs)


def config_of(request: Request) -> dict[str, Any]:
    """What was asked for, and of which software on which machine."""
    return {
        "workload": request.workload.name,
        "title": request.workload.title,
        "seed": request.seed,
        "data_dir": request.data_dir and os.path.abspath(request.data_dir),
        "data_options": identifying_options(request),
        "vanilla_recipe": recipe_as_json(request.recipe),
        "settings": request.settings.as_dict(),
        "guess_bias": request.guess_bias,
        "without_val": request.without_val,
        **how_made(request),
    }


def how_made(request: Request) -> dict[str, Any]:
    """Of which software on which machine."""
    return {
        "device": request.device or "cpu",
        "versions": {"ffw_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {
            "system": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
        },
        "backend": without_folders(backend_info()),
    }


def recipe_as_json(recipe: Recipe | None) -> dict[str, Any] | None:
    return None if recipe is None else {**asdict(recipe), "milestones": list(recipe.milestones)}


def identifying_options(request: Request) -> dict[str, Any]:
    """The workload's options that results depend on."""
    return _options(request, lambda option: option.changes_results)


def vanilla_options(request: Request) -> dict[str, Any]:
    """The workload's options without those of the unbiased sets."""
    return _options(request, lambda option: not option.of_unbiased_sets)


def _options(request: Request, chosen: Callable[[Option], bool]) -> dict[str, Any]:
    names = {option.name for option in request.workload.options if chosen(option)}
    return {name: value for name, value in request.data_options.items() if name in names}


def vanilla_identity(request: Request) -> dict[str, Any]:
    """What the biased network depends on: requests that agree in it can share one."""
    return {
        "workload": request.workload.name,
        "data_dir": request.data_dir and os.path.abspath(request.data_dir),
        "data_options": _options(request, lambda option: option.changes_results and not option.of_unbiased_sets),
        "seed": request.seed,
        "recipe": recipe_as_json(request.recipe),
        "precision": request.settings.precision,
    }
