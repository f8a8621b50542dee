"""The gate's arithmetic in plain PyTorch; ``csrc/gate.h`` holds the same for compiled code.

A gate ``g`` multiplies a frozen weight ``w``. It is a function of the score ``m``, the temperature ``T`` and, for the
two random kinds, of a uniform number ``u`` in (0, 1). With ``s = sigmoid(m / T)``:

============= ================================ ==================================================================
kind          forward                          backward ``dg/dm`` (straight-through)
============= ================================ ==================================================================
``ffw``       ``min(2 s, 1)``                  ``2 s (1 - s) / T``, also where the forward is clipped
``hard``      ``1[m >= 0]``                    ``s (1 - s) / T``
``bernoulli`` ``1[u < s]``                     ``s (1 - s) / T``
``concrete``  ``1[(m + logit(u)) >= 0]``       ``q (1 - q) / T`` with ``q = sigmoid((m + logit(u)) / T)``
============= ================================ ==================================================================

Whatever the kind, a weight is kept by pruning where ``m >= 0``.
"""

import enum
import math
from collections.abc import Iterable

import torch
from torch import Tensor

LN2_HI = 0.693359375  # has so few bits that n * LN2_HI is exact for every exponent n of a float
LN2_LO = -2.12194440e-4
EXP_COEFFICIENTS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)


class GateKind(enum.IntEnum):
    """How a score becomes a gate; the numbers are those of ``csrc/gate.h``."""

    FFW = 0
    HARD = 1
    BERNOULLI = 2
    CONCRETE = 3

    @property
    def is_random(self) -> bool:
        """Whether the gate is sampled, so that it needs uniform numbers."""
        return self in (GateKind.BERNOULLI, GateKind.CONCRETE)


GATES = tuple(kind.name.lower() for kind in GateKind)
GRANULARITIES = ("weight", "channel")


def gate_kind(name: str) -> GateKind:
    """The kind of that name; ``ValueError`` with the known names otherwise."""
    if name not in GATES:
        raise ValueError(f"unknown gate {name!r}; known gates: {', '.join(GATES)}")
    return GateKind[name.upper()]


def check_granularity(granularity: str) -> None:
    """``ValueError`` with the known granularities for any other."""
    if granularity not in GRANULARITIES:
        raise ValueError(f"unknown granularity {granularity!r}; known granularities: {', '.join(GRANULARITIES)}")


def inverse_temperature(temperature: Tensor, dtype: torch.dtype) -> Tensor:
    """``1 / T``, rounded once. Gates multiply by it, so that every backend sees the same ``m / T``."""
    return temperature.to(dtype).reciprocal()


def gate(kind: GateKind, scores: Tensor, temperature: Tensor, uniform: Tensor | None = None) -> Tensor:
    """The gate of every score, in the scores' dtype (float32 or float64).

    ``uniform`` has the scores' shape and is read by the random kinds only. Sampled masks are decided without a
    division and with an exponential of fixed rounding, so that one seed gives the same mask on every backend.
    """
    if kind is GateKind.FFW:
        return (2 * torch.sigmoid(scores * inverse_temperature(temperature, scores.dtype))).clamp_max(1)
    if kind is GateKind.HARD:
        return (scores >= 0).to(scores.dtype)
    assert uniform is not None
    if kind is GateKind.BERNOULLI:  # u < 1 / (1 + exp(-m/T))
        exponential = reproducible_exp(-(scores * inverse_temperature(temperature, scores.dtype)))
        return (uniform * (1 + exponential) < 1).to(scores.dtype)
    return (uniform >= (1 - uniform) * reproducible_exp(-scores)).to(scores.dtype)  # m + log(u / (1 - u)) >= 0


def gate_slope(kind: GateKind, scores: Tensor, temperature: Tensor, uniform: Tensor | None = None) -> Tensor:
    """The straight-through derivative ``dg/dm`` of every score."""
    inverse = inverse_temperature(temperature, scores.dtype)
    slope = sigmoid_slope(_argument(kind, scores, uniform) * inverse) * inverse
    return 2 * slope if kind is GateKind.FFW else slope


def gate_movement(kind: GateKind, scores: Tensor, temperature: Tensor, uniform: Tensor | None = None) -> Tensor:
    """``|dg / d ln T|`` of every score: how far its gate moves as the temperature falls.

    Zero where the forward of ``ffw`` is clipped. For the other kinds it is the derivative of the sigmoid that stands
    in for the gate in their backward.
    """
    argument = _argument(kind, scores, uniform)
    movement = (gate_slope(kind, scores, temperature, uniform) * argument).abs()
    return torch.where(scores < 0, movement, 0) if kind is GateKind.FFW else movement


def half_open(kind: GateKind, scores: Iterable[Tensor], temperature: Tensor) -> float:
    """Mean of ``min(g, 1 - g)`` over the gates of all layers: 0 where each is open or shut, at most 1/2.

    For the random kinds g is the probability that a gate is open. One number is read back from the device.
    """
    layers = list(scores)
    return half_open_sum(kind, layers, temperature).item() / sum(score.numel() for score in layers)


def half_open_sum(kind: GateKind, scores: Iterable[Tensor], temperature: Tensor) -> Tensor:
    """The sum of which ``half_open`` is the mean: a float64 scalar."""
    total = torch.zeros((), dtype=torch.float64, device=temperature.device)
    for score in scores:
        openness = _openness(kind, score, temperature)
        total = total + torch.minimum(openness, 1 - openness).sum(dtype=torch.float64)
    return total


def _openness(kind: GateKind, scores: Tensor, temperature: Tensor) -> Tensor:
    """The gate, or the probability that a random one is open; that of ``concrete`` does not depend on T."""
    if not kind.is_random:
        return gate(kind, scores, temperature)
    return torch.sigmoid(scores if kind is GateKind.CONCRETE else scores / temperature)


def sigmoid_slope(x: Tensor) -> Tensor:
    """``s (1 - s)`` of ``s = sigmoid(x)``, accurate in both tails."""
    exponential = torch.exp(-x.abs())
    return exponential / (1 + exponential).square()


def _argument(kind: GateKind, scores: Tensor, uniform: Tensor | None) -> Tensor:
    if kind is not GateKind.CONCRETE:
        return scores
    assert uniform is not None
    return scores + (torch.log(uniform) - torch.log1p(-uniform))


def reproducible_exp(x: Tensor) -> Tensor:
    """``exp(x)`` by additions and multiplications in a fixed order, so that every backend rounds it alike.

    Only where a sampled mask is decided. Accurate to about one unit in the last place on [-87, 88], clamped outside.
    Double precision has rounding errors too small to matter and uses the ordinary exponential.
    """
    if x.dtype == torch.float64:
        return torch.exp(x)
    x = x.clamp(-87.0, 88.0)
    exponent = torch.round(x * (1 / math.log(2)))
    rest = (x - exponent * LN2_HI) - exponent * LN2_LO
    polynomial = torch.full_like(rest, EXP_COEFFICIENTS[0])
    for coefficient in EXP_COEFFICIENTS[1:]:
        polynomial = polynomial * rest + coefficient
    value = (polynomial * (rest * rest) + rest) + 1
    power = ((exponent.nan_to_num().to(torch.int32) + 127) << 23).view(torch.float32)
    return value * power
