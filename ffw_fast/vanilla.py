"""Training of the vanilla network: ordinary cross-entropy on the biased set, before any debiasing."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffw_fast.convolutions import cheapest_convolutions
from ffw_fast.data.samples import Samples
from ffw_fast.seeding import epoch_order


@dataclass(frozen=True)
class Recipe:
    """How to train a vanilla network (Table 8 of the FFW paper and the published code)."""

    optimizer: Literal["sgd", "adam"]
    lr: float
    batch_size: int
    epochs: int
    momentum: float = 0.9  # of SGD
    weight_decay: float = 1e-4  # added to the gradient, for Adam too
    milestones: tuple[float, ...] = ()  # when the learning rate is cut, as fractions of all epochs
    lr_cut: float = 0.1  # the factor it is cut by

    def __post_init__(self) -> None:
        if self.optimizer not in ("sgd", "adam"):
            raise ValueError(f"unknown optimizer {self.optimizer!r}; known: 'sgd', 'adam'")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {self.lr!r}")
        if self.batch_size < 1 or self.epochs < 0:
            raise ValueError(
                "batch_size must be at least 1 and epochs at least 0, "
                f"got {self.batch_size} and {self.epochs}"
            )
        if not all(0 <= milestone <= 1 for milestone in self.milestones):
            raise ValueError(f"milestones must be fractions of all epochs (0 to 1), got {self.milestones}")

    def learning_rate(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        cuts = sum(epoch >= milestone * self.epochs for milestone in self.milestones)
        return self.lr * self.lr_cut**cuts

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of every parameter that asks for a gradient."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, self.lr, weight_decay=self.weight_decay, fused=True)
        return torch.optim.SGD(
            parameters, self.lr, momentum=self.momentum, weight_decay=self.weight_decay, fused=True
        )


def train_vanilla(
    model: nn.Module,
    samples: Samples,
    recipe: Recipe,
    *,
    seed: int,
    device: torch.device | str | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    on_epoch: Callable[[int, float], None] | None = None,
) -> nn.Module:
    """Trains ``model`` in place and returns it in eval mode.

    Args:
        model: from ``samples.x`` to logits (n, classes).
        samples: the biased training set; it is moved to the device once, as a whole.
        recipe: optimizer, learning rate and their like.
        seed: of the order of the samples; the global generator is left alone.
        device: where to train, and where the model is afterwards; None for where it is.
        precision: "bf16" runs the network under autocast, with weights and their updates in float32. On a
            processor without bf16 instructions that is many times slower than "fp32".
        on_epoch: called after every epoch with the number of epochs done and the mean training loss.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"unknown precision {precision!r}; known: 'fp32', 'bf16'")
    if len(samples.x) != len(samples.y) or len(samples.y) == 0:
        raise ValueError(
            "expected as many inputs as labels and at least one of each, "
            f"got {len(samples.x)} and {len(samples.y)}"
        )
    device = torch.device(device) if device is not None else next(model.parameters()).device
    samples = samples.to(device)
    model.to(device).train()
    optimizer, example = recipe.build_optimizer(model), samples.x[:2]
    for epoch in range(recipe.epochs):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate(epoch)
        order = epoch_order(len(samples.y), seed, "vanilla batches", epoch)
        with cheapest_convolutions(model, example):
            loss = _train_epoch(model, samples.batches(order, recipe.batch_size), optimizer, precision)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the vanilla network's training loss is {loss} in epoch {epoch + 1} of {recipe.epochs} "
                f"({recipe.optimizer}, learning rate {recipe.learning_rate(epoch):g}); "
                "lower the learning rate, or check the inputs for NaN"
            )
        if on_epoch is not None:
            on_epoch(epoch + 1, loss)
    return model.eval()


def _train_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    precision: str,
) -> float:
    """One pass over minibatches (x, y, b); returns the mean loss."""
    total, count = torch.zeros(()), 0
    for x, y, _b in batches:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total, count = total.to(y.device) + loss.detach() * len(y), count + len(y)
    return total.item() / count  # the one read of an epoch: a GPU need not wait in every step
