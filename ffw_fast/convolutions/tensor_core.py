"""Convolutions on a GPU as its tensor cores read them: channels innermost in memory, and in packs of 16 bytes.

What cuDNN gets in PyTorch's usual order it copies to that order and back at every layer: a fifth to a third of a
training step of ResNet18 on an H200. And for images of three channels it has no kernel for tensor cores; what it takes
instead can be slower than all the rest of a network: the weight's gradient of a 7x7 convolution from 3 to 16 channels
took 2.6 ms in bf16, of 4.0 ms for the whole step. With channels of zeros up to a pack the sums are the same.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACK = 8  # channels: 16 bytes of bf16
FEW = 4  # channels, of which a kernel for tensor cores needs at least so many


def is_for_tensor_cores(images: Tensor) -> bool:
    """Whether images are a batch on a GPU, of a dtype that its tensor cores convolve (float32 as TF32)."""
    return images.device.type == "cuda" and images.dim() == 4 and images.dtype != torch.float64


class TensorCoreConv2d(nn.Conv2d):
    """``nn.Conv2d`` whose images are channels last on a GPU, in and out, with channels of zeros beside a few."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if is_for_tensor_cores(input):
            if input.shape[1] < FEW and self.groups == 1 and self.padding_mode == "zeros":
                missing = (0, 0, 0, 0, 0, PACK - input.shape[1])
                input, weight = F.pad(input, missing), F.pad(weight, missing)
            input = input.contiguous(memory_format=torch.channels_last)
        return super()._conv_forward(input, weight, bias)
