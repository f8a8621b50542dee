"""How images lie in memory."""

import torch
from torch import Tensor


def image_format(images: Tensor) -> torch.memory_format:
    """The memory format of a batch of images (B, C, H, W) if it has one, else the contiguous one."""
    last = images.is_contiguous(memory_format=torch.channels_last)
    if images.is_contiguous():  # with one channel it may be both, and only the strides tell what it was made as
        last = last and images.shape[1] == 1 and images.stride(1) == 1 and images.stride(0) != 1
    return torch.channels_last if last else torch.contiguous_format
