"""2d convolutions over gated weights as implicit matrix products: forward, gradients of input and scores.

No patch matrix is stored: programs compute where each element of their tile lies. With v = w * g(m):

- forward: rows are output pixels (b, oh, ow), columns output channels, the sum runs over (channel, tap)
- gradient of the input: rows are input pixels, columns input channels, the sum runs over (output channel,
  tap). A stride splits the input pixels into phases, each of which sees only the taps that reach it, so a
  stride costs no multiplications by zero (unless it comes with a dilation)
- gradient of the scores: rows are output channels, columns (channel, tap), the sum runs over the output
  pixels, split among programs so that every multiprocessor has work; the partial sums are added in a fixed
  order

Tensors are contiguous or have their channels last, which is what the operands' loads are wide in; the order
of the sum follows. Kernel size and stride are compile-time constants, all other sizes are not. In plain
PyTorch: ``torch.nn.functional.conv2d`` over ``ffw_fast.ops.gate_weight_default``. With few channels a group
(depthwise convolutions above all) most of a tile is empty: use the gated weight and cuDNN there.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from ffw_fast.kernels.gate import BERNOULLI, check_gate, inverse_temperature
from ffw_fast.kernels.matmul import (
    add_splits,
    block_range,
    check_same_dtype,
    check_shape,
    contiguous_place,
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

from ffw_fast.image_format import image_format

# Sizes that no variant is compiled for. Channel counts are not among them: loads are 16 bytes wide only if
# those are known to be multiples of 16.
_FREE = (
    "batch", "height", "width", "out_height", "out_width", "pad_h", "pad_w", "dilation_h", "dilation_w",
    "pixels_a_split",
)  # fmt: skip


@triton.jit
def image_strides(all_channels, height, width, CHANNELS_INNER: tl.constexpr):
    """Strides of a batch of images by image, channel, y and x; channels last or contiguous."""
    if CHANNELS_INNER:
        strides = (height * width * all_channels, 1, width * all_channels, all_channels)
    else:
        strides = (all_channels * height * width, height * width, width, 1)
    return strides


@triton.jit
def is_between(value, limit):
    """``0 <= value < limit`` by one comparison."""
    return value.to(tl.uint32) < limit.to(tl.uint32)


@triton.jit
def channel_and_tap(k, channels, taps, CHANNELS_INNER: tl.constexpr):
    """Channel and tap of a place in the sum; the order is that of the operands in memory."""
    if CHANNELS_INNER:
        channel = k % channels
        tap = k // channels
    else:
        channel = k // taps
        tap = k % taps
    return channel, tap


@triton.jit
def weight_place(out, channel, tap, channels, taps, CHANNELS_INNER: tl.constexpr):
    """Where a weight lies in memory, and where it would lie in the contiguous weight."""
    place = (out * channels + channel) * taps + tap
    offset = place
    if CHANNELS_INNER:
        offset = (out * taps + tap) * channels + channel
    return offset, place


@triton.jit(do_not_specialize=_FREE)
def conv2d_kernel(
    x_ptr, weight_ptr, scores_ptr, temperature_ptr, draw_ptr, bias_ptr, out_ptr,
    batch, height, width, out_height, out_width, channels, outs, pad_h, pad_w, dilation_h, dilation_w,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, RELU: tl.constexpr, CHANNELS_INNER: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``channels`` and ``outs`` are those of one group; program axis 1 counts the groups."""
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    rows = batch * out_height * out_width
    tile_m, tile_n = tile_of_program(tl.program_id(0), rows, outs, BLOCK_M, BLOCK_N)
    group, groups = tl.program_id(1), tl.num_programs(1)
    pixel = block_range(tile_m, BLOCK_M, WIDE)  # (b, oh, ow)
    ow = pixel % out_width
    oh = pixel // out_width % out_height
    image = pixel // (out_width * out_height)
    out = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inverse = inverse_temperature(tl.load(temperature_ptr))
    fan_in = channels * TAPS
    by_image, by_channel, by_y, by_x = image_strides(groups * channels, height, width, CHANNELS_INNER)
    first_y, first_x = oh * STRIDE_H - pad_h, ow * STRIDE_W - pad_w
    corner = image * by_image + group * channels * by_channel + first_y * by_y + first_x * by_x  # [M]
    first_y = tl.where(pixel < rows, first_y, -(2**30))  # outside whatever the tap
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, fan_in, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        channel, tap = channel_and_tap(k, channels, TAPS, CHANNELS_INNER)
        shift_y, shift_x = tap // KERNEL_W * dilation_h, tap % KERNEL_W * dilation_w
        shift = channel * by_channel + shift_y * by_y + shift_x * by_x  # [K]
        in_image = is_between(first_y[:, None] + shift_y[None, :], height)
        in_image &= is_between(first_x[:, None] + shift_x[None, :], width) & (k < fan_in)[None, :]
        patch = tl.load(x_ptr + (corner[:, None] + shift[None, :]), mask=in_image, other=0.0)  # [M, K]
        offsets = (group * outs + out)[None, :] * fan_in + k[:, None]  # k counts in the weight's own order
        places = offsets
        if KIND >= BERNOULLI and CHANNELS_INNER:
            places = contiguous_place((group * outs + out)[None, :], k[:, None], fan_in, channels)
        inside = (k < fan_in)[:, None] & (out < outs)[None, :]
        v = gated_tile(weight_ptr, scores_ptr, draw_ptr, offsets, places, inside, inverse, KIND)  # [K, N]
        accumulator = dot(patch, v, accumulator, PRECISION)
    if HAS_BIAS:
        accumulator += tl.load(bias_ptr + group * outs + out, mask=out < outs, other=0.0).to(tl.float32)[None, :]
    if RELU:
        accumulator = tl.where(accumulator < 0, 0.0, accumulator)  # keeps NaN
    by_image, by_channel, by_y, by_x = image_strides(groups * outs, out_height, out_width, CHANNELS_INNER)
    offsets = (image * by_image + oh * by_y + ow * by_x)[:, None] + ((group * outs + out) * by_channel)[None, :]
    tl.store(out_ptr + offsets, accumulator, mask=(pixel < rows)[:, None] & (out < outs)[None, :])


