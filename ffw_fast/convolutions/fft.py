"""Convolutions with large kernels by FFT: for images of one magnitude as accurate as direct ones, with far fewer FLOPs.

A stride-1 'same' convolution of H x W images is a circular one of length L >= H + k // 2 in each dimension:
what wraps around falls on outputs that nobody reads. With w'[(k // 2 - t) mod L] = w[t] it is, for each
frequency f, a product of complex matrices:

    y^[f] = w^[f] x^[f],   dx^[f] = w^[f]* dy^[f],   dw^[f] = dy^[f] x^[f]*

so the forward pass transforms x and w, the backward pass dy alone. A 7x7 convolution of 28x28 images takes
514 complex products (of three real ones each) for a pair of channels instead of 38416 real ones.

Two arrays are transformed together, as real and imaginary part, so that rounding errors are relative to the larger of
the two, and what is not finite in one reaches the other.

Tensors are (N, C, H, W) as everywhere, but results lie in memory as (C, H, W, N), the batch innermost, which
lets every step run on whole vectors; elementwise operators keep that order, and inputs may lie in any.

Operators, with plain-PyTorch default kernels (float32, float64) beside the compiled ones (float32):

- ``fft_conv2d``: the convolution; fills the spectra that it is given, which the gradients need.
- ``fft_conv2d_backward``: the gradient of x where the weight's spectrum is given, and that of the weight
  where x's is.

A spectrum is a flat tensor of ``spectrum_sizes`` numbers: for each frequency the real, then the imaginary
parts of all entries, twice as large as a transform is. Of f and -f, whose values are conjugate, one is kept.
"""

import functools
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ffw_fast.convolutions.batch_innermost import new_batch_innermost

LARGEST_KERNEL = 11
LARGEST_IMAGE = 240

# Padding of a channel's images, padding of all entries, and numbers after each frequency: csrc/cpu/fft_conv.h
_BATCH_MULTIPLE, _ENTRY_MULTIPLE, _GAP = 16, 32, 16

_library = torch.library.Library("ffw_fast", "FRAGMENT")


# Shapes -----------------------------------------------------------------------------------------------------


