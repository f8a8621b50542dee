"""What a data set is once it is loaded: plain tensors, and four sets of them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Samples(NamedTuple):
    """Inputs with their targets and biases, one row per sample."""

    x: Tensor  # float32 (n, channels, height, width)
    y: Tensor  # int64 (n,), the target label
    b: Tensor  # int64 (n, num_biases), the label of every bias

    def to(self, device: torch.device | str) -> "Samples":
        """The same samples on ``device``; nothing is copied where they already are there."""
        return Samples(*(tensor.to(device) for tensor in self))


@dataclass(frozen=True)
class Splits:
    """The biased set that the vanilla network learns from, and the three unbiased ones."""

    vanilla: Samples
    train: Samples
    val: Samples
    test: Samples


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
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        expected = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be a whole number {expected}, got {value!r}")
    return value


def check_probability(name: str, value: float | None, default: float) -> float:
    """The option's value, or ``default`` for None; ``ValueError`` unless it lies in [0, 1]."""
    if value is None:
        return default
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:  # a NaN fails the comparison
        raise ValueError(f"{name} must be a probability from 0 to 1, got {value!r}")
    return float(value)
