"""Convolutions of images of a few pixels, as one matrix product.

Where every pixel that is read meets every pixel of the output, a convolution is a linear map of the image,

    y[k, o] = sum over c, i of w[k, c, tap(o, i)] x[c, i],

and a direct convolution computes, beside it, the products of all other taps with padding: nine times as many for a
3 x 3 kernel on an image of one pixel, which is what the last stage of ResNet18 sees of 32 x 32 pixels. The sums are
the same, so is their accuracy, and the gradient of a tap that meets nothing is 0.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST_GROWTH = 2  # of the matrix over the weight: it is 16 / 9 for images of 2 x 2 under 3 x 3 taps


class Taps(NamedTuple):
    """Which tap of a kernel joins which pixels of an image and of its convolution.

    Attributes:
        pixels: (I,) int64, the pixels that are read, as indices of the flattened image.
        taps: (O * I,) int64, for each output pixel and each pixel read the tap between them.
        output: height and width of the output.
    """

    pixels: Tensor
    taps: Tensor
    output: tuple[int, int]


def live_taps(layer: nn.Conv2d, height: int, width: int) -> Taps | None:
    """The taps of a layer on images of that size, or None where some pixel misses some output."""
    assert not isinstance(layer.padding, str)
    axes = zip((height, width), layer.kernel_size, layer.stride, layer.padding, layer.dilation, strict=True)
    rows, columns = (_live_positions(*axis) for axis in axes)
    if rows is None or columns is None:
        return None
    (read_rows, row_taps), (read_columns, column_taps) = rows, columns
    pixels = read_rows[:, None] * width + read_columns
    taps = row_taps[:, None, :, None] * layer.kernel_size[1] + column_taps[None, :, None, :]  # [O_y, O_x, I_y, I_x]
    return Taps(pixels.flatten(), taps.flatten(), (len(row_taps), len(column_taps)))


def _live_positions(size: int, kernel: int, stride: int, padding: int, dilation: int) -> tuple[Tensor, Tensor] | None:
    """Along one axis: positions that are read (I,), and the tap between each output and each of them (O, I)."""
    outputs = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    if outputs < 1:
        return None
    first_read = torch.arange(outputs, device="cpu") * stride - padding
    distance = torch.arange(size, device="cpu") - first_read[:, None]
    meets = (distance >= 0) & (distance % dilation == 0) & (distance // dilation < kernel)
    read = meets.any(0)
    if not read.any() or not meets[:, read].all():
        return None
    return read.nonzero().flatten(), (distance // dilation)[:, read]


def is_worth_unrolling(layer: nn.Conv2d, height: int, width: int) -> bool:
    """Whether a layer is a linear map of such images whose matrix is not much larger than the weight itself."""
    if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return False
    if height * width > LARGEST_GROWTH * layer.kernel_size[0] * layer.kernel_size[1]:
        return False  # each pixel read needs a tap of its own; most images end here
    live = live_taps(layer, height, width)
    return live is not None and len(live.taps) <= LARGEST_GROWTH * layer.weight[0, 0].numel()


class UnrolledConv2d(nn.Conv2d):
    """``nn.Conv2d`` that multiplies images of a few pixels by one matrix, and convolves all others as ever."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        live = self._live_taps_of(input)
        if live is None:
            return super()._conv_forward(input, weight, bias)
        outputs, inputs = weight.shape[:2]
        taps = weight.flatten(2).index_select(2, live.taps)  # [K, C, O I]
        matrix = taps.view(outputs, inputs, -1, len(live.pixels)).transpose(1, 2).reshape(-1, inputs * len(live.pixels))
        pixels = input.flatten(2)
        if len(live.pixels) < pixels.shape[2]:
            pixels = pixels.index_select(2, live.pixels)
        per_pixel = None if bias is None else bias.repeat_interleave(len(matrix) // outputs)
        return F.linear(pixels.flatten(1), matrix, per_pixel).view(-1, outputs, *live.output)

    def _live_taps_of(self, input: Tensor) -> Taps | None:
        if input.dim() != 4 or input.device.type != "cpu":
            return None
        height, width = input.shape[2:]
        known = self.__dict__.setdefault("_taps_by_size", {})
        if (height, width) not in known:
            known[height, width] = live_taps(self, height, width) if is_worth_unrolling(self, height, width) else None
        return known[height, width]
