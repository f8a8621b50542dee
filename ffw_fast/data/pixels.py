"""Images in memory as bytes, normalised whenever a minibatch of them is read: a quarter of the memory of floats."""

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from ffw_fast.data.image_files import ImageFiles


class Pixels:
    """Images that stand where a float tensor (n, channels, height, width) would: indexed by rows, split, moved.

    What is read is ``(pixel / 255 - mean) / deviation``, channel by channel.

    Args:
        images: uint8 (n, channels, height, width), or files that are decoded when a row is first read.
        mapped: whether the tensor given is mapped from a file.

    Attributes:
        mean, deviation: float32 (channels,), of pixels in [0, 1].
        dtype: of what is read.
        device: of what is read; the images are there too, unless they are mapped from a file.
    """

    def __init__(
        self,
        images: Tensor | ImageFiles,
        mean: Sequence[float] | Tensor,
        deviation: Sequence[float] | Tensor,
        *,
        mapped: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if isinstance(images, Tensor) and (images.dtype != torch.uint8 or images.dim() != 4):
            raise TypeError(f"images must be uint8 (n, channels, h, w), got {images.dtype} {tuple(images.shape)}")
        self.mean, self.deviation = (torch.as_tensor(part, dtype=torch.float32) for part in (mean, deviation))
        if not len(self.mean) == len(self.deviation) == images.shape[1] or not (self.deviation > 0).all():
            raise ValueError(f"expected a mean and a positive deviation for each of {images.shape[1]} channels")
        self._files = images if isinstance(images, ImageFiles) else None
        lies = images.device if isinstance(images, Tensor) else "cpu"
        self.device = torch.device(lies if device is None else device)
        if isinstance(images, Tensor):
            self._read = self._placed(images, mapped)
        self.shape, self.dtype = images.shape, dtype
        self._scale = (1 / (255 * self.deviation)).to(self.device, dtype).view(-1, 1, 1)
        self._shift = (-self.mean / self.deviation).to(self.device, dtype).view(-1, 1, 1)

    def _placed(self, images: Tensor, mapped: bool) -> tuple[Tensor, bool]:
        return (images if mapped else images.to(self.device)), mapped

    @cached_property
    def _read(self) -> tuple[Tensor, bool]:
        assert self._files is not None
        return self._placed(*self._files.decoded)

    @property
    def images(self) -> Tensor:
        """uint8 (n, channels, height, width), in memory or mapped from a file."""
        return self._read[0]

    @property
    def mapped(self) -> bool:
        return self._read[1]

    def __len__(self) -> int:
        return self.shape[0]

    def decode(self) -> None:
        """Read all images from their files, unless they were."""
        self._read  # noqa: B018

    def few(self, rows: Tensor) -> Tensor:
        """The bytes of a few rows; of files that were not read yet no others are decoded."""
        return self.images[rows] if self._files is None else self._files.few(rows)

    def raw(self, rows: Tensor | slice) -> Tensor:
        """The images of these rows as bytes, on the device."""
        if isinstance(rows, Tensor):
            return self.images.index_select(0, rows.to(self.images.device)).to(self.device)
        return self.images[rows].to(self.device)

    def normalised(self, images: Tensor) -> Tensor:
        """Bytes as the network reads them."""
        return images.to(self.dtype).mul_(self._scale).add_(self._shift)

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        return self.normalised(self.raw(rows))

    def split(self, size: int) -> Iterator[Tensor]:
        """All images in their order, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def to(self, where: torch.device | torch.dtype | str) -> "Pixels":
        """The same images, read in another dtype or on another device; mapped ones stay in their file."""
        dtype, device = (where, self.device) if isinstance(where, torch.dtype) else (self.dtype, where)
        if self._files is not None:
            return Pixels(self._files, self.mean, self.deviation, dtype=dtype, device=device)
        return Pixels(self.images, self.mean, self.deviation, mapped=self.mapped, dtype=dtype, device=device)
