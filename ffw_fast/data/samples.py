"""What a data set is once it is loaded: inputs with their labels, and four sets of them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ffw_fast.checks import check_integer
from ffw_fast.data.pixels import Pixels
from ffw_fast.data.stream import Fingerprint, Stream

EVALUATION_BATCH = 500  # samples a forward pass without gradients

Inputs: TypeAlias = Tensor | Pixels | Stream  # all give float tensors when indexed by rows or split


class Samples(NamedTuple):
    """Inputs with their targets and biases, one row per sample."""

    x: Inputs  # float (n, ...): a tensor, images kept as bytes, or what is read anew each time
    y: Tensor  # int64 (n,), the target label
    b: Tensor  # int64 (n, num_biases), the label of every bias

    def to(self, device: torch.device | str) -> "Samples":
        """The same samples on ``device``; nothing is copied where they already are there."""
        return Samples(self.x.to(device), self.y.to(device), self.b.to(device))

    @property
    def augments(self) -> bool:
        """Whether an input may change from one reading to the next, so that nothing made of it may be cached."""
        return isinstance(self.x, Stream) and self.x.augments

    @property
    def are_at_hand(self) -> bool:
        """Whether rows are read by operators alone, from memory on the samples' device."""
        return isinstance(self.x, Tensor) or (isinstance(self.x, Pixels) and not self.x.mapped)

    def at(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The minibatch (x, y, b) of these rows, which are on the samples' device."""
        x = self.x.index_select(0, rows) if isinstance(self.x, Tensor) else self.x[rows]  # x[rows] copies by numbers
        return x, self.y.index_select(0, rows), self.b.index_select(0, rows)

    def in_order(self, order: Tensor) -> "Samples":
        """The samples of these rows, in their order."""
        rows = order.to(self.y.device)
        x = self.x.in_order(order) if isinstance(self.x, Stream) else self.x[rows]
        return Samples(x, self.y[rows], self.b[rows])

    def batches(self, order: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Minibatches (x, y, b) of ``size`` samples in the given order of rows; the short last one is kept."""
        parts = order.to(self.y.device).split(size)
        if not isinstance(self.x, Stream):
            yield from (self.at(rows) for rows in parts)
            return
        inputs = self.x.in_order(order).split(len(parts[0]))  # its workers read ahead, as they know the whole order
        for x, rows in zip(inputs, parts, strict=True):
            yield x, self.y.index_select(0, rows), self.b.index_select(0, rows)

    def identity(self) -> tuple[Tensor, ...]:
        """Tensors that tell this set from others, as far as that can be told without reading inputs again.

        They are the same whether a set was kept or streamed, which may depend on how much memory others leave.
        """
        if isinstance(self.x, Pixels):
            return self.x.images, self.x.mean, self.x.deviation, self.y, self.b
        read = self.x.fingerprint if isinstance(self.x, Stream) else Fingerprint(self.x).value()
        return read, torch.tensor(self.x.shape, device="cpu"), self.y, self.b


def batches_of(x: Inputs, size: int) -> Iterator[Tensor]:
    """Batches of one pass over the inputs, each in memory of its own: a network may overwrite what it is given."""
    batches = x.split(size)
    yield from (batch.clone() for batch in batches) if isinstance(x, Tensor) else batches


def part_of(x: Inputs, rows: slice) -> Inputs:
    """These rows of the inputs, kept or streamed as all of them are."""
    if isinstance(x, Stream):
        return x.in_order(torch.arange(len(x), device="cpu")[rows])
    if isinstance(x, Pixels):
        return Pixels(x.images[rows], x.mean, x.deviation, mapped=x.mapped, dtype=x.dtype, device=x.device)
    return x[rows]


@dataclass(frozen=True)
class Splits:
    """The biased set that the vanilla network learns from, None where it is trained already, and the unbiased ones.

    Attributes:
        pool: all unbiased samples that heads may be fitted on to measure leakage, None where ``train`` is all of them:
            heads fitted on few samples read less than is there.
    """

    vanilla: Samples | None
    train: Samples
    val: Samples
    test: Samples
    pool: Samples | None = None
    # Of each bias and the target in the biased set, where it is known.
    correlations: tuple[float, ...] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Decode what every run reads, to find a damaged image before any work; not the set of a trained network."""
        for samples in (self.train, self.val, self.test):
            if isinstance(samples.x, Pixels):
                samples.x.decode()

    @property
    def for_heads(self) -> Samples:
        """What the heads that measure leakage are fitted on."""
        return self.train if self.pool is None else self.pool


def split_60_20_20(count: int) -> tuple[slice, slice, slice]:
    """Training, validation and test as ranges of ``count`` samples in random order: 60, 20 and 20 percent."""
    if count < 5:
        raise ValueError(f"{count} samples cannot be split 60/20/20; at least 5 are needed")
    train, val = round(0.6 * count), round(0.2 * count)
    return slice(0, train), slice(train, train + val), slice(train + val, count)


def check_count(name: str, value: int | None, default: int, least: int = 1, most: int | None = None) -> int:
    """The option's value, or ``default`` for None; ``ValueError`` unless it is whole and in the range."""
    if value is None:
        return default
    check_integer(name, value, least, most)
    return value
