"""How images lie in memory, and what becomes of memory that is freed."""

import ctypes
import os
import platform

import torch
from torch import Tensor


def image_format(images: Tensor) -> torch.memory_format:
    """The memory format of a batch of images (B, C, H, W) if it has one, else the contiguous one."""
    last = images.is_contiguous(memory_format=torch.channels_last)
    if images.is_contiguous():  # with one channel it may be both, and only the strides tell what it was made as
        last = last and images.shape[1] == 1 and images.stride(1) == 1 and images.stride(0) != 1
    return torch.channels_last if last else torch.contiguous_format


# Of malloc.h: what there is at most in areas of their own, which are handed back when they are freed; and how much at
# the end of the heap is left there when it is freed.
_MMAP_MAX, _TRIM_THRESHOLD = -4, -1
_BY_USERS = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Let the C library keep what tensors have freed for the next ones; whether it does.

    Else it hands large areas back to the system, which clears every page when it comes again: an eighth of a step on
    CelebA's images (docs/performance.md). It is of the whole process, whose memory stays near its peak, so this is for
    programs and not for a package that others import. Only glibc can; what its own environment variables say stands.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in _BY_USERS):
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(_MMAP_MAX, 0)) and bool(library.mallopt(_TRIM_THRESHOLD, -1))
