"""The benchmarks of the paper: which data, which network, which recipe, and what the paper says of each."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ffw_fast.data import Splits, biased_mnist, celeba, corrupted_cifar10, multi_color_mnist
from ffw_fast.models import MLP, ResNet18, SimpleConvNet
from ffw_fast.vanilla import Recipe


@dataclass(frozen=True)
class Option:
    """An option of a workload's data, from which the command line makes an argument."""

    name: str  # as in Python, with underscores
    type: type[int] | type[float] | type[bool] | type[str]
    help: str
    of_unbiased_sets: bool = False  # the biased network does not depend on it
    changes_results: bool = True

    @property
    def flag(self) -> str:
        """As on the command line: ``train_size`` is ``--train-size``."""
        return "--" + self.name.replace("_", "-")


@dataclass(frozen=True)
class Workload:
    """One benchmark of the FFW paper."""

    name: str
    title: str
    bias_names: tuple[str, ...]
    bottleneck: str  # the module whose output the heads read
    network: Callable[[], nn.Module]
    data: Callable[..., Splits]  # called with data_dir, seed and the options
    full_recipe: Recipe | None  # as published, for the full data set; None for a network that is trained already
    shipped_recipe: Recipe | None  # for the data that comes with the package; None where none does
    paper_seconds: int | None = None  # time of FFW on an A100, Table 8 of the paper
    options: tuple[Option, ...] = ()
    num_classes: int = 10
    num_bias_classes: int = 10
    batch_size: int = 100  # of FFW
    default_gamma: float = 10.0
    bise_where: str | None = None  # the layers whose channels BISE gates; None: all that can be

    def build_model(self, seed: int) -> nn.Module:
        """The network, freshly initialised on the CPU; the global generators are left alone."""
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU as well
            return self.network()

    def load(self, data_dir: str | os.PathLike[str] | None, seed: int, **options: Any) -> Splits:
        """The four sets; options that are absent or None take their defaults."""
        known = [option.name for option in self.options]
        if unknown := [name for name in options if name not in known]:
            raise ValueError(
                f"{self.name} has no option {', '.join(unknown)}; it understands {', '.join(known) or 'none'}"
            )
        return self.data(data_dir, seed, **options)

    def recipe(self, full: bool) -> Recipe | None:
        """How to train the vanilla network: as published on the ``full`` data set, or on the shipped one."""
        return self.full_recipe if full or self.shipped_recipe is None else self.shipped_recipe


_TRAIN_SIZE = Option("train_size", int, "samples that the vanilla network learns from (default: all of the data set's)")
_UNBIASED_SIZE = Option(
    "unbiased_size", int, "samples of the unbiased training set (default: all of the data set's)", of_unbiased_sets=True
)
_UNBIASED_DIGITS = Option(
    "unbiased_digits",
    int,
    "different digits in the unbiased training set (default: all that are for it)",
    of_unbiased_sets=True,
)
_CACHE_DIR = Option(
    "cache_dir",
    str,
    "folder for decoded images that do not fit into memory (default: beside them)",
    changes_results=False,
)

_MULTI_COLOR_MNIST = Workload(
    name="multi-color-mnist",
    title="Multi-Color MNIST",
    bias_names=("left colour", "right colour"),
    bottleneck="relu3",
    network=MLP,
    data=multi_color_mnist,
    full_recipe=Recipe("adam", lr=1e-3, batch_size=256, epochs=100),
    shipped_recipe=Recipe("adam", lr=1e-3, batch_size=256, epochs=100),
    paper_seconds=22 * 60,
    options=(
        _TRAIN_SIZE,
        _UNBIASED_SIZE,
        _UNBIASED_DIGITS,
        Option(
            "second_division",
            bool,
            "divide pixels in [0, 1] by 255 once more (default: only with full MNIST)",
        ),
    ),
)

_BIASED_MNIST = Workload(
    name="biased-mnist",
    title="Biased-MNIST",
    bias_names=("background colour",),
    bottleneck="flatten",
    network=SimpleConvNet,
    data=biased_mnist,
    full_recipe=Recipe("sgd", lr=0.1, batch_size=100, epochs=80, milestones=(0.5, 0.75)),
    shipped_recipe=Recipe("sgd", lr=0.1, batch_size=100, epochs=30, milestones=(0.5, 0.75)),
    paper_seconds=(3 * 60 + 20) * 60,
    options=(
        Option(
            "rho",
            float,
            "probability of the label's own colour in the vanilla set (default: full MNIST 0.99, else 0.95)",
        ),
        Option("image_size", int, "height and width in pixels, from 7 to 28 (default: 28)"),
        _TRAIN_SIZE,
        _UNBIASED_SIZE,
        _UNBIASED_DIGITS,
    ),
)

_CELEBA = Workload(
    name="celeba",
    title="CelebA: blond hair, biased by gender",
    bias_names=("gender",),
    bottleneck="flatten",
    network=partial(ResNet18, num_classes=2),
    data=celeba,
    full_recipe=Recipe("sgd", lr=0.1, batch_size=100, epochs=80, schedule="plateau", lr_end=1e-3, flips=True),
    shipped_recipe=None,
    paper_seconds=75 * 60,
    options=(
        Option("image_size", int, "height and width in pixels, from 32 to 224 (default: 224)"),
        _TRAIN_SIZE,
        _CACHE_DIR,
    ),
    num_classes=2,
    num_bias_classes=2,
    bise_where="layer*",  # the stem is free
)

_CORRUPTED_CIFAR10 = Workload(
    name="corrupted-cifar10",
    title="Corrupted CIFAR-10",
    bias_names=("corruption",),
    bottleneck="flatten",
    network=partial(ResNet18, num_classes=10),
    data=corrupted_cifar10,
    full_recipe=Recipe("adam", lr=1e-3, batch_size=256, epochs=200, schedule="cosine", flips=True, crop_padding=4),
    shipped_recipe=None,
    paper_seconds=52 * 60,
    options=(
        Option("percent", float, "of conflicting images in the vanilla set: 0.5, 1, 2 or 5 (default: 1)"),
        _TRAIN_SIZE,
        _UNBIASED_SIZE,
        _CACHE_DIR,
    ),
    bise_where="layer*",
)

WORKLOADS: dict[str, Workload] = {
    workload.name: workload for workload in (_MULTI_COLOR_MNIST, _BIASED_MNIST, _CELEBA, _CORRUPTED_CIFAR10)
}


def get_workload(name: str) -> Workload:
    """The workload of that name; ``ValueError`` with the known names otherwise."""
    if name not in WORKLOADS:
        raise ValueError(f"unknown workload {name!r}; known workloads: {', '.join(WORKLOADS)}")
    return WORKLOADS[name]
