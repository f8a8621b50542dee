"""Multi-Color MNIST: the left and the right half of the background have colours that give the digit away."""

import os

from ffw_fast.data.colors import PALETTE, Coloring, Sizes, SplitDigits, color_splits
from ffw_fast.data.digits import load_digits
from ffw_fast.data.samples import Splits, split_60_20_20

RHOS = (0.99, 0.95)  # left, right: 1% and 5% of the vanilla samples conflict with their label


def multi_color_mnist(
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    *,
    train_size: int | None = None,
    unbiased_size: int | None = None,
    unbiased_digits: int | None = None,
    second_division: bool | None = None,
) -> Splits:
    """Multi-Color MNIST with pixels in [0, 1] and two independent biases, the left and the right colour.

    ==================== ================================= ======================================
    set                  full MNIST (``data_dir``)         shipped digits
    ==================== ================================= ======================================
    vanilla              60000 training images             4000 digits coloured 8 times
    train / val / test   6000 / 2000 / 2000 test images    600 / 200 / 200 others coloured 10 times
    ==================== ================================= ======================================

    (Table 8 of the FFW paper.) The left colour of the vanilla set conflicts with the label in 1% of the
    samples and the right one in 5%. In the unbiased sets both do in 90%, that is, every colour is equally
    likely for every digit.

    Args:
        data_dir: folder with the IDX files of MNIST; None for the shipped digits.
        seed: of the order of the digits and of all colours.
        train_size: samples of the vanilla set.
        unbiased_size: samples of the unbiased training set.
        unbiased_digits: different digits among them.
        second_division: divide pixels in [0, 1] by 255 once more, as the published network does; by default
            only with full MNIST. On the shipped digits a network learns only colours from inputs so small.
    """
    if second_division not in (None, False, True):
        raise ValueError(f"second_division must be True, False or None, got {second_division!r}")
    pools = load_digits(data_dir, seed=seed)
    divide_again = pools.full if second_division is None else second_division
    white = 1 / 255 if divide_again else 1.0
    palette = PALETTE.float() / 255 * white
    copies = (1, 1) if pools.full else (8, 10)
    sizes = Sizes(*copies, train_size, unbiased_size, unbiased_digits)
    digits = SplitDigits(pools.train, *(pools.test[part] for part in split_60_20_20(len(pools.test))))
    return color_splits(digits, sizes, Coloring(palette, white), RHOS, seed=seed)
