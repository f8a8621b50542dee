"""The gate's arithmetic, once, for every Triton kernel: ``ffw_fast.gates`` and ``ffw_fast.philox`` in Triton.

Sampled masks must be the same bits on every backend, so whatever decides one (Philox, ``reproducible_exp``,
the comparisons) rounds after every single operation. Triton fuses ``a * b + c`` unless a kernel is launched
with ``enable_fp_fusion=False``, which makes it emit ``mul.rn`` and ``add.rn``, which the assembler may not
contract: every launch of this package passes that option. It costs nothing where it matters: the elementwise
kernels wait for memory, and ``tl.dot`` keeps its fused multiply-adds.

All values are float32; 16-bit ones are widened by the caller. ``KIND`` is the number of
``ffw_fast.gates.GateKind``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FFW = tl.constexpr(0)
HARD = tl.constexpr(1)
BERNOULLI = tl.constexpr(2)
CONCRETE = tl.constexpr(3)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Exponential, logarithm, quotients --------------------------------------------------------------------------


@triton.jit
def reproducible_exp(x):
    """``exp(x)`` as in ``ffw_fast.gates``, rounding by rounding; clamped to [-87, 88], NaN stays NaN."""
    x = tl.where(x < -87.0, -87.0, x)  # a comparison with NaN is false and keeps it
    x = tl.where(x > 88.0, 88.0, x)
    # Adding 1.5 * 2^23 leaves the nearest integer (ties to even) in the low bits of the sum.
    shifted = x * 1.44269504088896341 + 12582912.0
    exponent = shifted - 12582912.0
    rest = (x - exponent * 0.693359375) - exponent * -2.12194440e-4
    polynomial = 1.9875691500e-4 * rest + 1.3981999507e-3
    polynomial = polynomial * rest + 8.3334519073e-3
    polynomial = polynomial * rest + 4.1665795894e-2
    polynomial = polynomial * rest + 1.6666665459e-1
    polynomial = polynomial * rest + 0.5
    value = (polynomial * (rest * rest) + rest) + 1.0
    integer = shifted.to(tl.int32, bitcast=True) - 0x4B400000  # the bits of 1.5 * 2^23
    return value * ((integer + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def decay(x):
    """``exp(x)`` for x <= 0 where nothing is compared: 0 below the clamp."""
    return tl.where(x < -87.0, 0.0, reproducible_exp(x))


@triton.jit
def split(x):
    """A normal x > 0 as ``rest * 2**exponent``, the rest in [sqrt(1/2), sqrt(2)); both float32."""
    offset = x.to(tl.int32, bitcast=True) - 0x3F3504F3  # the bits of sqrt(1/2)
    rest = ((offset & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    return rest, (offset >> 23).to(tl.float32)


@triton.jit
def logarithm_of(exponent, s):
    """``log(2**exponent (1 + s) / (1 - s))`` for |s| <= 1/3: the series of ``2 artanh(s)``."""
    z = s * s
    series = (1.0 / 15.0) * z + (1.0 / 13.0)
    series = series * z + (1.0 / 11.0)
    series = series * z + (1.0 / 9.0)
    series = series * z + (1.0 / 7.0)
    series = series * z + (1.0 / 5.0)
    series = series * z + (1.0 / 3.0)
    return exponent * 0.693359375 + (2.0 * s + (2.0 * s * z * series + exponent * -2.12194440e-4))


@triton.jit
def logarithm(x):
    """``log(x)`` of a normal x > 0."""
    rest, exponent = split(x)
    return logarithm_of(exponent, (rest - 1.0) / (rest + 1.0))


@triton.jit
def log_odds(u):
    """``log(u / (1 - u))`` of u in (0, 1), with one series and one division."""
    rest, exponent = split(u)
    other_rest, other_exponent = split(1.0 - u)
    return logarithm_of(exponent - other_exponent, (rest - other_rest) / (rest + other_rest))


@triton.jit
def _remainder(a, b):
    """``1 - a b`` without rounding, for a b near 1: Dekker's product, since nothing may be fused here."""
    product = a * b
    split = a * 4097.0
    a_high = split - (split - a)
    a_low = a - a_high
    split = b * 4097.0
    b_high = split - (split - b)
    b_low = b - b_high
    error = (((a_high * b_high - product) + a_high * b_low) + a_low * b_high) + a_low * b_low
    return (1.0 - product) - error


