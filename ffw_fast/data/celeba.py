"""CelebA: is the hair blond? In the training images, the answer is nearly always no where the face is a man's."""

import csv
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ffw_fast.data.image_cache import cache_folder
from ffw_fast.data.image_files import ImageFiles
from ffw_fast.data.pixels import Pixels
from ffw_fast.data.samples import Samples, Splits, check_count
from ffw_fast.seeding import random_order

TARGET, BIAS = "Blond_Hair", "Male"
SIDE = 224  # pixels
SMALLEST_SIDE = 32
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
TRAIN, VALID, TEST = 0, 1, 2  # as list_eval_partition numbers them
WHERE_TO_GET = (
    "CelebA is DIR/celeba/list_attr_celeba.txt, DIR/celeba/list_eval_partition.txt (or both as .csv) and "
    "DIR/celeba/img_align_celeba/000001.jpg and so on, where DIR is named as data_dir (--data-dir); its publishers' "
    "page is https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html (aligned and cropped images)"
)


class _Listing(NamedTuple):
    """What the two lists say of every image."""

    names: list[str]
    y: Tensor  # int64 (n,), 1 for the target attribute
    b: Tensor  # int64 (n,), 1 for images without the bias attribute, so that blond women are aligned
    part: Tensor  # int64 (n,), 0 train, 1 valid, 2 test

    def of(self, rows: Tensor) -> "_Listing":
        return _Listing([self.names[row] for row in rows.tolist()], self.y[rows], self.b[rows], self.part[rows])


def celeba(
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    *,
    image_size: int | None = None,
    train_size: int | None = None,
    cache_dir: str | None = None,
) -> Splits:
    """CelebA with the target ``Blond_Hair`` and one bias, 1 - ``Male``, normalised by ImageNet's mean and deviation.

    =========== =====================================================================
    set         images
    =========== =====================================================================
    vanilla     CelebA's training split, 162770 images
    train / val its validation split, the four groups of target and bias cut to equal
                size (728 images), 60% and 40% of them (437 and 291)
    test        its test split, cut likewise
    =========== =====================================================================

    (Table 8 of the FFW paper.) Images are resized to 224x224 and kept as bytes: in memory, or where they do not fit in
    a file that is made once and mapped.

    Args:
        data_dir: folder that holds ``celeba/`` in its publishers' layout.
        seed: which images of a group are taken, and in which order; of the vanilla set, which are taken.
        image_size: height and width in pixels, from 32 to 224.
        train_size: images of the vanilla set, taken at random; by default all.
        cache_dir: folder for decoded images that do not fit into memory; by default ``ffw_fast-cache`` beside them.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: a list or an image is missing or not what it should be; of
            the vanilla set, an image that is none when it is first read.
        ImportError: Pillow is not installed.
    """
    side = check_count("image_size", image_size, SIDE, SMALLEST_SIDE, SIDE)
    if data_dir is None:
        raise ValueError(f"CelebA does not come with the package: {WHERE_TO_GET}")
    folder = Path(data_dir) / "celeba"
    listing = _read_listing(folder)
    rows = {part: (listing.part == part).nonzero().flatten() for part in (TRAIN, VALID, TEST)}
    vanilla = _shuffled(rows[TRAIN], seed, "CelebA training images")
    size = check_count("train_size", train_size, len(vanilla), most=len(vanilla))
    vanilla = vanilla[:size].sort().values  # as they are listed, so that all seeds share one file of decoded images
    unbiased = _balanced(listing, rows[VALID], seed, "valid")
    cut = round(0.6 * len(unbiased))
    cache = cache_folder(cache_dir, folder)

    def listed(chosen: Tensor) -> Samples:
        part = listing.of(chosen)
        paths = [folder / "img_align_celeba" / name for name in part.names]
        return Samples(Pixels(ImageFiles(paths, side, cache), MEAN, DEVIATION), part.y, part.b.unsqueeze(1))

    test = _balanced(listing, rows[TEST], seed, "test")
    return Splits(listed(vanilla), listed(unbiased[:cut]), listed(unbiased[cut:]), listed(test))


