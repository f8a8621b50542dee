"""One training step of all gate scores over the network's flat buffers, one pass.

The plain-PyTorch version is ``gated_adam_step_default_`` of ``ffw_fast.ops``. Five buffers are read (scores,
two moments, weight, gradient) and four written, 36 bytes an element in float32. Step count, learning rate and
temperatures are read from the device, so a captured graph replays with new ones and nothing is read back.

The movement of the gates is summed per program into a buffer that a second kernel adds up in a fixed order:
the result is the same bits in every run. That second kernel, of one small program, is double precision
because the sum is.
"""

import math

import torch
import triton
import triton.language as tl
from ffw_fast.kernels.gate import (
    BERNOULLI,
    check_gate,
    gate_movement,
    gate_slope,
    gate_value,
    inverse_temperature,
    negative_expm1,
    uniform_of_block,
)
from ffw_fast.kernels.tiles import ELEMENTWISE_BLOCK, ELEMENTWISE_WARPS
from torch import Tensor

PARTIALS_BLOCK = 1024


@triton.jit
def gated_adam_kernel(
    gated_ptr, scores_ptr, exp_avg_ptr, exp_avg_sq_ptr, partials_ptr, weight_ptr, grad_ptr,
    temperature_ptr, next_temperature_ptr, step_ptr, lr_ptr, draw_ptr, next_draw_ptr, count,
    one_minus_beta1, beta2, one_minus_beta2, log_beta1, log_beta2, eps, weight_decay,
    KIND: tl.constexpr, MEASURE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < count - start
    m = tl.load(scores_ptr + start + lane, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    w = tl.load(weight_ptr + start + lane, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + start + lane, mask=inside, other=0.0).to(tl.float32)
    exp_avg = tl.load(exp_avg_ptr + start + lane, mask=inside, other=0.0).to(tl.float32)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + start + lane, mask=inside, other=0.0).to(tl.float32)
    inverse = inverse_temperature(tl.load(temperature_ptr))
    next_inverse = inverse_temperature(tl.load(next_temperature_ptr))
    step = tl.load(step_ptr).to(tl.float32)
    size = tl.load(lr_ptr).to(tl.float32) / negative_expm1(step * log_beta1)
    inverse_scale = 1.0 / tl.sqrt(negative_expm1(step * log_beta2))
    u = 0.0
    if KIND >= BERNOULLI:
        u = uniform_of_block(draw_ptr, start, BLOCK)

    gradient = grad * w * gate_slope(m, inverse, u, KIND) + weight_decay * m  # L2, not decoupled
    exp_avg += one_minus_beta1 * (gradient - exp_avg)
    exp_avg_sq = exp_avg_sq * beta2 + one_minus_beta2 * gradient * gradient
    tl.store(exp_avg_ptr + start + lane, exp_avg, mask=inside)
    tl.store(exp_avg_sq_ptr + start + lane, exp_avg_sq, mask=inside)
    m -= size * exp_avg / (tl.sqrt(exp_avg_sq) * inverse_scale + eps)
    m = m.to(scores_ptr.dtype.element_ty).to(tl.float32)  # the new gate is that of the score as it is stored
    tl.store(scores_ptr + start + lane, m, mask=inside)

    if KIND >= BERNOULLI:
        u = uniform_of_block(next_draw_ptr, start, BLOCK)
    tl.store(gated_ptr + start + lane, w * gate_value(m, next_inverse, u, KIND), mask=inside)
    if MEASURE:
        movement = tl.where(inside, gate_movement(m, next_inverse, u, KIND), 0.0)
        tl.store(partials_ptr + tl.program_id(0), tl.sum(movement, axis=0))


@triton.jit
def add_partials_kernel(movement_ptr, partials_ptr, count, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, count, BLOCK):
        lane = start + tl.arange(0, BLOCK)
        total += tl.load(partials_ptr + lane, mask=lane < count, other=0.0).to(tl.float64)
    tl.store(movement_ptr, tl.load(movement_ptr) + tl.sum(total, axis=0))


def gated_adam_step_(
    gated: Tensor,
    scores: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    movement: Tensor,
    weight: Tensor,
    grad: Tensor,
    temperature: Tensor,
    next_temperature: Tensor,
    step: Tensor,
    lr: Tensor,
    draw: Tensor,
    next_draw: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    kind: int,
    measure: bool,
) -> None:
    """Straight-through gradient, Adam, and the gated weight of the new scores; see the operator of this name.

    Raises:
        ValueError: a buffer is not contiguous, or they differ in shape.
    """
    check_gate(weight, scores, temperature, draw)
    check_gate(gated, scores, next_temperature, next_draw)
    buffers = {
        "gated": gated,
        "scores": scores,
        "exp_avg": exp_avg,
        "exp_avg_sq": exp_avg_sq,
        "weight": weight,
        "grad": grad,
    }
    for name, buffer in buffers.items():
        if buffer.shape != scores.shape or not buffer.is_contiguous():
            raise ValueError(
                f"gated_adam_step_ needs contiguous buffers of the scores' shape {tuple(scores.shape)}; "
                f"{name} has shape {tuple(buffer.shape)} and strides {buffer.stride()}"
            )
    count = scores.numel()
    if not count:
        return
    programs = triton.cdiv(count, ELEMENTWISE_BLOCK)
    with torch.cuda.device_of(scores):
        partials = scores.new_empty(programs if measure else 1, dtype=torch.float32)
        gated_adam_kernel[(programs,)](
            gated, scores, exp_avg, exp_avg_sq, partials, weight, grad, temperature, next_temperature, step,
            lr, draw.contiguous(), next_draw.contiguous(), count, 1 - beta1, beta2, 1 - beta2, _log(beta1),
            _log(beta2), eps, weight_decay,
            KIND=int(kind), MEASURE=measure, BLOCK=ELEMENTWISE_BLOCK, num_warps=ELEMENTWISE_WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip
        if measure:
            add_partials_kernel[(1,)](
                movement, partials, programs, BLOCK=PARTIALS_BLOCK, num_warps=4, enable_fp_fusion=False
            )


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -1e30  # so that beta**step is 0
