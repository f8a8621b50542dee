"""Biased-MNIST: the colour of the background agrees with the digit far too often."""

import os

from ffw_fast.checks import check_probability
from ffw_fast.data.colors import PALETTE, Coloring, Sizes, SplitDigits, color_splits
from ffw_fast.data.digits import SIDE, DigitPools, load_digits
from ffw_fast.data.samples import Splits, check_count, split_60_20_20

SMALLEST_SIDE = 7  # pixels; digits are no longer legible below


def biased_mnist(
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    *,
    rho: float | None = None,
    image_size: int | None = None,
    train_size: int | None = None,
    unbiased_size: int | None = None,
    unbiased_digits: int | None = None,
) -> Splits:
    """Biased-MNIST with pixels in [-1, 1] and one bias, the colour of the background.

    =========== ===================================== ============================================
    set         full MNIST (``data_dir``)             shipped digits
    =========== ===================================== ============================================
    vanilla     60000 training images, rho 0.99       4000 digits coloured 3 times, rho 0.95
    train / val the 60000 recoloured: 36000 / 12000   600 / 200 other digits coloured 5 times
    test        the 10000 test images                 200 further digits coloured 5 times
    =========== ===================================== ============================================

    (Tables 7 and 8 of the FFW paper.) The unbiased sets have rho 0.1, that is, every colour is equally
    likely for every digit. With full MNIST the vanilla network sees the digits of train and val too, in
    other colours, as published.

    Args:
        data_dir: folder with the IDX files of MNIST; None for the shipped digits.
        seed: of the order of the digits and of all colours.
        rho: probability that a sample of the vanilla set has its label's colour.
        image_size: height and width in pixels, from 7 to 28.
        train_size: samples of the vanilla set.
        unbiased_size: samples of the unbiased training set.
        unbiased_digits: different digits among them.
    """
    side = check_count("image_size", image_size, SIDE, SMALLEST_SIDE, SIDE)
    pools = load_digits(data_dir, seed=seed)
    if rho is None:
        rho = 0.99 if pools.full else 0.95
    check_probability("rho", rho)
    copies = (1, 1) if pools.full else (3, 5)
    sizes = Sizes(*copies, train_size, unbiased_size, unbiased_digits)
    palette = (PALETTE.float() / 255 - 0.5) / 0.5
    return color_splits(_split(pools), sizes, Coloring(palette, 1.0, side), [rho], seed=seed)


def _split(pools: DigitPools) -> SplitDigits:
    unbiased = pools.train if pools.full else pools.test
    train, val, test = split_60_20_20(len(unbiased))
    return SplitDigits(
        vanilla=pools.train,
        train=unbiased[train],
        val=unbiased[val],
        test=pools.test if pools.full else unbiased[test],
    )
