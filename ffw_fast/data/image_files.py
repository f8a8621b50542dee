"""Image files decoded in parallel to bytes: in memory where they fit, else once into a file that is mapped."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffw_fast.data.image_cache import mapped_images
from ffw_fast.data.memory import memory_budget

CHUNK = 64  # images that a thread decodes at a time


class ImageFiles:
    """RGB images of files as uint8 (n, 3, side, side), decoded when they are first read: a set may not be needed.

    Images of another size are resized, with bilinear interpolation as torchvision's ``Resize`` does it.

    Args:
        cache_dir: where the file lies that decoded images are mapped from, if they do not fit into memory.

    Raises:
        ImportError: Pillow is not installed.
        FileNotFoundError: an image is missing; its path.
    """

    def __init__(self, paths: Sequence[Path], side: int, cache_dir: Path) -> None:
        _pillow()
        _check_presence(paths)
        self.shape = torch.Size((len(paths), 3, side, side))
        self._paths = paths
        self._cache_dir = cache_dir

    @cached_property
    def decoded(self) -> tuple[Tensor, bool]:
        """All images, and whether they are mapped from a file.

        Raises:
            ValueError: an image is truncated or no image; its path.
            OSError: there is no room in memory, and the cache cannot be written.
        """
        if self.shape.numel() > memory_budget():
            return mapped_images(self._paths, self.shape, self._cache_dir, decode_into), True
        images = torch.empty(self.shape, dtype=torch.uint8)
        decode_into(images, self._paths)
        return images, False

    def few(self, rows: Tensor) -> Tensor:
        """The images of these rows, without decoding the others."""
        if "decoded" in vars(self):
            return self.decoded[0][rows]
        images = torch.empty((len(rows), *self.shape[1:]), dtype=torch.uint8)
        decode_into(images, [self._paths[row] for row in rows.tolist()])
        return images


def decode_into(images: Tensor, paths: Sequence[Path]) -> None:
    """Decode image files into uint8 (n, 3, side, side), resized where they are larger or smaller, on all cores."""

    def decode_chunk(start: int) -> None:
        for index in range(start, min(start + CHUNK, len(paths))):
            images[index] = _decode(paths[index], images.shape[-1])

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow lets go of the interpreter while it decodes
        for _ in pool.map(decode_chunk, range(0, len(paths), CHUNK)):
            pass


def _decode(path: Path, side: int) -> Tensor:
    image_module = _pillow()
    try:
        with image_module.open(path) as file:
            mode, image = file.mode, file.convert("RGB")
    # Pillow's, for whatever a file may hold
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
        raise ValueError(f"{path} is no image or is truncated: {error}") from error
    if mode[0] in "IF":  # 16 or 32 bits, of which Pillow makes white wherever they exceed 255
        raise ValueError(f"{path} has pixels of more than 8 bits ({mode}); convert it first")
    if image.size != (side, side):
        image = image.resize((side, side), image_module.Resampling.BILINEAR)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(side, side, 3).permute(2, 0, 1)


def _check_presence(paths: Sequence[Path]) -> None:
    """One look into every folder instead of one for every file."""
    if not paths:
        raise ValueError("there are no images to load")
    names: dict[Path, set[str]] = {}
    for folder in {path.parent for path in paths}:
        names[folder] = set(os.listdir(folder)) if folder.is_dir() else set()
    missing = [path for path in paths if path.name not in names[path.parent]]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(paths)} images are missing, the first is {missing[0]}")


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("images are decoded by Pillow: pip install 'ffw_fast[images]'") from error
    return Image
