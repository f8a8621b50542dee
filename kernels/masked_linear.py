"""Linear layers over gated weights: forward, gradient of the input, gradient of the scores.

With v = w * g(m), of shape (N, K), and x of shape (B, K):

- forward: ``y = relu(x v^T + bias)``, gate in the operand load, bias and ReLU in the epilogue
- gradient of the input: ``dx = dy v``
- gradient of the scores: ``dm = (dy^T x) * w * dg/dm``, the last two factors in the epilogue

where dy is the gradient behind the ReLU, set to 0 where the output is not positive. In plain PyTorch:
``torch.nn.functional.linear`` over ``ffw_fast.ops.gate_weight_default``. Random gates cost one Philox call an
element here, since a tile's threads do not hold four neighbours: sample them once with ``gate_weight`` where
a layer is large.
"""

import torch
import triton
import triton.language as tl
from ffw_fast.kernels.gate import check_gate, inverse_temperature
from ffw_fast.kernels.matmul import (
    add_splits,
    block_range,
    check_same_dtype,
    check_shape,
    dot,
    gated_tile,
    is_wide,
    output_gradient,
    score_gradient,
    tile_of_program,
    triton_precision,
)
from ffw_fast.kernels.tiles import Tile, choose_splits, choose_tile
from torch import Tensor


@triton.jit
def linear_kernel(
    x_ptr, weight_ptr, scores_ptr, temperature_ptr, draw_ptr, bias_ptr, out_ptr, rows, outs, ins, x_stride,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of_program(tl.program_id(0), rows, outs, BLOCK_M, BLOCK_N)
    row = block_range(tile_m, BLOCK_M, WIDE)
    out = block_range(tile_n, BLOCK_N, WIDE)
    inverse = inverse_temperature(tl.load(temperature_ptr))
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, ins, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_inside = (row < rows)[:, None] & (k < ins)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + k[None, :], mask=x_inside, other=0.0)  # [M, K]
        places = out[None, :] * ins + k[:, None]
        inside = (k < ins)[:, None] & (out < outs)[None, :]
        v = gated_tile(weight_ptr, scores_ptr, draw_ptr, places, places, inside, inverse, KIND)  # [K, N]
        accumulator = dot(x, v, accumulator, PRECISION)
    if HAS_BIAS:
        accumulator += tl.load(bias_ptr + out, mask=out < outs, other=0.0).to(tl.float32)[None, :]
    if RELU:
        accumulator = tl.where(accumulator < 0, 0.0, accumulator)  # keeps NaN
    inside = (row < rows)[:, None] & (out < outs)[None, :]
    tl.store(out_ptr + row[:, None] * outs + out[None, :], accumulator, mask=inside)


@triton.jit
def linear_input_grad_kernel(
    grad_ptr, output_ptr, weight_ptr, scores_ptr, temperature_ptr, draw_ptr, x_grad_ptr, rows, outs, ins,
    KIND: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of_program(tl.program_id(0), rows, ins, BLOCK_M, BLOCK_N)
    row = block_range(tile_m, BLOCK_M, WIDE)
    k = block_range(tile_n, BLOCK_N, WIDE)
    inverse = inverse_temperature(tl.load(temperature_ptr))
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, outs, BLOCK_K):
        out = start + tl.arange(0, BLOCK_K)
        if WIDE:
            out = out.to(tl.int64)
        grad_inside = (row < rows)[:, None] & (out < outs)[None, :]
        grad = output_gradient(grad_ptr, output_ptr, row[:, None] * outs + out[None, :], grad_inside, RELU)  # [M, O]
        places = out[:, None] * ins + k[None, :]
        inside = (out < outs)[:, None] & (k < ins)[None, :]
        v = gated_tile(weight_ptr, scores_ptr, draw_ptr, places, places, inside, inverse, KIND)  # [O, K]
        accumulator = dot(grad, v, accumulator, PRECISION)
    inside = (row < rows)[:, None] & (k < ins)[None, :]
    tl.store(x_grad_ptr + row[:, None] * ins + k[None, :], accumulator, mask=inside)


