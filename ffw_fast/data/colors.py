"""Colours as biases: samples draw their label's colour too often, and are painted with it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ffw_fast.data.digits import SIDE, Digits
from ffw_fast.data.memory import describe_bytes, memory_budget
from ffw_fast.data.samples import Samples, Splits, check_count
from ffw_fast.seeding import seeded_generator

NUM_COLORS = 10
UNBIASED = 1 / NUM_COLORS  # the correlation at which every colour is equally likely for every label

# Biased-MNIST's colours by label, red, green and blue from 0 to 255.
PALETTE = torch.tensor(
    [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (225, 225, 0),
        (225, 0, 225),
        (0, 255, 255),
        (255, 128, 0),
        (255, 0, 128),
        (128, 0, 255),
        (128, 128, 128),
    ],
    dtype=torch.uint8,
    device="cpu",
)


def draw_colors(labels: Tensor, rho: float, generator: torch.Generator) -> Tensor:
    """A colour for every label, both int64 (n,).

    It is the label's own with probability ``rho``, else one of the nine others, uniformly.
    """
    conflicting = torch.rand(labels.shape, generator=generator, device="cpu") >= rho
    distance = torch.randint(1, NUM_COLORS, labels.shape, generator=generator, device="cpu")
    return (labels + conflicting * distance) % NUM_COLORS


def find_foreground(images: Tensor, side: int = SIDE) -> Tensor:
    """Where a digit is: from grey uint8 (n, 28, 28) to bool (n, side, side).

    Every pixel above 0 belongs to the digit, as in Biased-MNIST. A pixel of a smaller image does where
    the digit covers at least half of it: any coverage at all would fatten strokes until their holes close.
    """
    ink = images > 0
    if side == SIDE:
        return ink
    return F.adaptive_avg_pool2d(ink.float().unsqueeze(1), side).squeeze(1) >= 0.5


def paint(foreground: Tensor, colors: Tensor, palette: Tensor, white: float) -> Tensor:
    """Paints digits white on stripes of colour.

    Args:
        foreground: bool (n, h, w), where the digits are.
        colors: int64 (n, stripes), the colours from left to right; all stripes have the same width.
        palette: float32 (10, 3), the colours in the images' own units.
        white: the value of a white pixel in these units.

    Returns:
        float32 (n, 3, h, w).
    """
    n, height, width = foreground.shape
    stripes = colors.shape[1]
    digit = foreground.view(n, 1, height, stripes, width // stripes)
    background = palette[colors].transpose(1, 2).contiguous().view(n, 3, 1, stripes, 1)
    return torch.where(digit, white, background).view(n, 3, height, width).contiguous()


@dataclass(frozen=True)
class Coloring:
    """How a data set paints digits: everything but the correlation of label and colour."""

    palette: Tensor  # float32 (10, 3)
    white: float
    side: int = SIDE

    def __call__(self, digits: Digits, size: int, rhos: Sequence[float], generator: torch.Generator) -> Samples:
        """``size`` coloured samples, with one independent bias, a stripe of background, for each of ``rhos``.

        The digits are gone through in order, again and again until there are enough samples, and draw new
        colours each time. So a set has as many different digits as its size allows.

        Raises:
            ValueError: more samples than memory has room for.
        """
        needed, budget = size * self.palette[0].nbytes * self.side**2, memory_budget()
        if needed > budget:
            raise ValueError(
                f"{size} samples of {self.side} x {self.side} pixels take {describe_bytes(needed)}, and there is room "
                f"for {describe_bytes(budget)}: ask for fewer (train_size, unbiased_size)"
            )
        which = torch.arange(size, device="cpu") % len(digits)
        labels = digits.labels[which]
        colors = torch.stack([draw_colors(labels, rho, generator) for rho in rhos], dim=1)
        foreground = find_foreground(digits.images[:size], self.side)
        return Samples(paint(foreground[which], colors, self.palette, self.white), labels, colors)


class SplitDigits(NamedTuple):
    """The digits of each set before they are coloured."""

    vanilla: Digits
    train: Digits
    val: Digits
    test: Digits


@dataclass(frozen=True)
class Sizes:
    """How many samples each set gets; None takes the default of the data set.

    The unbiased validation and test sets always have their default size, so that results stay comparable.
    """

    vanilla_copies: int  # how often each digit is coloured anew
    unbiased_copies: int
    train_size: int | None = None  # samples that the vanilla network learns from
    unbiased_size: int | None = None  # samples of the unbiased training set
    unbiased_digits: int | None = None  # different digits among them


def color_splits(digits: SplitDigits, sizes: Sizes, coloring: Coloring, rhos: Sequence[float], *, seed: int) -> Splits:
    """The vanilla set with the given correlations, and the unbiased sets with colours drawn uniformly.

    Where a size or ``unbiased_digits`` leaves some of the training set out, all of it stays the pool that leakage is
    measured with.
    """

    def colored(name: str, digits: Digits, size: int, rhos: Sequence[float]) -> Samples:
        return coloring(digits, size, rhos, seeded_generator(seed, f"{name} colors"))

    def colored_unbiased(name: str, digits: Digits, size: int) -> Samples:
        return colored(name, digits, size, [UNBIASED] * len(rhos))

    vanilla_size = check_count("train_size", sizes.train_size, len(digits.vanilla) * sizes.vanilla_copies)
    available = len(digits.train)
    distinct = check_count("unbiased_digits", sizes.unbiased_digits, available, most=available)
    train_size = check_count("unbiased_size", sizes.unbiased_size, distinct * sizes.unbiased_copies)
    whole = available * sizes.unbiased_copies
    pool = colored_unbiased("pool", digits.train, whole) if distinct < available or train_size < whole else None
    return Splits(
        colored("vanilla", digits.vanilla, vanilla_size, rhos),
        colored_unbiased("train", digits.train[:distinct], train_size),
        colored_unbiased("val", digits.val, len(digits.val) * sizes.unbiased_copies),
        colored_unbiased("test", digits.test, len(digits.test) * sizes.unbiased_copies),
        pool,
        correlations=tuple(rhos),
    )
