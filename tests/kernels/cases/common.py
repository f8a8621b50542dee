"""Inputs and error bounds that the kernels' tests share.

Bounds are scaled to PyTorch's own error: a kernel may be twice as far from the double-precision result as
PyTorch's operator in the same precision, and a few units in the last place of the largest result more.
"""

import os

import torch
from torch import Tensor

from ffw_fast import philox
from ffw_fast.gates import GateKind

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
RANDOM_KINDS = [kind for kind in GateKind if kind.is_random]


def one(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=DEVICE)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=source, dtype=torch.float64).to(DEVICE, dtype)


def draw(seed: int = 11, number: int = 7, first: int = 64) -> Tensor:
    return philox.make_draw(seed, number, first, torch.device(DEVICE))


def tf32(x: Tensor) -> Tensor:
    """Float32 numbers rounded to the 10 bits after the point that TF32 has, ties away from zero, in double precision.

    Its exponents are float32's, so numbers below 2^-126 have the unit of the smallest normal ones.
    """
    unit = torch.ldexp(torch.ones_like(x, dtype=torch.float64), torch.frexp(x.double()).exponent.clamp_min(-125) - 11)
    rounded = (x.double().abs() / unit + 0.5).floor() * unit
    return torch.where(x.isfinite(), rounded.copysign(x.double()).float(), x)


def with_gaps(tensor: Tensor) -> Tensor:
    """The same numbers with others between them in memory."""
    return torch.stack([tensor, tensor + 1], dim=-1)[..., 0]


def assert_as_good(result: Tensor, own: Tensor, exact: Tensor, slack: float = 4.0) -> None:
    """The kernel's result is at most twice as far from the exact one as PyTorch's own of the same precision.

    Triton's interpreter truncates float32 to bfloat16 where hardware rounds, which counts twice the rounding
    error.
    """
    assert result.shape == exact.shape
    assert result.dtype == own.dtype
    if not exact.numel():
        return
    scale = exact.abs().max().item()
    error, own_error = ((value.double() - exact).abs().max().item() for value in (result, own))
    unit = torch.finfo(result.dtype).eps * scale
    factor = 4 if result.dtype == torch.bfloat16 and INTERPRETED else 2
    assert error <= factor * own_error + slack * unit, f"error {error:.3g}, PyTorch's own {own_error:.3g}"
    # nan compares false, and a result of nan makes the assertion above fail
