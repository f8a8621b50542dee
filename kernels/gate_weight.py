"""The gated weight and the straight-through gradient of its scores, one pass each over memory.

The plain-PyTorch versions are ``gate_weight_default`` and ``gate_weight_backward_default`` of
``ffw_fast.ops``. Loads and stores are 16 bytes wide where the number of elements is a multiple of 16, as in
the flat buffers of a network; Triton compiles a second, narrower variant for other sizes.
"""

import torch
import triton
import triton.language as tl
from ffw_fast.kernels.gate import (
    BERNOULLI,
    check_gate,
    gate_slope,
    gate_value,
    inverse_temperature,
    uniform_of_block,
)
from ffw_fast.kernels.tiles import ELEMENTWISE_BLOCK, ELEMENTWISE_WARPS
from torch import Tensor


@triton.jit
def gate_weight_kernel(
    weight_ptr,
    scores_ptr,
    temperature_ptr,
    draw_ptr,
    gated_ptr,
    count,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < count - start
    inverse = inverse_temperature(tl.load(temperature_ptr))
    m = tl.load(scores_ptr + start + lane, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    w = tl.load(weight_ptr + start + lane, mask=inside, other=0.0).to(tl.float32)
    u = 0.0
    if KIND >= BERNOULLI:
        u = uniform_of_block(draw_ptr, start, BLOCK)
    tl.store(gated_ptr + start + lane, w * gate_value(m, inverse, u, KIND), mask=inside)


@triton.jit
def gate_weight_backward_kernel(
    grad_ptr, weight_ptr, scores_ptr, temperature_ptr, draw_ptr, scores_grad_ptr, count,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < count - start
    inverse = inverse_temperature(tl.load(temperature_ptr))
    m = tl.load(scores_ptr + start + lane, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    w = tl.load(weight_ptr + start + lane, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + start + lane, mask=inside, other=0.0).to(tl.float32)
    u = 0.0
    if KIND >= BERNOULLI:
        u = uniform_of_block(draw_ptr, start, BLOCK)
    tl.store(scores_grad_ptr + start + lane, grad * w * gate_slope(m, inverse, u, KIND), mask=inside)


def gate_weight(weight: Tensor, scores: Tensor, temperature: Tensor, draw: Tensor, kind: int) -> Tensor:
    """``weight * gate(scores)``, in the shape, dtype and strides of the weight."""
    check_gate(weight, scores, temperature, draw)
    out = torch.empty_like(weight)
    w, m, v = _in_one_order((weight, scores, out), kind)
    _launch(gate_weight_kernel, (w, m, temperature, draw.contiguous(), v), kind)
    return out if v.data_ptr() == out.data_ptr() else out.copy_(v)


def gate_weight_backward(
    grad: Tensor, weight: Tensor, scores: Tensor, temperature: Tensor, draw: Tensor, kind: int
) -> Tensor:
    """``grad * weight * dg/dm``, in the shape, dtype and strides of the scores; the gate is computed anew."""
    check_gate(weight, scores, temperature, draw)
    out = torch.empty_like(scores)
    g, w, m, result = _in_one_order((grad, weight, scores, out), kind)
    _launch(gate_weight_backward_kernel, (g, w, m, temperature, draw.contiguous(), result), kind)
    return out if result.data_ptr() == out.data_ptr() else out.copy_(result)


def _launch(kernel, tensors: tuple[Tensor, ...], kind: int) -> None:
    count = tensors[0].numel()
    if not count:
        return
    with torch.cuda.device_of(tensors[0]):
        kernel[(triton.cdiv(count, ELEMENTWISE_BLOCK),)](
            *tensors,
            count,
            int(kind),
            BLOCK=ELEMENTWISE_BLOCK,
            num_warps=ELEMENTWISE_WARPS,
            enable_fp_fusion=False,
        )


def _in_one_order(tensors: tuple[Tensor, ...], kind: int) -> list[Tensor]:
    """The tensors themselves where memory holds their elements in one order, contiguous copies otherwise.

    Uniform numbers belong to an element's place in the contiguous tensor, so random gates need that order.
    """
    first = tensors[0]
    same = all(tensor.stride() == first.stride() for tensor in tensors)
    dense = first.is_contiguous() or (kind < BERNOULLI.value and _fills_its_memory(first))
    return list(tensors) if same and dense else [tensor.contiguous() for tensor in tensors]


def _fills_its_memory(tensor: Tensor) -> bool:
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True
