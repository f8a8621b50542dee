"""Gates of a few weights, and the same scores as ordinary parameters."""

import torch

from ffw_fast import philox
from ffw_fast.flat_gates import FlatGates
from ffw_fast.flat_layout import flat_offsets
from ffw_fast.gates import GateKind

SHAPES = {"first": (5, 3), "second": (4, 2, 3)}


def make_gates(kind=GateKind.FFW, seed=0, dtype=torch.float64) -> FlatGates:
    source = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=source, dtype=dtype) for name, shape in SHAPES.items()}
    gates = FlatGates(weights, kind, seed=7)
    spread_scores(gates, source)
    return gates


def spread_scores(gates: FlatGates, source: torch.Generator | None = None) -> None:
    """Draw scores to both sides of 0; the padding between layers stays open."""
    source = source or torch.Generator().manual_seed(0)
    for scores in gates.views(gates.scores).values():
        scores.copy_(torch.randn(scores.shape, generator=source, dtype=scores.dtype))
    gates.refresh()


def with_random_scores(layer, seed: int = 0):
    """The masked layer with scores to both sides of 0."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.scores.copy_(torch.randn(layer.scores.shape, generator=source, dtype=torch.float64))
    return layer


def loss_of(gated: dict[str, torch.Tensor], call: int = 0) -> torch.Tensor:
    """Some function of the gated weights that is not linear, another one in every step."""
    total = torch.zeros((), dtype=torch.float64)
    for number, value in enumerate(gated.values()):
        target = torch.linspace(-1, 1, value.numel(), dtype=torch.float64).view(value.shape).roll(call)
        total = total + ((value.double() - target) ** 2).sum() * (1 + number)
    return total


def backward(gates: FlatGates, call: int = 0) -> torch.Tensor:
    loss = loss_of(gates.views(gates.gated), call)
    loss.backward()
    return loss


class PlainScores:
    """The scores of the same layers as ordinary parameters, gated by the definition."""

    def __init__(self, gates: FlatGates) -> None:
        self.kind = gates.kind
        self.weights = {name: value.clone() for name, value in gates.views(gates.weight).items()}
        self.scores = {name: value.clone().requires_grad_() for name, value in gates.views(gates.scores).items()}
        self.offsets = flat_offsets(value.numel() for value in self.weights.values())

    def gated(self, draws: int, temperature: float = 1.0) -> dict[str, torch.Tensor]:
        return {
            name: weight * self.gate(self.scores[name], offset, draws, temperature)
            for (name, weight), offset in zip(self.weights.items(), self.offsets, strict=False)
        }

    def gate(self, scores, offset: int, draws: int, temperature: float) -> torch.Tensor:
        uniform = philox.uniform(scores.numel(), philox.make_draw(7, draws, offset)).view(scores.shape).double()
        s = torch.sigmoid(scores / temperature)
        noisy = scores + torch.logit(uniform)
        value, slope = {
            GateKind.FFW: ((2 * s).clamp_max(1), 2 * s),
            GateKind.HARD: ((scores >= 0).double(), s),
            GateKind.BERNOULLI: ((uniform < s).double(), s),
            GateKind.CONCRETE: ((noisy >= 0).double(), torch.sigmoid(noisy / temperature)),
        }[self.kind]
        return slope + (value - slope).detach()
