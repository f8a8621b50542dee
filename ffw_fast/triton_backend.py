"""The Triton kernels as implementations of the operators: which serve which, for what, and their registration.

A kernel's module, and Triton with it, is imported when its operator is first called, so importing ``ffw_fast`` costs
nothing. What a kernel does not take (double precision above all) is left to the operator's plain-PyTorch kernel.
"""

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import util
from typing import Any

import torch
from torch import Tensor

from ffw_fast import ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_CLASSES = 64  # of the heads: their joint is kept in registers


@dataclass(frozen=True)
class TritonKernel:
    """How Triton serves an operator.

    Attributes:
        module: in ``ffw_fast.kernels``; its launcher has the operator's name and arguments.
        accepts: whether the kernels take these arguments.
        precision: what float32 products are computed in, for launchers that are told so: PyTorch's own setting.
    """

    module: str
    accepts: Callable[..., bool]
    precision: Callable[[], str] | None = None


def _floats(*tensors: Any) -> bool:
    """Whether all tensors among the arguments have a dtype that the kernels gate (or are indices)."""
    return all(not tensor.is_floating_point() or tensor.dtype in DTYPES for tensor in tensors if _is_tensor(tensor))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _flat_buffers(gated: Tensor, scores: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, movement: Tensor,
                  weight: Tensor, grad: Tensor, *rest: Any) -> bool:  # fmt: skip
    buffers = (gated, scores, exp_avg, exp_avg_sq, weight, grad)
    return _floats(*buffers) and all(buffer.is_contiguous() for buffer in buffers)


def _logits(*tensors: Tensor) -> bool:
    logits = next(tensor for tensor in tensors if tensor.dim() == 3)
    return _floats(*tensors) and logits.numel() > 0 and logits.shape[-1] <= MOST_CLASSES


def _head(weight: Tensor, bias: Tensor, weight_momentum: Tensor, bias_momentum: Tensor, plateau: Tensor,
          features: Tensor, *rest: Any) -> bool:  # fmt: skip
    state = (weight, bias, weight_momentum, bias_momentum)
    return (
        features.dtype == torch.float32
        and weight.shape[1] <= MOST_CLASSES
        and plateau.is_contiguous()
        and all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in state)
    )


def matmul_precision() -> str:
    """Of float32 matrix products: PyTorch's setting, whose default is "ieee"."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def convolution_precision() -> str:
    """Of float32 convolutions: PyTorch's setting, whose default is "tf32"."""
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    return "tf32" if conv.fp32_precision == "tf32" else "ieee"


KERNELS = {
    "gate_weight": TritonKernel("gate_weight", _floats),
    "gate_weight_backward": TritonKernel("gate_weight", _floats),
    "gated_adam_step_": TritonKernel("gated_adam", _flat_buffers),
    "mutual_information": TritonKernel("mutual_information", _logits),
    "mutual_information_backward": TritonKernel("mutual_information", _logits),
    "fit_linear_head_": TritonKernel("linear_head", _head),
    "masked_linear": TritonKernel("masked_linear", _floats, matmul_precision),
    "masked_linear_input_grad": TritonKernel("masked_linear", _floats, matmul_precision),
    "masked_linear_score_grad": TritonKernel("masked_linear", _floats, matmul_precision),
    "masked_conv2d": TritonKernel("masked_conv2d", _floats, convolution_precision),
    "masked_conv2d_input_grad": TritonKernel("masked_conv2d", _floats, convolution_precision),
    "masked_conv2d_score_grad": TritonKernel("masked_conv2d", _floats, convolution_precision),
}

registered: dict[str, tuple[str, ...]] = {}  # device type -> operators that Triton serves there
_library = torch.library.Library("ffw_fast", "IMPL")


def is_interpreting() -> bool:
    """Whether Triton's interpreter is asked for, so that its kernels run on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not() -> str | None:
    """Why no Triton kernel can be used, None if they can."""
    return None if util.find_spec("triton") else "the package triton is missing: pip install 'ffw_fast[triton]'"


def register(device: str, leave_out: Sequence[str] = ()) -> None:
    """Let Triton serve its operators on a type of device, ``cuda`` or ``cpu`` (the interpreter), but for some."""
    registered[device] = tuple(name for name in KERNELS if name not in leave_out)
    for name in registered[device]:
        _library.impl(name, functools.partial(run, name), device.upper())


def run(name: str, *arguments: Any) -> Any:
    """An operator by its Triton kernel, or by plain PyTorch where that does not take these arguments."""
    ops.check_apart(name, arguments)
    kernel = KERNELS[name]
    if not kernel.accepts(*arguments):
        return ops.DEFAULTS[name](*arguments)
    launcher = getattr(importlib.import_module(f"ffw_fast.kernels.{kernel.module}"), name)
    if kernel.precision is None:
        return launcher(*arguments)
    return launcher(*arguments, precision=kernel.precision())