def transform_length(size: int, kernel: int) -> int:
    """The shortest product of 2, 3 and 5 that the circular convolution may have."""
    length = max(2, size + kernel // 2, kernel)
    while not _is_smooth(length):
        length += 1
    return length


def _is_smooth(number: int) -> bool:
    for prime in (2, 3, 5):
        while number % prime == 0:
            number //= prime
    return number == 1


def _transform_lengths(images: Sequence[int], weight: Sequence[int]) -> tuple[int, int]:
    return transform_length(images[2], weight[2]), transform_length(images[3], weight[3])


def kept_frequencies(height: int, width: int) -> int:
    """How many frequencies of a height x width transform are kept."""
    self_conjugate = (2 - height % 2) * (2 - width % 2)
    return (height * width + self_conjugate) // 2


def _padded(number: int, multiple: int) -> int:
    return (number + multiple - 1) // multiple * multiple


def spectrum_sizes(images: Sequence[int], weight: Sequence[int]) -> tuple[int, int]:
    """Numbers in the spectrum of images (N, C, H, W) and in that of a weight (K, C, h, w)."""
    frequencies = kept_frequencies(*_transform_lengths(images, weight))
    image_entries = _padded(images[1] * _padded(images[0], _BATCH_MULTIPLE), _ENTRY_MULTIPLE)
    kernel_entries = _padded(weight[0] * weight[1], _ENTRY_MULTIPLE)
    return frequencies * (2 * image_entries + _GAP), frequencies * (2 * kernel_entries + _GAP)


def _check(name: str, images: Tensor, weight: Tensor, channels: int) -> None:
    torch._check_value(
        weight.dim() == 4 and all(size % 2 == 1 and size <= LARGEST_KERNEL for size in weight.shape[2:]),
        lambda: f"kernel sizes must be odd and at most {LARGEST_KERNEL}, got a weight {tuple(weight.shape)}",
    )
    torch._check_value(
        images.dim() == 4 and images.shape[1] == channels and min(images.shape[1:]) > 0,
        lambda: (
            f"{name} must be (images, {channels}, height, width) for a weight {tuple(weight.shape)}, "
            f"got {tuple(images.shape)}"
        ),
    )
    torch._check_value(
        max(images.shape[2:]) <= LARGEST_IMAGE,
        lambda: f"{name} must be at most {LARGEST_IMAGE} pixels high and wide, got {tuple(images.shape)}",
    )
    torch._check_type(
        images.is_floating_point() and images.dtype == weight.dtype,
        lambda: f"{name} must have the weight's dtype {weight.dtype}, got {images.dtype}",
    )


def _check_sizes(x_spectrum: Tensor | None, weight_spectrum: Tensor | None, sizes: tuple[int, int]) -> None:
    _check_size("x_spectrum", x_spectrum, sizes[0])
    _check_size("weight_spectrum", weight_spectrum, sizes[1])


def _check_size(name: str, spectrum: Tensor | None, size: int) -> None:
    if spectrum is not None:
        shape = spectrum.shape
        torch._check_value(shape == (size,), lambda: f"{name} must have shape {(size,)}, got {tuple(shape)}")


# Spectra of the default kernels: complex [frequency, row, column] -------------------------------------------


def _frequencies(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The kept frequencies (k_y, k_x), in the order of csrc/cpu/fft_conv.h."""
    rows: list[int] = []
    columns: list[int] = []
    for kx in range(width // 2 + 1):
        kept = height // 2 + 1 if (2 * kx) % width == 0 else height
        rows += range(kept)
        columns += [kx] * kept
    return torch.tensor(rows, device=device), torch.tensor(columns, device=device)


def _transform(arrays: Tensor, height: int, width: int) -> Tensor:
    """Twice the kept frequencies of arrays (rows, columns, h, w)."""
    ky, kx = _frequencies(height, width, arrays.device)
    if arrays.numel() == 0:  # which fft2 does not take
        return arrays.new_empty(len(ky), *arrays.shape[:2], dtype=arrays.dtype.to_complex())
    return 2 * torch.fft.fft2(arrays, s=(height, width))[..., ky, kx].permute(2, 0, 1)


def _transform_back(spectrum: Tensor, height: int, width: int) -> Tensor:
    """Arrays (rows, columns, height, width) of a product of two spectra."""
    ky, kx = _frequencies(height, width, spectrum.device)
    values = spectrum.permute(1, 2, 0)
    full = values.new_empty(*values.shape[:2], height, width)
    full[..., -ky % height, -kx % width] = values.conj()
    full[..., ky, kx] = values
    return (torch.fft.ifft2(full) if full.numel() > 0 else full).real / 4


def _kernels(weight: Tensor, height: int, width: int) -> Tensor:
    """Taps t at positions (k // 2 - t) mod L."""
    y, x = _positions(weight, height, width)
    placed = weight.new_zeros(*weight.shape[:2], height, width)
    placed[..., y, x] = weight
    return placed


def _positions(weight: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    (h, w), device = weight.shape[2:], weight.device
    y = (h // 2 - torch.arange(h, device=device)) % height
    x = (w // 2 - torch.arange(w, device=device)) % width
    return y.unsqueeze(1), x


def _pack(spectrum: Tensor, multiple: int) -> Tensor:
    """Complex [frequency, row, column] to a flat spectrum whose rows are padded to a multiple."""
    frequencies, rows, columns = spectrum.shape
    row = _padded(columns, multiple)
    entries = _padded(rows * row, _ENTRY_MULTIPLE)
    flat = spectrum.real.new_zeros(frequencies, 2 * entries + _GAP)
    for part, values in enumerate((spectrum.real, spectrum.imag)):
        flat[:, part * entries : part * entries + rows * row].view(frequencies, rows, row)[..., :columns] = values
    return flat.flatten()


def _unpack(flat: Tensor, frequencies: int, rows: int, columns: int, multiple: int) -> Tensor:
    row = _padded(columns, multiple)
    entries = _padded(rows * row, _ENTRY_MULTIPLE)
    parts = flat.view(frequencies, -1)[:, : 2 * entries].unflatten(1, (2, entries))[..., : rows * row]
    real, imaginary = parts.unflatten(2, (rows, row))[..., :columns].unbind(1)
    return torch.complex(real, imaginary)


# fft_conv2d -------------------------------------------------------------------------------------------------


def fft_conv2d_default(
    x: Tensor, weight: Tensor, bias: Tensor | None, x_spectrum: Tensor | None, weight_spectrum: Tensor | None
) -> Tensor:
    _check("x", x, weight, weight.shape[1])
    _check_sizes(x_spectrum, weight_spectrum, spectrum_sizes(x.shape, weight.shape))
    lengths = _transform_lengths(x.shape, weight.shape)
    x_hat = _transform(x.transpose(0, 1), *lengths)  # [F, C, N]
    weight_hat = _transform(_kernels(weight, *lengths), *lengths)  # [F, K, C]
    if x_spectrum is not None:
        x_spectrum.copy_(_pack(x_hat, _BATCH_MULTIPLE))
    if weight_spectrum is not None:
        weight_spectrum.copy_(_pack(weight_hat, 1))
    y = _transform_back(weight_hat @ x_hat, *lengths)[..., : x.shape[2], : x.shape[3]].transpose(0, 1)
    y = y if bias is None else y + bias.view(-1, 1, 1)
    return new_batch_innermost(y, *y.shape).copy_(y)


def fft_conv2d_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, x_spectrum: Tensor | None, weight_spectrum: Tensor | None
) -> Tensor:
    _check("x", x, weight, weight.shape[1])
    return new_batch_innermost(x, x.shape[0], weight.shape[0], *x.shape[2:])


# fft_conv2d_backward ----------------------------------------------------------------------------------------


def fft_conv2d_backward_default(
    grad: Tensor, weight: Tensor, x_spectrum: Tensor | None, weight_spectrum: Tensor | None
) -> tuple[Tensor, Tensor]:
    _check("grad", grad, weight, weight.shape[0])
    outputs, inputs = weight.shape[:2]
    images, _, height, width = grad.shape
    _check_sizes(x_spectrum, weight_spectrum, spectrum_sizes((images, inputs, height, width), weight.shape))
    lengths = _transform_lengths(grad.shape, weight.shape)
    frequencies = kept_frequencies(*lengths)
    grad_hat = _transform(grad.transpose(0, 1), *lengths)  # [F, K, N]
    x_grad, weight_grad = fft_conv2d_backward_fake(grad, weight, x_spectrum, weight_spectrum)
    if weight_spectrum is not None:
        weight_hat = _unpack(weight_spectrum, frequencies, outputs, inputs, 1)
        x_grad = _transform_back(weight_hat.mH @ grad_hat, *lengths)[..., :height, :width].transpose(0, 1)
    if x_spectrum is not None:
        x_hat = _unpack(x_spectrum, frequencies, inputs, images, _BATCH_MULTIPLE)
        y, x = _positions(weight, *lengths)
        weight_grad = _transform_back(grad_hat @ x_hat.mH, *lengths)[..., y, x]
    return new_batch_innermost(x_grad, *x_grad.shape).copy_(x_grad), weight_grad.contiguous()


def fft_conv2d_backward_fake(
    grad: Tensor, weight: Tensor, x_spectrum: Tensor | None, weight_spectrum: Tensor | None
) -> tuple[Tensor, Tensor]:
    _check("grad", grad, weight, weight.shape[0])
    outputs, inputs, kernel_height, kernel_width = weight.shape
    images, _, height, width = grad.shape
    return (
        new_batch_innermost(grad, 0 if weight_spectrum is None else images, inputs, height, width),
        weight.new_empty(0 if x_spectrum is None else outputs, inputs, kernel_height, kernel_width),
    )


def _define(schema: str, default: Any, fake: Any) -> None:
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.split("(", 1)[0]
    _library.impl(name, default, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ffw_fast::{name}", fake, lib=_library)


_define(
    "fft_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor(a!)? x_spectrum, Tensor(b!)? weight_spectrum) -> Tensor",
    fft_conv2d_default,
    fft_conv2d_fake,
)
_define(
    "fft_conv2d_backward(Tensor grad, Tensor weight, Tensor? x_spectrum, Tensor? weight_spectrum) -> (Tensor, Tensor)",
    fft_conv2d_backward_default,
    fft_conv2d_backward_fake,
)
_forward = torch.ops.ffw_fast.fft_conv2d.default
_backward = torch.ops.ffw_fast.fft_conv2d_backward.default


# Autograd ---------------------------------------------------------------------------------------------------

_free_memory: list[Tensor] = []  # for spectra, between one step and the next
_lending = threading.Lock()


class _Loan:
    """Memory for one spectrum, from the forward pass until its graph is gone.

    It is lent again and again: the kernel of the system clears fresh memory at the price of a transform.
    """

    def __init__(self, size: int, like: Tensor) -> None:
        with _lending:
            fitting = [
                index
                for index, free in enumerate(_free_memory)
                if size <= free.numel() <= 2 * size and free.dtype == like.dtype and free.device == like.device
            ]
            smallest = min(fitting, key=lambda index: _free_memory[index].numel(), default=None)
            self.memory = like.new_empty(size) if smallest is None else _free_memory.pop(smallest)

    def __del__(self) -> None:
        _free_memory.append(self.memory)


def _is_kept_elsewhere() -> bool:
    """Whether hooks keep what is saved, as checkpointing does: it may need that longer than its graph lives."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def release_memory() -> None:
    """Give up the memory that is kept for the spectra of the next step."""
    with _lending:
        _free_memory.clear()


@contextmanager
def memory_of_steps() -> Iterator[None]:
    """Where steps are taken one after the other; afterwards the memory for their spectra is given up."""
    try:
        yield
    finally:
        release_memory()


class _FftConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.loans = []

        def new_spectrum(size: int) -> Tensor:
            if torch.compiler.is_compiling() or _is_kept_elsewhere():
                return x.new_empty(size)
            ctx.loans.append(_Loan(size, x))
            return ctx.loans[-1].memory[:size]

        x_size, weight_size = spectrum_sizes(x.shape, weight.shape)
        x_spectrum = new_spectrum(x_size) if needs_weight else None
        weight_spectrum = new_spectrum(weight_size) if needs_x else None
        y = _forward(x, weight, bias, x_spectrum, weight_spectrum)
        ctx.save_for_backward(weight, x_spectrum, weight_spectrum)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        x_grad = weight_grad = None
        if needs_x or needs_weight:
            x_grad, weight_grad = _backward(grad, *ctx.saved_tensors)
        return (
            x_grad if needs_x else None,
            weight_grad if needs_weight else None,
            grad.sum((0, 2, 3)) if needs_bias else None,
        )


def fft_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolution with stride 1 and zero padding of ``k // 2``, by FFT.

    Args:
        x: float32 (N, C, H, W), at most 240 x 240, in any memory order; (C, H, W, N) is the fastest.
        weight: float32 (K, C, h, w), h and w odd and at most 11.
        bias: float32 (K,).

    Returns:
        (N, K, H, W), in memory order (K, H, W, N).

    Raises:
        ValueError: unsupported shapes.
        TypeError: unsupported dtypes (a RuntimeError from the compiled kernels).
    """
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _FftConv2d.apply(x, weight, bias)
    return _forward(x, weight, bias, None, None)


# Networks ---------------------------------------------------------------------------------------------------


class FftConv2d(nn.Conv2d):
    """``nn.Conv2d`` that convolves float32 images by FFT, under autocast too where that beats a product in bf16."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.dim() != 4 or not self._is_by_fft(input, weight):
            return super()._conv_forward(input, weight, bias)
        return fft_conv2d(input.float(), weight, bias)

    def _is_by_fft(self, input: Tensor, weight: Tensor) -> bool:
        if torch.is_autocast_enabled(input.device.type) and weight.dtype == torch.float32:
            height, width = input.shape[2:]
            return is_worth_it(height, width, weight.shape, low_precision_rate())
        return input.dtype == weight.dtype == torch.float32


def direct_cost(height: int, width: int, weight: Sequence[int]) -> float:
    """FLOPs of a direct convolution, for each image."""
    return 2.0 * height * width * math.prod(weight)


def fft_cost(height: int, width: int, weight: Sequence[int], batch: int = 100) -> float:
    """FLOPs that a direct convolution could do in the time of one by FFT, for each image.

    A complex product is three real ones, at three quarters of a direct convolution's rate; transforms, which
    memory holds up, count 20 for each point and each doubling of their number. Weights are transformed once a
    batch.
    """
    outputs, inputs = weight[:2]
    lengths = _transform_lengths((batch, inputs, height, width), weight)
    points = math.prod(lengths)
    transforms = 20 * points * math.log2(points)
    products = 8 * kept_frequencies(*lengths) * outputs * inputs
    return products + transforms * (inputs + outputs + inputs * outputs / batch)


def is_worth_it(height: int, width: int, weight: Sequence[int], rate: float = 1.0) -> bool:
    """Whether an FFT convolution is cheaper by these costs: by shapes alone, so in float32 the same on any machine.

    The estimate is of the forward pass, and so cautious: both gradients share spectra with it.

    Args:
        rate: of the direct convolution it is compared with, over the rate in float32.
    """
    direct = direct_cost(height, width, weight) / rate
    return max(height, width) <= LARGEST_IMAGE and direct >= fft_cost(height, width, weight)


@functools.cache
def low_precision_rate() -> float:
    """How many times as fast as in float32 this processor convolves in bf16 directly, by the instructions it has.

    In round numbers, from oneDNN's: matrix tiles (AMX), dot products of pairs, or neither, where bf16 is emulated.
    """
    if torch.cpu._is_amx_tile_supported():
        return 8.0
    return 2.0 if torch.cpu._is_avx512_bf16_supported() else 0.5


def can_use_fft(layer: nn.Conv2d) -> bool:
    """Whether a layer is a stride-1 'same' convolution in float32 on the CPU with an odd kernel, not too large."""
    if layer.weight.dtype != torch.float32 or layer.weight.device.type != "cpu":
        return False
    kernel = layer.kernel_size
    same = layer.padding == "same" or layer.padding == tuple(size // 2 for size in kernel)
    plain = layer.stride == layer.dilation == (1, 1) and layer.groups == 1 and layer.padding_mode == "zeros"
    return same and plain and all(size % 2 == 1 and size <= LARGEST_KERNEL for size in kernel)


def has_compiled_kernel() -> bool:
    """Whether the CPU has more than the plain-PyTorch kernel, which is slower than a direct convolution."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("ffw_fast::fft_conv2d", "CPU")