@triton.jit(do_not_specialize=_FREE)
def conv2d_input_grad_kernel(
    grad_ptr, output_ptr, weight_ptr, scores_ptr, temperature_ptr, draw_ptr, x_grad_ptr,
    batch, height, width, out_height, out_width, channels, outs, pad_h, pad_w, dilation_h, dilation_w,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PHASES_H: tl.constexpr, PHASES_W: tl.constexpr,
    KIND: tl.constexpr, RELU: tl.constexpr, CHANNELS_INNER: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program axis 1 counts the groups, axis 2 the phases: input pixels ``y % PHASES_H, x % PHASES_W``.

    With PHASES = STRIDE a phase's pixels are reached by every STRIDE-th tap alone; with PHASES = 1 by any
    tap, and those that miss the stride are masked.
    """
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    phase_h, phase_w = tl.program_id(2) // PHASES_W, tl.program_id(2) % PHASES_W
    phase_height = (height - phase_h + PHASES_H - 1) // PHASES_H
    phase_width = (width - phase_w + PHASES_W - 1) // PHASES_W
    tap_h, tap_w = (phase_h + pad_h) % PHASES_H, (phase_w + pad_w) % PHASES_W  # the first ones of this phase
    taps_h = tl.maximum((KERNEL_H - tap_h + PHASES_H - 1) // PHASES_H, 0)
    taps_w = tl.maximum((KERNEL_W - tap_w + PHASES_W - 1) // PHASES_W, 0)
    taps = taps_h * taps_w
    tl.static_assert(TAPS < 2048, "kernels have less than 2048 taps")
    inverse_taps_w = (1 << 20) // tl.maximum(taps_w, 1) + 1  # tap * it >> 20 is tap // taps_w: no subroutine

    phase_rows, phase_columns = (
        tl.maximum(phase_height, 1),
        tl.maximum(phase_width, 1),
    )  # nothing to divide by 0
    rows = batch * phase_height * phase_width
    # The grid is that of the largest phase; tiles past the end of a smaller one are masked out as a whole.
    tile_m, tile_n = tile_of_program(
        tl.program_id(0),
        batch * tl.cdiv(height, PHASES_H) * tl.cdiv(width, PHASES_W),
        channels,
        BLOCK_M,
        BLOCK_N,
    )
    group, groups = tl.program_id(1), tl.num_programs(1)
    pixel = block_range(tile_m, BLOCK_M, WIDE)  # (b, y, x) of the phase
    x = pixel % phase_columns * PHASES_W + phase_w
    y = pixel // phase_columns % phase_rows * PHASES_H + phase_h
    image = pixel // (phase_columns * phase_rows)
    channel = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inverse = inverse_temperature(tl.load(temperature_ptr))
    by_image, by_channel, by_y, by_x = image_strides(groups * outs, out_height, out_width, CHANNELS_INNER)
    reach_y, reach_x = y + pad_h - tap_h, x + pad_w - tap_w
    reach_y = tl.where(pixel < rows, reach_y, -(2**30))  # below the image whatever the tap
    base = image * by_image + group * outs * by_channel  # [M]
    depth = outs * taps
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        # The number of a phase's taps is no constant, and dividing by it would be a subroutine.
        out, tap = channel_and_tap(k, outs, taps, CHANNELS_INNER or PHASES_H * PHASES_W > 1)
        tap_row = tap * inverse_taps_w >> 20
        tap_column = tap - tap_row * taps_w
        if PHASES_H == STRIDE_H and PHASES_W == STRIDE_W:  # every tap of the phase reaches an output pixel
            oh = (reach_y // STRIDE_H)[:, None] - (tap_row * dilation_h)[None, :]
            ow = (reach_x // STRIDE_W)[:, None] - (tap_column * dilation_w)[None, :]
            inside = is_between(oh, out_height) & is_between(ow, out_width) & (k < depth)[None, :]
        else:
            far_y = reach_y[:, None] - (tap_row * PHASES_H * dilation_h)[None, :]  # oh * STRIDE_H, if such oh exists
            far_x = reach_x[:, None] - (tap_column * PHASES_W * dilation_w)[None, :]
            oh, ow = far_y // STRIDE_H, far_x // STRIDE_W
            inside = is_between(far_y, out_height * STRIDE_H) & (oh * STRIDE_H == far_y) & (k < depth)[None, :]
            inside &= is_between(far_x, out_width * STRIDE_W) & (ow * STRIDE_W == far_x)
        offsets = base[:, None] + (out * by_channel)[None, :] + oh * by_y + ow * by_x
        grad = output_gradient(grad_ptr, output_ptr, offsets, inside, RELU)  # [M, K]
        place_in_kernel = (tap_row * PHASES_H + tap_h) * KERNEL_W + tap_column * PHASES_W + tap_w
        offsets, places = weight_place(
            (group * outs + out)[:, None],
            channel[None, :],
            place_in_kernel[:, None],
            channels,
            TAPS,
            CHANNELS_INNER,
        )
        inside = (k < depth)[:, None] & (channel < channels)[None, :]
        v = gated_tile(weight_ptr, scores_ptr, draw_ptr, offsets, places, inside, inverse, KIND)  # [K, N]
        accumulator = dot(grad, v, accumulator, PRECISION)
    by_image, by_channel, by_y, by_x = image_strides(groups * channels, height, width, CHANNELS_INNER)
    offsets = (image * by_image + y * by_y + x * by_x)[:, None] + ((group * channels + channel) * by_channel)[None, :]
    tl.store(x_grad_ptr + offsets, accumulator, mask=(pixel < rows)[:, None] & (channel < channels)[None, :])


@triton.jit(do_not_specialize=_FREE)
def conv2d_score_grad_kernel(
    grad_ptr, output_ptr, x_ptr, weight_ptr, scores_ptr, temperature_ptr, draw_ptr, scores_grad_ptr,
    partials_ptr, batch, height, width, out_height, out_width, channels, outs, pad_h, pad_w, dilation_h,
    dilation_w, pixels_a_split,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    KIND: tl.constexpr, RELU: tl.constexpr, SPLIT: tl.constexpr, CHANNELS_INNER: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program axis 1 counts the groups, axis 2 the parts that the sum over the pixels is split into."""
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    fan_in = channels * TAPS
    tile_m, tile_n = tile_of_program(tl.program_id(0), outs, fan_in, BLOCK_M, BLOCK_N)
    group, groups = tl.program_id(1), tl.num_programs(1)
    out = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    channel, tap = channel_and_tap(k, channels, TAPS, CHANNELS_INNER)
    shift_y = tap // KERNEL_W * dilation_h - pad_h
    shift_x = tap % KERNEL_W * dilation_w - pad_w
    by_image, by_channel, by_y, by_x = image_strides(groups * channels, height, width, CHANNELS_INNER)
    shift = (group * channels + channel) * by_channel + shift_y * by_y + shift_x * by_x  # [N]
    shift_y = tl.where(k < fan_in, shift_y, -(2**30))  # outside whatever the pixel
    out_by_image, out_by_channel, out_by_y, out_by_x = image_strides(
        groups * outs, out_height, out_width, CHANNELS_INNER
    )
    split = tl.program_id(2)
    if WIDE:
        split = split.to(tl.int64)
    first = split * pixels_a_split
    last = tl.minimum(first + pixels_a_split, batch * out_height * out_width)
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(first, last, BLOCK_K):
        pixel = start + tl.arange(0, BLOCK_K)  # (b, oh, ow)
        if WIDE:
            pixel = pixel.to(tl.int64)
        ow = pixel % out_width
        oh = pixel // out_width % out_height
        image = pixel // (out_width * out_height)
        offsets = image * out_by_image + oh * out_by_y + ow * out_by_x
        offsets = ((group * outs + out) * out_by_channel)[:, None] + offsets[None, :]
        inside = (out < outs)[:, None] & (pixel < last)[None, :]
        grad = output_gradient(grad_ptr, output_ptr, offsets, inside, RELU)  # [M, K]
        first_y, first_x = oh * STRIDE_H, ow * STRIDE_W
        corner = image * by_image + first_y * by_y + first_x * by_x  # [K]
        inside = is_between(first_y[:, None] + shift_y[None, :], height) & (pixel < last)[:, None]
        inside &= is_between(first_x[:, None] + shift_x[None, :], width)
        patch = tl.load(x_ptr + (corner[:, None] + shift[None, :]), mask=inside, other=0.0)  # [K, N]
        accumulator = dot(grad, patch, accumulator, PRECISION)
    row = (group * outs + out)[:, None]
    offsets = row * fan_in + k[None, :]  # k counts in the weight's own order
    inside = (out < outs)[:, None] & (k < fan_in)[None, :]
    if SPLIT:
        part = partials_ptr + tl.program_id(2).to(tl.int64) * groups * outs * fan_in
        tl.store(part + offsets, accumulator, mask=inside)
    else:
        places = offsets
        if KIND >= BERNOULLI and CHANNELS_INNER:
            places = contiguous_place(row, k[None, :], fan_in, channels)
        inverse = inverse_temperature(tl.load(temperature_ptr))
        result = score_gradient(accumulator, weight_ptr, scores_ptr, draw_ptr, offsets, places, inside, inverse, KIND)
        tl.store(scores_grad_ptr + offsets, result, mask=inside)


# Launchers --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shape:
    """The sizes of one convolution, checked.

    Attributes:
        x: (batch, channels, height, width); ``out`` likewise.
        weight: (outs, channels / groups, kernel height, kernel width).
    """

    x: tuple[int, ...]
    weight: tuple[int, ...]
    out: tuple[int, ...]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @classmethod
    def of(cls, x: tuple[int, ...], weight: Tensor, stride, padding, dilation, groups: int) -> "_Shape":
        outs, channels, *kernel = weight.shape
        if len(x) != 4 or x[1] != channels * groups or outs % groups:
            raise ValueError(
                f"expected x (batch, {channels * groups}, height, width) for a weight {tuple(weight.shape)} "
                f"and {groups} groups, got {tuple(x)}"
            )
        stride, padding, dilation = (_pair(value) for value in (stride, padding, dilation))
        size = [
            (extent + 2 * pad - gap * (taps - 1) - 1) // step + 1
            for extent, pad, gap, taps, step in zip(x[2:], padding, dilation, kernel, stride, strict=True)
        ]
        if min(size) < 1:
            raise ValueError(f"the kernel of a weight {tuple(weight.shape)} is larger than the padded x {tuple(x)}")
        return cls(tuple(x), tuple(weight.shape), (x[0], outs, *size), stride, padding, dilation, groups)

    @property
    def group_outs(self) -> int:
        return self.weight[0] // self.groups

    @property
    def fan_in(self) -> int:
        return self.weight[1] * self.weight[2] * self.weight[3]

    def sizes(self) -> tuple[int, ...]:
        """The run-time sizes, in the kernels' order."""
        return (
            self.x[0],
            *self.x[2:],
            *self.out[2:],
            self.weight[1],
            self.group_outs,
            *self.padding,
            *self.dilation,
        )

    def constants(self) -> dict[str, int]:
        """The compile-time sizes."""
        (kernel_h, kernel_w), (stride_h, stride_w) = self.weight[2:], self.stride
        return {"KERNEL_H": kernel_h, "KERNEL_W": kernel_w, "STRIDE_H": stride_h, "STRIDE_W": stride_w}


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    temperature: Tensor,
    draw: Tensor,
    kind: int,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    relu: bool = False,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> Tensor:
    """``relu(conv2d(x, weight * gate, bias))``; the result has its channels last where x has.

    Args:
        kind: number of the gate kind.
        relu: apply ReLU to the result.
        precision: of float32 operands, "ieee" or "tf32".
        tile: instead of the one that the table gives.
    """
    check_gate(weight, scores, temperature, draw)
    check_same_dtype(weight, x=x, bias=bias)
    shape = _Shape.of(tuple(x.shape), weight, stride, padding, dilation, groups)
    memory_format, channels_inner = _format(x)
    x, weight, scores = (tensor.contiguous(memory_format=memory_format) for tensor in (x, weight, scores))
    draw, bias = draw.contiguous(), None if bias is None else bias.contiguous()
    out = torch.empty(shape.out, dtype=x.dtype, device=x.device, memory_format=memory_format)
    if out.numel():
        rows, columns = shape.out[0] * shape.out[2] * shape.out[3], shape.group_outs
        tile = tile or choose_tile("conv", x, precision, rows, columns)
        with torch.cuda.device_of(x):
            conv2d_kernel[(tile.count(rows, columns), groups)](
                x, weight, scores, temperature, draw, bias, out, *shape.sizes(), **shape.constants(),
                KIND=int(kind), HAS_BIAS=bias is not None, RELU=relu, CHANNELS_INNER=channels_inner,
                PRECISION=triton_precision(x.dtype, precision), WIDE=is_wide(x, weight, out),
                **tile.launch_options(),
            )  # fmt: skip
    return out


def masked_conv2d_input_grad(
    grad: Tensor,
    input_shape: tuple[int, ...],
    weight: Tensor,
    scores: Tensor,
    temperature: Tensor,
    draw: Tensor,
    kind: int,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    output: Tensor | None = None,
    precision: str = "ieee",
    tile: Tile | None = None,
) -> Tensor:
    """Gradient of the input, of ``input_shape``, of that of the output; channels are last where grad's are.

    Args:
        output: what the layer returned, where it applied ReLU; None where it did not.
    """
    check_gate(weight, scores, temperature, draw)
    check_same_dtype(weight, grad=grad, output=output)
    shape = _Shape.of(tuple(input_shape), weight, stride, padding, dilation, groups)
    check_shape("grad", grad, shape.out)
    if output is not None:
        check_shape("output", output, shape.out)
    memory_format, channels_inner = _format(grad)
    grad, weight, scores = (tensor.contiguous(memory_format=memory_format) for tensor in (grad, weight, scores))
    draw = draw.contiguous()
    output = None if output is None else output.contiguous(memory_format=memory_format)
    out = torch.empty(shape.x, dtype=grad.dtype, device=grad.device, memory_format=memory_format)
    if not out.numel():
        return out
    phases = [step if gap == 1 else 1 for step, gap in zip(shape.stride, shape.dilation, strict=True)]
    rows = shape.x[0] * triton.cdiv(shape.x[2], phases[0]) * triton.cdiv(shape.x[3], phases[1])
    columns = shape.weight[1]
    tile = tile or choose_tile("conv", grad, precision, rows, columns)
    with torch.cuda.device_of(grad):
        conv2d_input_grad_kernel[(tile.count(rows, columns), groups, phases[0] * phases[1])](
            grad, output, weight, scores, temperature, draw, out, *shape.sizes(), **shape.constants(),
            PHASES_H=phases[0], PHASES_W=phases[1], KIND=int(kind), RELU=output is not None,
            CHANNELS_INNER=channels_inner, PRECISION=triton_precision(grad.dtype, precision),
            WIDE=is_wide(grad, weight, out), **tile.launch_options(),
        )  # fmt: skip
    return out


def masked_conv2d_score_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    temperature: Tensor,
    draw: Tensor,
    kind: int,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    output: Tensor | None = None,
    precision: str = "ieee",
    tile: Tile | None = None,
    splits: int | None = None,
) -> Tensor:
    """Gradient of the scores, in their shape and dtype; its channels are last where x's are.

    Args:
        output: what the layer returned, where it applied ReLU; None where it did not.
        splits: into how many parts the sum over the pixels is split, instead of what the rule gives.
    """
    check_gate(weight, scores, temperature, draw)
    check_same_dtype(weight, grad=grad, x=x, output=output)
    shape = _Shape.of(tuple(x.shape), weight, stride, padding, dilation, groups)
    check_shape("grad", grad, shape.out)
    if output is not None:
        check_shape("output", output, shape.out)
    memory_format, channels_inner = _format(x)
    grad, x, weight, scores = (tensor.contiguous(memory_format=memory_format) for tensor in (grad, x, weight, scores))
    draw = draw.contiguous()
    output = None if output is None else output.contiguous(memory_format=memory_format)
    out = torch.empty_like(scores)
    if not out.numel():
        return out
    pixels = shape.out[0] * shape.out[2] * shape.out[3]
    tile = tile or choose_tile("conv", x, precision, shape.group_outs, shape.fan_in)
    tiles = tile.count(shape.group_outs, shape.fan_in)
    parts = splits or choose_splits(x, tiles * groups, pixels, tile.depth)
    partials = out.new_empty(parts, out.numel(), dtype=torch.float32) if parts > 1 else None
    with torch.cuda.device_of(x):
        conv2d_score_grad_kernel[(tiles, groups, parts)](
            grad, output, x, weight, scores, temperature, draw, out, partials, *shape.sizes(),
            tile.depth * triton.cdiv(triton.cdiv(pixels, tile.depth), parts), **shape.constants(),
            KIND=int(kind), RELU=output is not None, SPLIT=parts > 1, CHANNELS_INNER=channels_inner,
            PRECISION=triton_precision(x.dtype, precision), WIDE=is_wide(x, weight, grad),
            **tile.launch_options(),
        )  # fmt: skip
        if partials is not None:
            add_splits(partials, weight, scores, temperature, draw, out, kind, channels_inner)
    return out


def _format(tensor: Tensor) -> tuple[torch.memory_format, bool]:
    """The memory format to compute in, that of the tensor if it has one, and whether channels come last."""
    memory_format = image_format(tensor)
    return memory_format, memory_format == torch.channels_last


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
