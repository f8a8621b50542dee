"""The precision of a network's passes, and full float32 for comparisons whatever PyTorch is told to round to."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def check_precision(name: str) -> None:
    """``ValueError`` with the known names for another one."""
    if name not in PRECISIONS:
        raise ValueError(f"unknown precision {name!r}; known precisions: {', '.join(PRECISIONS)}")


def passes_in(precision: str, device: torch.device, cache_enabled: bool = True) -> torch.autocast:
    """Within it forward passes are of that precision."""
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32", cache_enabled=cache_enabled)


@contextmanager
def full_float32() -> Iterator[None]:
    """Within it convolutions and matrix products of float32 keep all its bits.

    On GPUs PyTorch's default for convolutions is TF32, with 10 bits of a fraction: the same network with its batch
    norms folded then differs by half a percent of the largest output.
    """
    backends: Any = torch.backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    # Also of RNNs: where it is not that of convolutions, PyTorch's older names for both are errors.
    rounding = (cudnn.conv, cudnn.rnn, backends.cuda.matmul, mkldnn.conv, mkldnn.rnn, mkldnn.matmul)
    before = [part.fp32_precision for part in rounding]
    try:
        for part in rounding:
            part.fp32_precision = "ieee"
        yield
    finally:
        for part, precision in zip(rounding, before, strict=True):
            part.fp32_precision = precision