@triton.jit
def linear_score_grad_kernel(
    grad_ptr, output_ptr, x_ptr, weight_ptr, scores_ptr, temperature_ptr, draw_ptr, scores_grad_ptr,
    partials_ptr, rows, outs, ins, x_stride, rows_a_split,
    KIND: tl.constexpr, RELU: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = tile_of_program(tl.program_id(0), outs, ins, BLOCK_M, BLOCK_N)
    out = block_range(tile_m, BLOCK_M, WIDE)
    k = block_range(tile_n, BLOCK_N, WIDE)
    first = tl.program_id(1) * rows_a_split
    last = tl.minimum(first + rows_a_split, rows)
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(first, last, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        if WIDE:
            row = row.to(tl.int64)
        grad_inside = (out < outs)[:, None] & (row < last)[None, :]
        grad = output_gradient(grad_ptr, output_ptr, row[None, :] * outs + out[:, None], grad_inside, RELU)  # [O, B]
        x_inside = (row < last)[:, None] & (k < ins)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + k[None, :], mask=x_inside, other=0.0)  # [B, K]
        accumulator = dot(grad, x, accumulator, PRECISION)
    places = out[:, None] * ins + k[None, :]
    inside = (out < outs)[:, None] & (k < ins)[None, :]
    if SPLIT:
        part = partials_ptr + tl.program_id(1).to(tl.int64) * outs * ins
        tl.store(part + places, accumulator, mask=inside)
    else:
        inverse = inverse_temperature(tl.load(temperature_ptr))
        result = score_gradient(accumulator, weight_ptr, scores_ptr, draw_ptr, places, places, inside, inverse, KIND)
        tl.store(scores_grad_ptr + places, result, mask=inside)


def masked_linear(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    temperature: Tensor,
    draw: Tensor,
    kind: int,
    bias: Tensor | None = None,
    relu: bool = False,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> Tensor:
    """``relu(x @ (weight * gate)^T + bias)`` of x (..., K), weight and scores (N, K), bias (N): (..., N).

    Args:
        kind: number of the gate kind.
        relu: apply ReLU to the result.
        precision: of float32 operands, "ieee" or "tf32".
        tile: instead of the one that the table gives.
    """
    check_gate(weight, scores, temperature, draw)
    check_same_dtype(weight, x=x, bias=bias)
    outs, ins = weight.shape
    check_shape("x", x, (*x.shape[:-1], ins))
    rows = _rows(x)
    out = x.new_empty(len(rows), outs)
    if out.numel():
        weight, scores, draw = weight.contiguous(), scores.contiguous(), draw.contiguous()
        bias = None if bias is None else bias.contiguous()
        tile = tile or choose_tile("linear", x, precision, len(rows), outs)
        with torch.cuda.device_of(x):
            linear_kernel[(tile.count(len(rows), outs),)](
                rows, weight, scores, temperature, draw, bias, out, len(rows), outs, ins, rows.stride(0),
                KIND=int(kind), HAS_BIAS=bias is not None, RELU=relu,
                PRECISION=triton_precision(x.dtype, precision), WIDE=is_wide(rows, weight, out),
                **tile.launch_options(),
            )  # fmt: skip
    return out.view(*x.shape[:-1], outs)


def masked_linear_input_grad(
    grad: Tensor,
    weight: Tensor,
    scores: Tensor,
    temperature: Tensor,
    draw: Tensor,
    kind: int,
    output: Tensor | None = None,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> Tensor:
    """Gradient of the input, (..., K), of that of the output, (..., N).

    Args:
        output: what the layer returned, where it applied ReLU; None where it did not.
    """
    check_gate(weight, scores, temperature, draw)
    check_same_dtype(weight, grad=grad, output=output)
    outs, ins = weight.shape
    check_shape("grad", grad, (*grad.shape[:-1], outs))
    if output is not None:
        check_shape("output", output, tuple(grad.shape))
        output = output.reshape(-1, outs).contiguous()
    rows = grad.reshape(-1, outs).contiguous()
    out = grad.new_empty(len(rows), ins)
    if out.numel():
        weight, scores, draw = weight.contiguous(), scores.contiguous(), draw.contiguous()
        tile = tile or choose_tile("linear", grad, precision, len(rows), ins)
        with torch.cuda.device_of(grad):
            linear_input_grad_kernel[(tile.count(len(rows), ins),)](
                rows, output, weight, scores, temperature, draw, out, len(rows), outs, ins, KIND=int(kind),
                RELU=output is not None, PRECISION=triton_precision(grad.dtype, precision),
                WIDE=is_wide(rows, weight, out), **tile.launch_options(),
            )  # fmt: skip
    return out.view(*grad.shape[:-1], ins)


def masked_linear_score_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    temperature: Tensor,
    draw: Tensor,
    kind: int,
    output: Tensor | None = None,
    precision: str = "ieee",
    tile: Tile | None = None,
    splits: int | None = None,
) -> Tensor:
    """Gradient of the scores, (N, K), of that of the output, (..., N), and the input, (..., K).

    Args:
        output: what the layer returned, where it applied ReLU; None where it did not.
        splits: into how many parts the sum over the rows is split, instead of what the rule gives. Their
            partial sums are added in a fixed order, so the result is the same bits in every run.
    """
    check_gate(weight, scores, temperature, draw)
    check_same_dtype(weight, grad=grad, x=x, output=output)
    outs, ins = weight.shape
    check_shape("grad", grad, (*x.shape[:-1], outs))
    check_shape("x", x, (*x.shape[:-1], ins))
    if output is not None:
        check_shape("output", output, tuple(grad.shape))
        output = output.reshape(-1, outs).contiguous()
    grad_rows, rows = grad.reshape(-1, outs).contiguous(), _rows(x)
    out = torch.empty_like(scores, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    weight, scores, draw = weight.contiguous(), scores.contiguous(), draw.contiguous()
    tile = tile or choose_tile("linear", x, precision, outs, ins)
    tiles = tile.count(outs, ins)
    parts = splits or choose_splits(x, tiles, len(rows), tile.depth)
    partials = out.new_empty(parts, out.numel(), dtype=torch.float32) if parts > 1 else None
    with torch.cuda.device_of(x):
        linear_score_grad_kernel[(tiles, parts)](
            grad_rows, output, rows, weight, scores, temperature, draw, out, partials, len(rows), outs, ins,
            rows.stride(0), tile.depth * triton.cdiv(triton.cdiv(len(rows), tile.depth), parts),
            KIND=int(kind), RELU=output is not None, SPLIT=parts > 1,
            PRECISION=triton_precision(x.dtype, precision),
            WIDE=is_wide(rows, grad_rows, weight), **tile.launch_options(),
        )  # fmt: skip
        if partials is not None:
            add_splits(partials, weight, scores, temperature, draw, out, kind)
    return out


def _rows(x: Tensor) -> Tensor:
    """x as a matrix whose rows are contiguous."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
