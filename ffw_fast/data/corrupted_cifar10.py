"""Corrupted CIFAR-10: in the training images, the kind of corruption nearly always gives the class away."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ffw_fast.checks import is_number
from ffw_fast.data.image_cache import cache_folder
from ffw_fast.data.image_files import ImageFiles
from ffw_fast.data.pixels import Pixels
from ffw_fast.data.samples import Samples, Splits, check_count, part_of, split_60_20_20
from ffw_fast.seeding import random_order

SIDE = 32  # pixels
NUM_CLASSES = 10  # of images and of corruptions
PERCENT = 1.0  # of conflicting images; published with 0.5, 1, 2 and 5
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
WHERE_TO_GET = (
    "Corrupted CIFAR-10 is DIR/cifar10c/PERCENTpct/{align,conflict}/LABEL/INDEX_LABEL_BIAS.png and "
    "DIR/cifar10c/test/LABEL/INDEX_LABEL_BIAS.png, where DIR is named as data_dir (--data-dir); its page is "
    "https://github.com/kakaoenterprise/Learning-Debiased-Disentangled"
)


def corrupted_cifar10(
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    *,
    percent: float | None = None,
    train_size: int | None = None,
    unbiased_size: int | None = None,
    cache_dir: str | None = None,
) -> Splits:
    """Corrupted CIFAR-10, 32x32, normalised by CIFAR's mean and deviation, with one bias, the kind of corruption.

    ==================== =======================================================
    set                  images
    ==================== =======================================================
    vanilla              all of ``PERCENTpct/align`` and ``PERCENTpct/conflict``
    train / val / test   60 / 20 / 20 percent of ``test``: 6000 / 2000 / 2000
    ==================== =======================================================

    (Table 8 of the FFW paper.)

    Args:
        data_dir: folder that holds ``cifar10c/`` in its publishers' layout.
        seed: of the order of the images, and so of the split.
        percent: of conflicting images among the vanilla ones.
        train_size: images of the vanilla set, taken at random.
        unbiased_size: images of the unbiased training set.
        cache_dir: folder for decoded images that do not fit into memory; by default ``ffw_fast-cache`` beside them.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: a folder or an image is missing or not what it should be; of
            the vanilla set, an image that is none when it is first read.
        ImportError: Pillow is not installed.
    """
    if data_dir is None:
        raise ValueError(f"Corrupted CIFAR-10 does not come with the package: {WHERE_TO_GET}")
    folder = Path(data_dir) / "cifar10c"
    biased = _percent_folder(folder, PERCENT if percent is None else percent)
    vanilla = _shuffled(_find(biased / "align") + _find(biased / "conflict"), seed, "Corrupted CIFAR-10 vanilla")
    unbiased = _shuffled(_find(folder / "test"), seed, "Corrupted CIFAR-10 test")
    parts = [unbiased[part] for part in split_60_20_20(len(unbiased))]
    vanilla = vanilla[: check_count("train_size", train_size, len(vanilla), most=len(vanilla))]
    first = slice(check_count("unbiased_size", unbiased_size, len(parts[0]), most=len(parts[0])))
    cache = cache_folder(cache_dir, folder)
    biased_set, pool, val, test = (_listed(paths, cache) for paths in (vanilla, *parts))
    train = Samples(part_of(pool.x, first), pool.y[first], pool.b[first])
    return Splits(biased_set, train, val, test, pool)


def _percent_folder(folder: Path, percent: float) -> Path:
    if not is_number(percent) or not 0 < percent < 100:
        raise ValueError(f"percent must lie between 0 and 100, got {percent!r}")
    found = folder / f"{percent:g}pct"
    if not found.is_dir():
        known = sorted(path.name.removesuffix("pct") for path in folder.glob("*pct"))
        raise FileNotFoundError(
            f"{found}: no such folder; percents that are there: {', '.join(known) or 'none'}; {WHERE_TO_GET}"
        )
    return found


def _find(folder: Path) -> list[Path]:
    """All images below the folder, by name."""
    paths = sorted(folder.glob("*/*.png"))
    if not paths:
        raise FileNotFoundError(f"{folder}: found no LABEL/INDEX_LABEL_BIAS.png; {WHERE_TO_GET}")
    return paths


def _shuffled(paths: list[Path], seed: int, purpose: str) -> list[Path]:
    return [paths[row] for row in random_order(len(paths), seed, purpose).tolist()]


def _listed(paths: Sequence[Path], cache: Path) -> Samples:
    labels = torch.tensor([_labels(path) for path in paths])
    return Samples(Pixels(ImageFiles(paths, SIDE, cache), MEAN, DEVIATION), labels[:, 0], labels[:, 1:])


def _labels(path: Path) -> tuple[int, int]:
    """Target and bias of ``LABEL/INDEX_LABEL_BIAS.png``."""
    parts = path.stem.split("_")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts[1:]):
        raise ValueError(f"{path}: the name is not of the form INDEX_LABEL_BIAS.png")
    label, bias = int(parts[1]), int(parts[2])
    if path.parent.name != str(label) or max(label, bias) >= NUM_CLASSES:
        raise ValueError(
            f"{path}: expected a label that is the folder's name, and label and bias from 0 to {NUM_CLASSES - 1}"
        )
    return label, bias
