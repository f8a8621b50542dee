"""Images in memory order (C, H, W, N), the batch innermost: how FFT convolutions give them, and the layers between.

Where the operands of an elementwise operator lie in different orders, it walks through memory in strides, and takes
several times as long. So between FFT convolutions all layers keep that order, of images and of their gradients:
convolutions of single pixels are one matrix product in it, PyTorch's pools take it for channels last, its batch norm
for one large image, and only other convolutions turn their images to the usual order and back.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def new_batch_innermost(like: Tensor, images: int, channels: int, height: int, width: int) -> Tensor:
    """Uninitialised, in memory order CHWN; no view of another tensor, so that it may be overwritten."""
    strides = (1, height * width * images, width * images, images)
    return like.new_empty_strided((images, channels, height, width), strides)


def batch_innermost(x: Tensor) -> Tensor:
    """(N, C, H, W) in memory order CHWN; itself where it lies so already."""
    if is_batch_innermost(x):
        return x
    y = new_batch_innermost(x, *x.shape)
    if x.is_contiguous():
        _matrix(y).copy_(x.flatten(1).T)  # of two dimensions PyTorch copies block by block
        return y
    return y.copy_(x)


def batch_outermost(x: Tensor) -> Tensor:
    """(N, C, H, W) in PyTorch's usual order where the batch is innermost; itself where it is not."""
    if not is_batch_innermost(x):
        return x
    y = x.new_empty(x.shape)
    y.flatten(1).copy_(_matrix(x).T)
    return y


def is_batch_innermost(x: Tensor) -> bool:
    return x.dim() == 4 and x.permute(1, 2, 3, 0).is_contiguous()


def _matrix(x: Tensor) -> Tensor:
    """The view (C H W, N) of images with the batch innermost."""
    return x.permute(1, 2, 3, 0).flatten(0, 2)


class _Turned(torch.autograd.Function):
    """Images in another order, and their gradient in the order that the images came in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, turn: Callable[[Tensor], Tensor], turn_back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.turn_back = turn_back
        return turn(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.turn_back(grad), None, None


class _Permuted(torch.autograd.Function):
    """``y.permute(order)`` in the same memory, but no view of y to autograd.

    What changes a view in place costs its gradient several copies. Here y is the fresh output of an operator that does
    not keep it for its gradient, and nobody else reads it.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: tuple[int, ...]) -> Tensor:
        ctx.back = sorted(range(len(order)), key=order.__getitem__)
        permuted = y.permute(order)
        return y.new_empty(0).set_(y.untyped_storage(), y.storage_offset(), permuted.shape, permuted.stride())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.permute(ctx.back), None


def _keeps_order(x: Tensor) -> bool:
    """Whether images are to be kept batch innermost; under autocast most convolutions are not by FFT."""
    return x.dim() == 4 and not torch.is_autocast_enabled(x.device.type)


class TurningConv2d(nn.Conv2d):
    """``nn.Conv2d`` that turns its images to the usual order and back."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not _keeps_order(input):
            return super()._conv_forward(input, weight, bias)
        if is_batch_innermost(input):
            input = _Turned.apply(input, batch_outermost, batch_innermost)
        y = super()._conv_forward(input, weight, bias)
        return y if is_batch_innermost(y) else _Turned.apply(y, batch_innermost, batch_outermost)


class PointwiseConv2d(nn.Conv2d):
    """``nn.Conv2d`` of single pixels, as one product of the weight with all pixels of all images."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not (_keeps_order(input) and is_batch_innermost(input)):
            return super()._conv_forward(input, weight, bias)
        down, right = self.stride
        read = input.permute(1, 2, 3, 0)[:, ::down, ::right]
        pixels, matrix = read.flatten(1), weight.flatten(1)
        y = matrix @ pixels if bias is None else torch.addmm(bias[:, None], matrix, pixels)
        return _Permuted.apply(y.view(-1, *read.shape[1:]), (3, 0, 1, 2))


def is_pointwise(layer: nn.Conv2d) -> bool:
    """Whether a layer reads single pixels, and none of a padding."""
    return layer.kernel_size == (1, 1) and layer.groups == 1 and layer.padding in ((0, 0), "valid", "same")


class BatchInnermostBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that keeps the batch innermost."""

    def forward(self, input: Tensor) -> Tensor:
        if not is_batch_innermost(input):
            return super().forward(input)
        images = input.permute(1, 2, 3, 0)
        y = super().forward(images.flatten(1, 2)[None])  # one large image
        return _Permuted.apply(y.view(images.shape), (3, 0, 1, 2))


class BatchInnermostMaxPool2d(nn.MaxPool2d):
    """``nn.MaxPool2d`` that keeps the batch innermost."""

    def forward(self, input: Tensor) -> Tensor:
        if self.return_indices or not is_batch_innermost(input):
            return super().forward(input)
        y = super().forward(input.transpose(0, 1))  # channels last, of C images with N channels
        return _Permuted.apply(y, (1, 0, 2, 3))


class BatchInnermostAvgPool2d(nn.AvgPool2d):
    """``nn.AvgPool2d`` that keeps the batch innermost."""

    def forward(self, input: Tensor) -> Tensor:
        if not is_batch_innermost(input):
            return super().forward(input)
        y = super().forward(input.transpose(0, 1))  # channels last, of C images with N channels
        return _Permuted.apply(y, (1, 0, 2, 3))


class _MeanOfImage(torch.autograd.Function):
    """Mean over height and width, whose gradient has the batch innermost like all others around it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        pixels = x.permute(1, 2, 3, 0).flatten(1, 2)  # [C, H W, N], whose sum is several times faster
        return pixels.mean(1).T[..., None, None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        images, channels, height, width = ctx.shape
        mean = new_batch_innermost(grad, images, channels, 1, 1).copy_(grad / (height * width))
        return mean.expand(ctx.shape)


class BatchInnermostGlobalPool(nn.AdaptiveAvgPool2d):
    """``nn.AdaptiveAvgPool2d(1)`` that keeps the batch innermost."""

    def forward(self, input: Tensor) -> Tensor:
        return _MeanOfImage.apply(input) if input.dim() == 4 else super().forward(input)


def keep_batch_innermost(model: nn.Module, by_fft: int) -> None:
    """Let the pools, convolutions and batch norms of a model keep the order of those by FFT, in place.

    Convolutions and batch norms do where other convolutions are no more than those by FFT. Where they are more they
    mostly stand beside each other, and PyTorch's own order suits them: ResNet50 on 64 x 64 pixels has 11 by FFT and 40
    others.
    """
    for module in model.modules():
        if type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1)):
            module.__class__ = BatchInnermostGlobalPool
        elif type(module) is nn.MaxPool2d:
            module.__class__ = BatchInnermostMaxPool2d
        elif type(module) is nn.AvgPool2d:
            module.__class__ = BatchInnermostAvgPool2d
    if sum(type(module) is nn.Conv2d for module in model.modules()) > by_fft:
        return
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = BatchInnermostBatchNorm2d
        elif type(module) is nn.Conv2d:
            module.__class__ = PointwiseConv2d if is_pointwise(module) else TurningConv2d