def _shuffled(rows: Tensor, seed: int, purpose: str) -> Tensor:
    return rows[random_order(len(rows), seed, purpose)]


def _balanced(listing: _Listing, rows: Tensor, seed: int, split: str) -> Tensor:
    """As many rows of each of the four groups as the smallest one has, in random order."""
    shuffled = _shuffled(rows, seed, f"CelebA {split} images")
    groups = 2 * listing.y[shuffled] + listing.b[shuffled]
    sizes = torch.bincount(groups, minlength=4)
    if (least := int(sizes.min())) == 0:
        raise ValueError(
            f"CelebA's {split} split has no image of some group of {TARGET} and {BIAS}; sizes: {sizes.tolist()}"
        )
    chosen = torch.cat([shuffled[groups == group][:least] for group in range(4)])
    return _shuffled(chosen, seed, f"CelebA balanced {split} images")


def _read_listing(folder: Path) -> _Listing:
    attributes = _read_table(folder, "list_attr_celeba")
    partition = _read_table(folder, "list_eval_partition")
    for name in (TARGET, BIAS):
        if name not in attributes.columns:
            known = ", ".join(attributes.columns[:5])
            raise ValueError(f"{attributes.path} has no attribute {name}; it has {known} ...; {WHERE_TO_GET}")
    if attributes.rows.keys() != partition.rows.keys():
        raise ValueError(
            f"{attributes.path} and {partition.path} list other images: {len(attributes.rows)} and "
            f"{len(partition.rows)}, for instance {min(attributes.rows.keys() ^ partition.rows.keys())}"
        )
    names = sorted(attributes.rows)
    at = {name: attributes.columns.index(name) for name in (TARGET, BIAS)}
    y = torch.tensor([attributes.rows[name][at[TARGET]] == 1 for name in names]).long()
    b = torch.tensor([attributes.rows[name][at[BIAS]] != 1 for name in names]).long()
    part = torch.tensor([partition.rows[name][0] for name in names])
    if not ((part >= TRAIN) & (part <= TEST)).all():
        raise ValueError(f"{partition.path} must number splits 0, 1 and 2, found {part.unique().tolist()}")
    return _Listing(names, y, b, part)


class _TableFile(NamedTuple):
    path: Path
    columns: list[str]
    rows: dict[str, list[int]]


def _read_table(folder: Path, name: str) -> _TableFile:
    """A list of images with whole numbers, in the form of its publishers (.txt) or as .csv."""
    path = next((found for suffix in (".txt", ".csv") if (found := folder / (name + suffix)).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder}: found no {name}.txt or {name}.csv; {WHERE_TO_GET}")
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = list(csv.reader(file)) if path.suffix == ".csv" else [line.split() for line in file]
    lines = [line for line in lines if line]
    announced, columns = None, ["partition"]
    if path.suffix == ".csv":
        columns, lines = lines[0][1:] if lines else [], lines[1:]
    elif lines and len(lines[0]) == 1:  # the number of images, and the names of the attributes
        announced, columns, lines = lines[0][0], lines[1] if len(lines) > 1 else [], lines[2:]
    rows: dict[str, list[int]] = {}
    for number, line in enumerate(lines, start=1):
        if line[0] in rows:
            raise ValueError(f"{path}: row {number} of the images lists {line[0]} again")
        try:
            rows[line[0]] = [int(value) for value in line[1:]]
        except ValueError as error:
            raise ValueError(f"{path}: row {number} of the images holds no whole numbers: {error}") from error
        if len(line) != 1 + len(columns):
            raise ValueError(f"{path}: row {number} of the images has {len(line) - 1} values, expected {len(columns)}")
    if not rows or not columns:
        raise ValueError(f"{path} lists no images, or names alone; {WHERE_TO_GET}")
    if announced not in (None, str(len(rows))):
        raise ValueError(f"{path} announces {announced} images and lists {len(rows)}")
    return _TableFile(path, columns, rows)
