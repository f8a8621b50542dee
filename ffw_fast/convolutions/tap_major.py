"""Convolutions of images of a few pixels whose weight lies tap by tap, without the taps that meet nothing but padding.

The matrix of such a layer (``unrolled``) is put together of blocks (C, K), one for each pair of an output pixel and a
pixel that is read, and all pairs with the same tap have the same block. Where the weight lies tap by tap, blocks are
copied whole, and where one pixel is left there is nothing to copy. Taps that meet nothing but padding are idle:
whatever they are, the output is the same and their gradient is 0. The last stage of ResNet18 sees one pixel of an image
of 32 x 32, so that eight of its nine taps are idle, 62% of all weights of the network.

Sizes: N images, C and K channels of the input and the output, I pixels read, O given, P taps left.
"""

import torch
from torch import Tensor, nn

from ffw_fast.convolutions.unrolled import is_worth_unrolling, live_taps


class TapMajorConv2d(nn.Conv2d):
    """``nn.Conv2d`` on images of one size.

    Attributes:
        weight: (P, C, K), of the P taps that meet a pixel.
        blocks: (I * O,) int64, for each pixel read and each output pixel the tap between them, as an index of weight.
        pixels: (I,) int64, the pixels that are read, as indices of the flattened image.
        image, output: heights and widths.
    """

    blocks: Tensor
    pixels: Tensor
    image: torch.Size
    output: torch.Size

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[2:] != self.image:
            raise RuntimeError(f"expected images of {tuple(self.image)} pixels as before, got {tuple(input.shape)}")
        read = input.flatten(2)
        if len(self.pixels) < read.shape[2]:
            read = read.index_select(2, self.pixels)
        rows = read.transpose(1, 2).flatten(1)  # [N, I C]
        blocks = self.weight[:, None]
        if self.output.numel() > 1:
            blocks = self.weight.index_select(0, self.blocks).unflatten(0, (len(self.pixels), -1))  # [I, O, C, K]
            blocks = blocks.transpose(1, 2)
        matrix = blocks.reshape(rows.shape[1], -1)  # [I C, O K]
        y = rows @ matrix if self.bias is None else torch.addmm(self.bias.repeat(self.output.numel()), rows, matrix)
        y = y.unflatten(1, (*self.output, -1)).permute(0, 3, 1, 2)
        return y.clone(memory_format=torch.contiguous_format)  # a view would cost an activation that overwrites it


@torch.no_grad()
def lay_out(layer: nn.Conv2d, height: int, width: int) -> Tensor | None:
    """Turn a frozen layer into a ``TapMajorConv2d`` in place, where images of that size are worth unrolling.

    Returns:
        (P,) int64, the taps that are left as indices of the flattened kernel, or None: the layer stays as it is.
    """
    live = live_taps(layer, height, width) if is_worth_unrolling(layer, height, width) else None
    if live is None:
        return None
    taps, blocks = live.taps.unique(return_inverse=True)
    layer.weight = nn.Parameter(by_taps(layer.weight, taps).contiguous(), requires_grad=False)
    layer.__class__ = TapMajorConv2d
    assert isinstance(layer, TapMajorConv2d)
    layer.blocks, layer.pixels = blocks.view(-1, len(live.pixels)).T.flatten(), live.pixels
    layer.image, layer.output = torch.Size([height, width]), torch.Size(live.output)
    return taps


def put_back(layer: nn.Conv2d, weight: nn.Parameter) -> None:
    """Undo ``lay_out``: the layer with the weight that it had."""
    layer.__class__, layer.weight = nn.Conv2d, weight
    for name in TapMajorConv2d.__annotations__:
        delattr(layer, name)


def by_taps(weight: Tensor, taps: Tensor) -> Tensor:
    """(P, C, K) of these taps of a weight (K, C, ...)."""
    return weight.flatten(2)[:, :, taps].permute(2, 1, 0)


def put_taps(weight: Tensor, taps: Tensor, values: Tensor) -> None:
    """The other way round, in place: the values (P, C, K) into these taps of a contiguous weight."""
    weight.flatten(2)[:, :, taps] = values.permute(2, 1, 0)
