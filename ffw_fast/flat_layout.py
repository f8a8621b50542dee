"""Where the gates of each layer lie in one flat buffer of all."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

FLAT_ALIGNMENT = 16  # elements; each layer's gates start at such a multiple in the network's flat list of gates


def flat_offsets(sizes: Iterable[int]) -> list[int]:
    """Where each layer's gates start in the network's flat list of gates, and the list's length as the last entry."""
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + math.ceil(size / FLAT_ALIGNMENT) * FLAT_ALIGNMENT)
    return offsets


class FlatLayout:
    """Where the layers' gates lie in a flat buffer of all, each layer starting at a multiple of 16 elements.

    Attributes:
        shapes: layer name -> shape of its weight.
        length: of the buffer.
    """

    def __init__(self, shapes: dict[str, torch.Size]) -> None:
        self.shapes = shapes
        offsets = flat_offsets(shape.numel() for shape in shapes.values())
        self.length = offsets[-1]
        self._slices = {
            name: slice(start, start + shape.numel())
            for (name, shape), start in zip(shapes.items(), offsets, strict=False)
        }

    def view(self, buffer: Tensor, name: str) -> Tensor:
        """The layer's part of a flat buffer, in the shape of its weight."""
        return buffer[self._slices[name]].view(self.shapes[name])

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Every layer's part of a flat buffer."""
        return {name: self.view(buffer, name) for name in self.shapes}