@triton.jit
def inverse_temperature(temperature):
    """``1 / T``, rounded once.

    A GPU's quick division is off by up to 2 units in the last place and the exact one is a subroutine, so of
    the quick quotient and its neighbours the one with the smallest remainder is taken: the rounded quotient.
    """
    guess = 1.0 / temperature
    best = guess
    smallest = tl.abs(_remainder(temperature, guess))
    for step in tl.static_range(-2, 3):
        other = (guess.to(tl.int32, bitcast=True) + step).to(tl.float32, bitcast=True)
        remainder = tl.abs(_remainder(temperature, other))
        better = remainder < smallest
        best = tl.where(better, other, best)
        smallest = tl.where(better, remainder, smallest)
    return best


@triton.jit
def negative_expm1(x):
    """``1 - exp(x)`` for x <= 0, to a few units in the last place near 0 too: a bias correction of Adam."""
    series = x * (1.0 / 5040.0) + (1.0 / 720.0)
    series = series * x + (1.0 / 120.0)
    series = series * x + (1.0 / 24.0)
    series = series * x + (1.0 / 6.0)
    series = series * x + 0.5
    series = series * x + 1.0
    return tl.where(x > -0.35, -x * series, 1.0 - decay(x))


# Uniform numbers: Philox4x32-10 -----------------------------------------------------------------------------


@triton.jit
def philox_words(draw_ptr, quad):
    """The four words of elements ``4 quad .. 4 quad + 3`` of a tensor; ``quad`` is an int64 tensor."""
    seed = tl.load(draw_ptr)
    number = tl.load(draw_ptr + 1)
    block = quad + (tl.load(draw_ptr + 2) >> 2)
    low = block.to(tl.uint32)
    zeros = tl.zeros_like(low)
    return tl.philox(seed, low, (block >> 32).to(tl.uint32), number.to(tl.uint32) + zeros,
                     (number >> 32).to(tl.uint32) + zeros)  # fmt: skip


@triton.jit
def uniform_of_word(word):
    """The odd multiple of ``2**-24`` in (0, 1) that a word stands for: u and 1 - u are exact."""
    return ((word >> 9) * 2 + 1).to(tl.int32).to(tl.float32) * 5.9604644775390625e-8


