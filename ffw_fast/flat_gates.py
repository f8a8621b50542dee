"""The gates of all layers in flat buffers, so that one pass updates them all: ``w``, ``v``, ``dJ/dv`` and ``m``."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ffw_fast import ops, philox
from ffw_fast.distributed import Alone
from ffw_fast.flat_layout import FlatLayout
from ffw_fast.gates import GateKind, gate_movement, half_open_sum

OPEN = 1e6  # a score at which gates of any kind are open, with a slope of 0
BLOCK = 2**18  # gates that a pass over the flat buffers takes at a time, where it needs memory for as many


class FlatGates(FlatLayout):
    """Flat buffers of all gated layers, whose padding stays 0.

    Where processes share the gates out, each keeps the scores of its own alone, and what is computed from them goes
    round; those methods are called on all processes.

    Attributes:
        weight, gated, grad: the buffers of ``w``, ``v`` and ``dJ/dv`` (it is ``gated.grad``).
        own: the part of these buffers whose scores this process keeps: all, unless they are shared out.
        scores: ``m`` of its own gates.
        temperature: float32 scalar that the gated weights were computed at.
        draw: what the random gates were drawn with, ``ffw_fast.philox``.
        movement: float64 scalar, the sum of ``|dg / d ln T|`` over the gates in use; kept where T is annealed.
        counts: layer name -> how many gates it has, the idle ones included, which are open, stay so and lie in no
            buffer.
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        kind: GateKind,
        seed: int,
        group: Alone | None = None,
        idle: dict[str, int] | None = None,
    ) -> None:
        super().__init__({name: weight.shape for name, weight in weights.items()})
        self.kind = kind
        self._group = group or Alone()
        self.counts = {name: weight.numel() + (idle or {}).get(name, 0) for name, weight in weights.items()}
        example = next(iter(weights.values()))
        self.weight = example.new_zeros(self.length)
        for name, weight in weights.items():
            self.view(self.weight, name).copy_(weight)
        self.gated = nn.Parameter(self.weight.clone())
        self.grad = torch.zeros_like(self.weight)
        self.gated.grad = self.grad
        self.temperature = torch.ones((), dtype=torch.float32, device=example.device)
        self.draw = philox.make_draw(seed, device=example.device)
        self.movement = torch.zeros((), dtype=torch.float64, device=example.device)
        self.own = slice(0, len(self.weight))
        for part, weight in self._blocks(self.weight):  # of all gates: nothing goes round before the first step
            self.gated.data[part] = self._gated(part, torch.zeros_like(weight))
        self.own = self._group.own(len(self.weight))
        self.scores = torch.zeros_like(self.weight[self.own])
        self._keep_padding_open()

    def _keep_padding_open(self) -> None:
        """Give what lies between the layers scores at which a gate moves neither with its score nor with T.

        Kernels run over it as over all gates. A gate of kind ``concrete`` would move with T where its score is 0.
        """
        starts, length = [part.start for part in self._slices.values()], len(self.scores)
        for part, end in zip(self._slices.values(), [*starts[1:], self.length], strict=True):
            first, last = (min(max(0, place - self.own.start), length) for place in (part.stop, end))
            self.scores[first:last] = OPEN

    @property
    def count(self) -> int:
        """How many gates there are, the padding not counted."""
        return sum(self.counts.values())

    def sparsity(self, shift: float = 0.0) -> float:
        """Share of the gates that pruning at ``m + shift >= 0`` closes."""
        removed = torch.zeros((), dtype=torch.float64, device=self.scores.device)
        for _part, scores in self._blocks(self.scores):
            removed += (scores + shift < 0).sum()
        return self.total_(removed).item() / self.count  # the padding is open

    def half_open(self) -> float:
        """Mean distance of the gates from being open or shut, ``ffw_fast.gates.half_open``."""
        half = half_open_sum(self.kind, self.parts(self.scores).values(), self.temperature)
        return self.total_(half).item() / self.count

    def are_finite(self) -> bool:
        """Whether all scores are."""
        bad = torch.zeros((), dtype=torch.float64, device=self.scores.device)
        for _part, scores in self._blocks(self.scores):
            bad += ~scores.isfinite().all()
        return self.total_(bad).item() == 0

    def total_(self, part: Tensor) -> Tensor:
        """What all processes have counted of their own gates, in place."""
        return self._group.total_(part)

    def parts(self, buffer: Tensor) -> dict[str, Tensor]:
        """Every layer's part (k,) of a buffer over this process's own gates; there may be none of a layer."""
        first = self.own.start
        return {name: buffer[max(0, s.start - first) : max(0, s.stop - first)] for name, s in self._slices.items()}

    def kept(self, buffer: Tensor) -> Tensor:
        """This process's part of a buffer over all gates; one over its own stays as it is."""
        are_shared_out = self.own != slice(0, self.length)
        return buffer[self.own] if are_shared_out and buffer.shape != self.scores.shape else buffer

    def whole(self, part: Tensor) -> Tensor:
        """A buffer over all gates, on every process, of which each has its part."""
        return self._group.whole(part, len(self.weight))

    def to_first(self, part: Tensor) -> Tensor:
        """The same on the first process alone; the others keep their part."""
        return self._group.to_first(part, len(self.weight))

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute the gated weights anew from scores, temperature and draw."""
        self.refresh_own()
        self.spread()

    @torch.no_grad()
    def refresh_own(self) -> None:
        """The same of this process's own gates."""
        for part, scores in self._blocks(self.scores):
            self.gated[part] = self._gated(part, scores)

    def spread(self) -> None:
        """Give every process the gated weights that the others have computed."""
        self._group.spread_(self.gated.detach())

    def _gated(self, part: slice, scores: Tensor) -> Tensor:
        draw = self.draw_from(self.draw, part.start)
        return ops.gate_weight(self.weight[part], scores, self.temperature, draw, int(self.kind))

    def _blocks(self, buffer: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """A buffer over the own gates in blocks, so that what is computed of it needs no memory of its size.

        Each with its place in the buffers over all gates.
        """
        starts = range(self.own.start, self.own.stop, BLOCK)
        blocks = zip(starts, buffer.split(BLOCK), strict=False)  # an empty buffer has one block
        return ((slice(start, start + len(block)), block) for start, block in blocks)

    def draw_from(self, draw: Tensor, first: int) -> Tensor:
        """A draw of all gates as that of the gates from the given one on."""
        return draw + philox.make_draw(first_element=first, device=draw.device) if first else draw

    @torch.no_grad()
    def measure_movement(self) -> None:
        """Measure the movement of the own gates in use; afterwards the optimizer's pass keeps it up to date."""
        self.movement.zero_()
        for part, scores in self._blocks(self.scores):
            uniform = None
            if self.kind.is_random:
                uniform = philox.uniform(len(scores), self.draw_from(self.draw, part.start)).to(scores.dtype)
            self.movement += gate_movement(self.kind, scores, self.temperature, uniform).sum(dtype=torch.float64)

    def set_temperature(self, temperature: float) -> None:
        """Set T and recompute the gated weights."""
        self.temperature.fill_(temperature)
        self.refresh()

    @contextmanager
    def pruned(self, shift: float = 0.0) -> Iterator[None]:
        """Within it the gated weights are those of the pruned network: ``w`` where ``m + shift >= 0``, else 0."""
        with torch.no_grad():
            for part, scores in self._blocks(self.scores):
                self.gated[part] = torch.where(scores + shift >= 0, self.weight[part], 0)
            self.spread()
        try:
            yield
        finally:
            self.refresh()
