"""Images in memory as bytes, normalised whenever a minibatch of them is read: a quarter of the memory of floats."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class Pixels:
    """Images that stand where a float tensor (n, channels, height, width) would: indexed by rows, split, moved.

    What is read is ``(pixel / 255 - mean) / deviation``, channel by channel.

    Attributes:
        images: uint8 (n, channels, height, width), in memory or mapped from a file.
        mean, deviation: float32 (channels,), of pixels in [0, 1].
        dtype: of what is read.
        device: of what is read; the images are there too, unless they are mapped from a file.
    """

    def __init__(
        self,
        images: Tensor,
        mean: Sequence[float] | Tensor,
        deviation: Sequence[float] | Tensor,
        *,
        mapped: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise TypeError(f"images must be uint8 (n, channels, h, w), got {images.dtype} {tuple(images.shape)}")
        self.mean, self.deviation = (torch.as_tensor(part, dtype=torch.float32) for part in (mean, deviation))
        if not len(self.mean) == len(self.deviation) == images.shape[1] or not (self.deviation > 0).all():
            raise ValueError(f"expected a mean and a positive deviation for each of {images.shape[1]} channels")
        self.device = images.device if device is None else torch.device(device)
        self.images = images if mapped else images.to(self.device)
        self.mapped, self.dtype = mapped, dtype
        self._scale = (1 / (255 * self.deviation)).to(self.device, dtype).view(-1, 1, 1)
        self._shift = (-self.mean / self.deviation).to(self.device, dtype).view(-1, 1, 1)

    @property
    def shape(self) -> torch.Size:
        return self.images.shape

    def __len__(self) -> int:
        return len(self.images)

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
        return Pixels(self.images, self.mean, self.deviation, mapped=self.mapped, dtype=dtype, device=device)
