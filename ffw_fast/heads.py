"""Private heads: linear classifiers that read the bias off the bottleneck, one for each bias."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from ffw_fast import ops
from ffw_fast.data.samples import Inputs, Samples
from ffw_fast.data.stream import Stream
from ffw_fast.seeding import HEAD_ORDERS, epoch_order, seeded_generator
from ffw_fast.settings import Settings

LR = 0.1
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
PLATEAU_THRESHOLD = 1e-3
PLATEAU_PATIENCE = 5
MAX_EPOCHS = 200
EPOCHS_A_CALL = 16  # a chunk's orders are drawn at once; those after the plateau are drawn in vain


def works_meanwhile(device: torch.device) -> bool:
    """Whether Python may go on while the device computes, until it reads something back."""
    return device.type == "cuda"


def initial_parameters(heads: int, classes: int, features: int, seed: int) -> tuple[Tensor, Tensor]:
    """Weight (heads, K, D) and bias (heads, K), float32 on the CPU, uniform in ``+-1/sqrt(D)`` as in ``nn.Linear``."""
    bound = 1 / math.sqrt(features)
    source = seeded_generator(seed, "private heads")
    weight = torch.empty(heads, classes, features, dtype=torch.float32, device="cpu")
    bias = torch.empty(heads, classes, dtype=torch.float32, device="cpu")
    return weight.uniform_(-bound, bound, generator=source), bias.uniform_(-bound, bound, generator=source)


@dataclass
class PrivateHeads:
    """All private heads of a run and their SGD state. They live on from refit to refit, momentum included.

    Attributes:
        weight: (heads, K, D); ``weight_momentum`` likewise.
        bias: (heads, K); ``bias_momentum`` likewise.
        epochs: how many head epochs were run; it numbers the orders in which samples are visited.
        epochs_a_fit: how many a fit takes, whatever the loss does; None: until it is on a plateau.
    """

    weight: Tensor
    bias: Tensor
    seed: int
    batch_size: int
    epochs: int = 0
    epochs_a_fit: int | None = None
    weight_momentum: Tensor = field(init=False)
    bias_momentum: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.weight_momentum = torch.zeros_like(self.weight)
        self.bias_momentum = torch.zeros_like(self.bias)

    @classmethod
    def create(
        cls, heads: int, classes: int, features: int, *, seed: int, batch_size: int, device: torch.device
    ) -> Self:
        weight, bias = initial_parameters(heads, classes, features, seed)
        return cls(weight.to(device), bias.to(device), seed, batch_size)

    @classmethod
    def of(cls, settings: Settings, samples: Samples, width: int) -> Self:
        """Heads for every bias of the samples, on their device."""
        return cls.create(
            samples.b.shape[1],
            settings.num_bias_classes,
            width,
            seed=settings.seed,
            batch_size=settings.batch_size,
            device=samples.b.device,
        )

    def with_fresh_optimizer(self) -> Self:
        """A copy of these heads whose momentum is zero."""
        fresh = copy.deepcopy(self)
        fresh.__post_init__()
        return fresh

    def logits(self, features: Tensor) -> Tensor:
        """Logits (n, heads, K) of features (n, D)."""
        heads, classes, width = self.weight.shape
        return torch.addmm(self.bias.view(-1), features, self.weight.view(-1, width).T).view(-1, heads, classes)

    def by_features(self, by_logits: Tensor) -> Tensor:
        """The gradient by the features (n, D) of what has the gradient (n, heads, K) by the logits."""
        return by_logits.flatten(1) @ self.weight.flatten(0, 1)

    def step(self, features: Tensor, labels: Tensor) -> None:
        """One step of SGD on the cross-entropy of one minibatch: detached features (n, D), labels (n, heads)."""
        rows = torch.arange(len(features), device=features.device).unsqueeze(0)
        self._fit(features.detach(), labels, rows, self._no_plateau(), batch_size=len(features))

    def fit(self, features: Tensor, labels: Tensor) -> int:
        """Train on cached features (n, D) and labels (n, heads) until the loss is on a plateau; epochs it took."""
        plateau, start = self._no_plateau(), self.epochs
        ahead: Tensor | None = None
        while not self._is_done(plateau, start):
            end = start + self._most_epochs
            rows = self._orders(len(features), self.epochs, end) if ahead is None else ahead
            losses = self._fit(features, labels, rows.to(features.device), plateau, self.batch_size)
            ahead = None
            if works_meanwhile(features.device) and (following := self.epochs + len(rows)) < end:
                ahead = self._orders(len(features), following, end)
            self._take_in(losses)
        return self.epochs - start

    def _orders(self, count: int, first: int, end: int) -> Tensor:
        """The orders (epochs, count) of the head epochs from ``first`` on, of as many as one call of a kernel takes."""
        epochs = range(first, min(first + EPOCHS_A_CALL, end))
        return torch.stack([epoch_order(count, self.seed, HEAD_ORDERS, epoch) for epoch in epochs])

    def fit_on(self, samples: Samples, features_of: Callable[[Inputs], Tensor], one_draw: bool = False) -> int:
        """Train on the features (n, D) that a frozen network gives of the samples; epochs it took.

        They are computed once. Where the samples are augmented at random, they are computed anew in every epoch,
        unless all epochs of this fit are to learn from ``one_draw``.
        """
        if not isinstance(samples.x, Stream) or not samples.augments:
            return self.fit(features_of(samples.x), samples.b)
        if one_draw:
            drawn = samples.in_order(epoch_order(len(samples.y), self.seed, HEAD_ORDERS, self.epochs))
            return self.fit(features_of(drawn.x), drawn.b)
        plateau, start = self._no_plateau(), self.epochs
        in_turn = torch.arange(len(samples.y), device="cpu").unsqueeze(0)
        while not self._is_done(plateau, start):
            order = epoch_order(len(samples.y), self.seed, HEAD_ORDERS, self.epochs)
            features = features_of(samples.x.in_order(order))
            self._run_epochs(features, samples.b[order.to(samples.b.device)], in_turn, plateau)
        return self.epochs - start

    def _is_done(self, plateau: Tensor, start: int) -> bool:
        return bool(plateau[2]) or self.epochs - start >= self._most_epochs

    @property
    def _most_epochs(self) -> int:
        return MAX_EPOCHS if self.epochs_a_fit is None else self.epochs_a_fit

    def _run_epochs(self, features: Tensor, labels: Tensor, rows: Tensor, plateau: Tensor) -> None:
        """One epoch for each row of orders (epochs, n), as far as the plateau."""
        self._take_in(self._fit(features, labels, rows.to(features.device), plateau, self.batch_size))

    def _take_in(self, losses: Tensor) -> None:
        """Count the epochs that were run: those with a loss."""
        self.epochs += int(losses.isfinite().sum())
        if not losses[0].isfinite() or not self.weight.isfinite().all():
            raise FloatingPointError(f"a private head's loss is no longer finite, by its epoch {self.epochs}")

    def _no_plateau(self) -> Tensor:
        plateau = torch.zeros(3, dtype=torch.float64, device=self.weight.device)
        plateau[:1].fill_(math.inf)  # on the device: a copy from the host would end a CUDA graph's capture
        return plateau

    def _fit(self, features: Tensor, labels: Tensor, rows: Tensor, plateau: Tensor, batch_size: int) -> Tensor:
        return ops.fit_linear_head_(
            self.weight,
            self.bias,
            self.weight_momentum,
            self.bias_momentum,
            plateau,
            features,
            labels,
            rows,
            batch_size,
            LR,
            MOMENTUM,
            WEIGHT_DECAY,
            PLATEAU_THRESHOLD,
            PLATEAU_PATIENCE if self.epochs_a_fit is None else self.epochs_a_fit,
        )
