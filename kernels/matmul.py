"""What the kernels of masked layers share: tile order, gated operands, the epilogue, split sums.

A gated weight is never stored: each program loads its tile of weight and scores, multiplies by the gate and
hands the product, rounded to the weight's dtype, to the tensor cores. Sums are float32.
"""

import os

import torch
import triton
import triton.language as tl
from ffw_fast.kernels.gate import BERNOULLI, gate_slope, gate_value, inverse_temperature, uniform_of_elements
from ffw_fast.kernels.tiles import ELEMENTWISE_BLOCK, ELEMENTWISE_WARPS
from torch import Tensor

GROUP = tl.constexpr(8)  # rows of tiles that are worked on together, so that their operands stay in the L2 cache
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
INT32_LIMIT = 2**31


@triton.jit
def tile_of_program(program, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row and column of a program's tile: down a group of rows first, then on to the next column."""
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    group = program // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    place = program % (GROUP * tiles_n)
    return group * GROUP + place % height, place // height


@triton.jit
def block_range(tile, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The indices of one tile, [BLOCK]; int64 where the tensors have places that 32 bits cannot count."""
    if WIDE:
        tile = tile.to(tl.int64)
    return tile * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def round_to_tf32(x):
    """The TF32 numbers nearest to float32 ``x``, ties away from zero; NaN stays as it is."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x1000) & -0x2000  # half of the last bit that TF32 keeps, and without the 13 that it drops
    return tl.where(x == x, rounded, bits).to(tl.float32, bitcast=True)  # a NaN of all ones would become -0


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """``accumulator + a @ b`` in float32; PRECISION says how float32 operands are multiplied.

    Tensor cores drop the bits that TF32 has no room for, which makes all products too small; so operands are rounded
    here, as cuBLAS does.
    """
    if PRECISION == "tf32":
        a = round_to_tf32(a)
        b = round_to_tf32(b)
    if INTERPRETED:  # the interpreter would multiply the bit patterns of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def gated_tile(weight_ptr, scores_ptr, draw_ptr, offsets, elements, inside, inverse, KIND: tl.constexpr):
    """The gated weights at ``offsets``, 0 outside, in the weight's dtype.

    ``elements`` are their places in the contiguous weight, which random gates are keyed by.
    """
    w = tl.load(weight_ptr + offsets, mask=inside, other=0.0)
    m = tl.load(scores_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    u = 0.0
    if KIND >= BERNOULLI:
        u = uniform_of_elements(draw_ptr, elements)
    return (w.to(tl.float32) * gate_value(m, inverse, u, KIND)).to(w.dtype)


@triton.jit
def score_gradient(weight_grad, weight_ptr, scores_ptr, draw_ptr, offsets, elements, inside, inverse,
                   KIND: tl.constexpr):  # fmt: skip
    """The straight-through epilogue: the gradient of the gated weight, times weight and slope of the gate."""
    w = tl.load(weight_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(scores_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    u = 0.0
    if KIND >= BERNOULLI:
        u = uniform_of_elements(draw_ptr, elements)
    return weight_grad * w * gate_slope(m, inverse, u, KIND)


@triton.jit
def output_gradient(grad_ptr, output_ptr, offsets, inside, RELU: tl.constexpr):
    """The gradient before the layer's ReLU: that behind it where the output is positive."""
    grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0)
    if RELU:
        output = tl.load(output_ptr + offsets, mask=inside, other=0.0)
        grad = tl.where(output > 0, grad, 0.0).to(grad.dtype)
    return grad


@triton.jit
def add_splits_kernel(
    partials_ptr, weight_ptr, scores_ptr, temperature_ptr, draw_ptr, scores_grad_ptr, count, splits,
    fan_in, channels,
    KIND: tl.constexpr, CHANNELS_INNER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums (splits, count) in a fixed order and applies the straight-through epilogue."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < count - start
    total = tl.zeros([BLOCK], dtype=tl.float32)
    part = partials_ptr + start
    for _ in range(splits):
        total += tl.load(part + lane, mask=inside, other=0.0)
        part += count
    elements = start + lane
    if KIND >= BERNOULLI and CHANNELS_INNER:
        elements = contiguous_place(elements // fan_in, elements % fan_in, fan_in, channels)
    inverse = inverse_temperature(tl.load(temperature_ptr))
    result = score_gradient(
        total, weight_ptr + start, scores_ptr + start, draw_ptr, lane, elements, inside, inverse, KIND
    )
    tl.store(scores_grad_ptr + start + lane, result, mask=inside)


@triton.jit
def contiguous_place(out_channel, k, fan_in, channels):
    """Place in the contiguous weight of element k, (tap, channel), of an output channel, channels last."""
    return out_channel * fan_in + k % channels * (fan_in // channels) + k // channels


def add_splits(
    partials: Tensor,
    weight: Tensor,
    scores: Tensor,
    temperature: Tensor,
    draw: Tensor,
    out: Tensor,
    kind: int,
    channels_inner: bool = False,
) -> None:
    """Write the gradient of the scores to ``out``, of partial sums (splits, elements) in memory's order."""
    count = weight.numel()
    add_splits_kernel[(triton.cdiv(count, ELEMENTWISE_BLOCK),)](
        partials, weight, scores, temperature, draw, out, count, len(partials), count // len(weight),
        weight.shape[1],
        KIND=int(kind), CHANNELS_INNER=channels_inner, BLOCK=ELEMENTWISE_BLOCK, num_warps=ELEMENTWISE_WARPS,
        enable_fp_fusion=False,
    )  # fmt: skip


def is_wide(*tensors: Tensor | None) -> bool:
    """Whether an element of one of the tensors is farther from its first than 32 bits can say."""
    return any(
        sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) >= INT32_LIMIT - 1
        for tensor in tensors
        if tensor is not None and tensor.numel()
    )


def check_same_dtype(weight: Tensor, **others: Tensor | None) -> None:
    """``TypeError`` unless the named tensors have the weight's dtype."""
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != weight.dtype:
            raise TypeError(f"{name} must have the weight's dtype {weight.dtype}, got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """``ValueError`` unless the tensor has the expected shape."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {tuple(expected)}, got {tuple(tensor.shape)}")


def triton_precision(dtype: torch.dtype, precision: str) -> str:
    """What ``tl.dot`` is told; it matters for float32 only, and one value keeps 16-bit variants few."""
    return precision if dtype == torch.float32 else "ieee"