@triton.jit
def uniform_of_block(draw_ptr, start, BLOCK: tl.constexpr):
    """The uniform numbers of elements ``start .. start + BLOCK - 1``, [BLOCK]; start is a multiple of 4.

    One Philox call serves four elements; a thread that holds four neighbours joins them without leaving
    registers.
    """
    quad = (start >> 2) + tl.arange(0, BLOCK // 4).to(tl.int64)
    first, second, third, fourth = philox_words(draw_ptr, quad)
    words = tl.join(tl.join(first, third), tl.join(second, fourth))  # [BLOCK / 4, 2, 2]
    return uniform_of_word(tl.reshape(words, [BLOCK]))


@triton.jit
def uniform_of_elements(draw_ptr, element):
    """The uniform numbers of any elements, in the shape of ``element``; one Philox call for each."""
    element = element.to(tl.int64)
    first, second, third, fourth = philox_words(draw_ptr, element >> 2)
    lane = (element & 3).to(tl.int32)
    low = tl.where(lane == 0, first, second)
    high = tl.where(lane == 2, third, fourth)
    return uniform_of_word(tl.where(lane < 2, low, high))


# Gates ------------------------------------------------------------------------------------------------------
# m: score, inverse: 1 / T, u: uniform number, read by the random kinds only.


@triton.jit
def gate_value(m, inverse, u, KIND: tl.constexpr):
    """The gate itself."""
    if KIND == FFW:
        exponential = decay(m * inverse)  # of no use where m >= 0, where the gate is 1 exactly
        value = tl.where(m >= 0, 1.0, 2.0 * exponential / (1.0 + exponential))
    elif KIND == HARD:
        value = tl.where(m >= 0, 1.0, 0.0)
    elif KIND == BERNOULLI:  # u < 1 / (1 + exp(-m/T))
        value = tl.where(u * (1.0 + reproducible_exp(-(m * inverse))) < 1.0, 1.0, 0.0)
    else:  # m + log(u / (1 - u)) >= 0
        value = tl.where(u >= (1.0 - u) * reproducible_exp(-m), 1.0, 0.0)
    return value


@triton.jit
def gate_argument(m, u, KIND: tl.constexpr):
    """What the backward's sigmoid is taken of, before the division by T."""
    argument = m
    if KIND == CONCRETE:
        argument = m + log_odds(u)
    return argument


@triton.jit
def slope_of_argument(argument, inverse, KIND: tl.constexpr):
    """``s (1 - s) / T`` of an argument, doubled for ``ffw``, accurate in both tails."""
    exponential = decay(-tl.abs(argument * inverse))
    total = 1.0 + exponential
    slope = exponential / (total * total) * inverse
    if KIND == FFW:
        slope = 2.0 * slope
    return slope


@triton.jit
def gate_slope(m, inverse, u, KIND: tl.constexpr):
    """dg/dm: the straight-through derivative, also where the forward of ``ffw`` is clipped."""
    return slope_of_argument(gate_argument(m, u, KIND), inverse, KIND)


@triton.jit
def gate_movement(m, inverse, u, KIND: tl.constexpr):
    """``|dg / d ln T|``: how far the gate moves as the temperature falls; zero where ``ffw`` is clipped.

    Written so that it shares exponential and quotient with the ``gate_value`` of the same score.
    """
    if KIND == FFW:  # 2 s (1 - s) = g (1 - g / 2)
        g = gate_value(m, inverse, u, KIND)
        movement = tl.where(m < 0, (0.5 * g - 1.0) * g * inverse * m, 0.0)
    elif KIND == BERNOULLI:  # 1 - s = exp(-m/T) s; either may be too small to be squared
        x = m * inverse
        exponential = reproducible_exp(-x)
        s = 1.0 / (1.0 + exponential)
        movement = tl.where(tl.abs(x) > 87.0, 0.0, exponential * s * s * tl.abs(x))
    else:
        argument = gate_argument(m, u, KIND)
        movement = tl.abs(slope_of_argument(argument, inverse, KIND) * argument)
    return movement


# What the launchers share -----------------------------------------------------------------------------------


def check_gate(weight: Tensor, scores: Tensor, temperature: Tensor, draw: Tensor) -> None:
    """``TypeError`` or ``ValueError`` unless these can be gated by the Triton kernels."""
    pairs = weight.dtype == scores.dtype or (weight.dtype in DTYPES and scores.dtype == torch.float32)
    if weight.dtype not in DTYPES or not pairs:
        raise TypeError(
            f"Triton kernels gate float32, float16 and bfloat16 weights by scores of that dtype or float32, "
            f"got a weight of {weight.dtype} and scores of {scores.dtype}"
        )
    if weight.shape != scores.shape:
        raise ValueError(f"scores must have the weight's shape {tuple(weight.shape)}, got {tuple(scores.shape)}")
    if temperature.numel() != 1 or temperature.dtype != torch.float32:
        raise ValueError(f"temperature must be one float32, got {temperature.dtype} of {tuple(temperature.shape)}")
    if draw.shape != (3,) or draw.dtype != torch.int64:
        raise ValueError(f"draw must be 3 int64 numbers, got {draw.dtype} of {tuple(draw.shape)}")
