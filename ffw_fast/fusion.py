"""Whether a masked layer gates its weight first or inside the kernel of its matrix product: the rule, and why.

- *Pre-gated*: ``gate_weight`` writes ``v = w g``, and PyTorch's own linear or convolution reads it.
- *Fused*: ``masked_linear`` or ``masked_conv2d`` loads weights and scores, and gates them on the way to the product.

What fusing saves in a forward pass is one launch, and writing and reading ``v`` once. What it costs is that every tile
of the output gates its weights anew: a weight is gated once for each tile of rows (samples of a linear layer, output
pixels of a convolution), instead of once. A gate is some 45 instructions on the units for single numbers, which takes
an A100 4.6 ps; the tensor cores spend 0.8 ps on a weight of a tile of 64 rows in TF32, so a fused kernel is bound by
its gates, and tensor cores wait. Writing and reading ``v`` in float32 takes 5.1 ps, so one tile of rows is worth
fusing whatever the layer's size, two only for the launch that they save, and a convolution with its thousands of rows
practically never. The backward pass has the same balance: the gradient of the input gates for every tile again, that of
the scores saves two passes. Hopper's figures have about the same ratios. All of this is reckoned, not measured.

So fused are, by ``auto``, layers on a GPU for which a Triton kernel is in use, where
``row tiles * weights * 4.6 ps < 2.5 us + weights * (passes saved)``, and not

- random gates: a tile's threads do not hold four neighbours, so each element costs a Philox call of its own;
- convolutions with fewer than 16 channels in or out of a group: most of a tile would be empty;
- float64, autocast, mixed dtypes, and weights or biases that are trained: the kernels have no such variants.

The environment variable FFW_FAST_MASKED_LAYERS forces one: ``auto`` (default), ``fused`` (wherever the operator takes
the layer; without a Triton kernel its plain-PyTorch one does the work), ``pregated``. The loop of ``ffw_fast.extract``
does not come here: its gated weights are written by the optimizer's pass, so pre-gating costs it nothing.
"""

import os

import torch
from torch import Tensor

from ffw_fast import triton_backend
from ffw_fast.gates import GateKind

CHOICES = ("auto", "fused", "pregated")
VARIABLE = "FFW_FAST_MASKED_LAYERS"

TILE_ROWS = 64  # rows of the output that share one evaluation of the gates
LEAST_CHANNELS = 16
GATE_SECONDS = 45 / (108 * 64 * 1.41e9)  # instructions of a gate over what an A100 issues in a second
LAUNCH_SECONDS = 2.5e-6
BYTES_PER_SECOND = 1.555e12


def requested() -> str:
    """The value of FFW_FAST_MASKED_LAYERS; ``ValueError`` with the known ones if it is none of them."""
    name = os.environ.get(VARIABLE) or "auto"
    if name not in CHOICES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(CHOICES)}, got {name!r}")
    return name


choice = requested()


def fuses_linear(x: Tensor, weight: Tensor, bias: Tensor | None, kind: GateKind) -> bool:
    """Whether a linear layer over x (..., K) is fused."""
    if not _is_possible(x, weight, bias):
        return False
    return choice == "fused" or (
        _is_served("masked_linear", x, kind) and pays(x.numel() // max(x.shape[-1], 1), weight)
    )


def fuses_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: GateKind, stride: tuple[int, ...], groups: int
) -> bool:
    """Whether a convolution over x (B, C, H, W) is fused; padding is taken to keep the image's size."""
    if not _is_possible(x, weight, bias) or x.dim() != 4:
        return False
    if choice == "fused":
        return True
    rows = x.shape[0] * (x.shape[2] // stride[0]) * (x.shape[3] // stride[1])
    wide = min(weight.shape[0] // groups, weight.shape[1]) >= LEAST_CHANNELS
    return wide and _is_served("masked_conv2d", x, kind) and pays(rows, weight)


def pays(rows: int, weight: Tensor) -> bool:
    """The rule: gating once for each tile of rows costs less than a launch and a pass of writing and reading."""
    gates = weight.numel()
    passes = 2 * weight.element_size() * gates / BYTES_PER_SECOND
    return -(-rows // TILE_ROWS) * gates * GATE_SECONDS < LAUNCH_SECONDS + passes


def _is_possible(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if choice == "pregated" or (choice == "auto" and x.device.type == "cpu"):
        return False
    frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
    same = x.dtype == weight.dtype and (bias is None or bias.dtype == weight.dtype)
    autocasts = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
    return frozen and same and x.dtype != torch.float64 and not autocasts


def _is_served(operator: str, x: Tensor, kind: GateKind) -> bool:
    return not kind.is_random and operator in triton_backend.registered.get(x.device.type, ())
