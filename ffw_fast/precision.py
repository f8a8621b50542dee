"""Full float32 for comparisons of two networks, whatever PyTorch is told to round their operands to."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


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
