"""The network as the loop trains it: gated weights as leaves over flat buffers, and the bottleneck's features.

The gated weight ``v = w * g(m)`` of every layer is an ordinary leaf whose gradient autograd fills, so forward and
backward are plain convolutions and matmuls. All layers' ``w``, ``v``, ``dJ/dv`` and ``m`` lie in flat buffers, so that
one pass updates them all.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ffw_fast import ops, philox
from ffw_fast.channels import ChannelGraph, replace_module
from ffw_fast.convolutions import lay_out_by_taps, use_cheapest_convolutions
from ffw_fast.convolutions.tap_major import by_taps, put_taps
from ffw_fast.copies import copy_of
from ffw_fast.data.samples import Inputs, batches_of
from ffw_fast.distributed import Alone, GradientSum
from ffw_fast.gates import GateKind, gate_movement, half_open_sum
from ffw_fast.modules import flat_offsets, maskable_layers
from ffw_fast.simplify import simplified, split_before

EVALUATION_BATCH = 500  # samples a forward pass without gradients
BLOCK = 2**18  # gates that a pass over the flat buffers takes at a time, where it needs memory for as many


class FlatLayout:
    """Where the layers' gates lie in a flat buffer of all, each layer starting at a multiple of 16 elements.

    Attributes:
        shapes: layer name -> shape of its weight.
        length: of the buffer.
    """

    def __init__(self, shapes: dict[str, torch.Size]) -> None:
        self.shapes = shapes
        offsets = flat_offsets(shape.numel() for shape in shapes.values())
        self.length = offsets[-1]
        self._slices = {
            name: slice(start, start + shape.numel())
            for (name, shape), start in zip(shapes.items(), offsets, strict=False)
        }

    def view(self, buffer: Tensor, name: str) -> Tensor:
        """The layer's part of a flat buffer, in the shape of its weight."""
        return buffer[self._slices[name]].view(self.shapes[name])

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """Every layer's part of a flat buffer."""
        return {name: self.view(buffer, name) for name in self.shapes}


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
        starts = [part.start for part in self._slices.values()]
        ends = [
            torch.arange(part.stop, end, device="cpu")
            for part, end in zip(self._slices.values(), [*starts[1:], self.length], strict=True)
        ]
        padding = torch.cat(ends)
        own = (padding >= self.own.start) & (padding < self.own.stop)
        self._padding = padding[own].to(example.device)

    @property
    def count(self) -> int:
        """How many gates there are, the padding not counted."""
        return sum(self.counts.values())

    def sparsity(self, shift: float = 0.0) -> float:
        """Share of the gates that pruning at ``m + shift >= 0`` closes."""
        removed = torch.zeros((), dtype=torch.float64, device=self.scores.device)
        for _part, scores in self._blocks(self.scores):
            removed += (scores + shift < 0).sum()
        return self.total_(removed).item() / self.count  # the padding's scores are 0

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
        self.leave_out_padding()

    @torch.no_grad()
    def leave_out_padding(self) -> None:
        """Take the padding's part out of the movement of the own gates, over which kernels sum as over all others.

        It is 0 but for ``concrete``, whose gates also move where the score is 0.
        """
        if self.kind is GateKind.CONCRETE:
            uniform = philox.uniform_at(self._padding, self.draw).to(self.scores.dtype)
            moved = gate_movement(self.kind, torch.zeros_like(uniform), self.temperature, uniform)
            self.movement.sub_(moved.sum(dtype=torch.float64)).clamp_(min=0)  # kernels round the same sum otherwise

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


class ScaledActivation(nn.Module):
    """A non-linearity and the factors, ``weight`` of shape (channels, 1, ...), that its output is multiplied by."""

    weight: Tensor

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(x)
        return y * self.weight.to(y.dtype)


class _PastBottleneck(Exception):
    """Ends a forward pass whose remainder nobody reads."""


class _AtBottleneck:
    """A hook that keeps the features of a forward pass until they are taken.

    Not a method of the network: the two would hold each other, and with them all memory, until they are collected.
    """

    def __init__(self) -> None:
        self.stops = False  # the forward pass, once it has the features
        self._features: Tensor | None = None

    def __call__(self, _module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        self._features = output.flatten(1)
        if self.stops:
            raise _PastBottleneck

    def taken(self) -> Tensor:
        """The features (n, D) of the last forward pass."""
        features, self._features = self._features, None
        assert features is not None
        return features


class GatedNetwork:
    """A frozen copy of a model in eval mode whose Conv and Linear weights are gated.

    Args:
        model: the biased network; it is copied and stays as it is.
        bottleneck: name of the module whose output, flattened from its second dimension on, is the features.
        kind: gate kind.
        seed: of random gates.
        example: a few samples, on which simplifications of the network are checked.
        granularity: "weight", or "channel": then what is gated are factors of 1 behind the non-linearities.
        where: which channel gates, see ``ffw_fast.channels``.
        group: the processes that train it together.

    Attributes:
        module: the network; its gated weights are views of ``gates.gated``.
        gates: those that are trained. In one process on the CPU, unless gates are random, some convolutions' lie tap by
            tap, without the taps that meet nothing but padding, whose scores stay 0
            (``ffw_fast.convolutions.tap_major``).
        layout: of flat buffers over all gates, as a checkpoint holds them.
        gradient_sum: what sums up the processes' gradients in every step; None for one process.
    """

    def __init__(
        self,
        model: nn.Module,
        bottleneck: str,
        kind: GateKind,
        seed: int,
        example: Tensor,
        granularity: str = "weight",
        where: str | None = None,
        group: Alone | None = None,
    ) -> None:
        frozen = copy_of(model).to(example.device).eval().requires_grad_(False)
        channels = ChannelGraph(frozen, where) if granularity == "channel" else None
        sites: dict[str, str] = {}
        if channels is not None:
            channels.check_bottleneck(bottleneck)
            frozen, sites = channels.explicit()
        self.module = simplified(frozen, bottleneck, lambda network: outputs_of(network, bottleneck, example))
        layers = maskable_layers(self.module)
        weights = {name: layer.weight.detach() for name, layer in layers.items()}
        if channels is not None:
            weights = {name: weights[name].new_ones(place.channels) for name, place in channels.places.items()}
        self.layout = FlatLayout({name: weight.shape for name, weight in weights.items()})
        self._taps: dict[str, Tensor] = {}
        if channels is None and example.device.type == "cpu" and not kind.is_random and (group or Alone()).count == 1:
            self._taps = lay_out_by_taps(self.module, example)
            weights |= {name: layers[name].weight.detach() for name in self._taps}
        idle = {name: shape.numel() - weights[name].numel() for name, shape in self.layout.shapes.items()}
        self.gates = FlatGates(weights, kind, seed, group, idle)
        gradients = self.gates.views(self.gates.grad)
        leaves = []
        for name, gated in self.gates.views(self.gates.gated.detach()).items():
            holder: nn.Module = layers[name]
            shape = gated.shape
            if channels is not None:
                shape = torch.Size(channels.places[name].shape)
                holder = ScaledActivation(self.module.get_submodule(sites[name]))
                replace_module(self.module, sites[name], holder)
            holder.weight = nn.Parameter(gated.view(shape))
            holder.weight.grad = gradients[name].view(shape)
            leaves.append(holder.weight)
        self.gradient_sum: GradientSum | None = (group or Alone()).gradient_sum(self.gates.grad, leaves)
        use_cheapest_convolutions(self.module, example)
        self._bottleneck = bottleneck
        self._at_bottleneck = _AtBottleneck()
        bottleneck_module(self.module, bottleneck).register_forward_hook(self._at_bottleneck)

    def over_all(self, buffer: Tensor) -> Tensor:
        """A flat buffer over the trained gates as one over all, in which the others have 0; itself if these are all."""
        if not self._taps:
            return buffer
        whole = buffer.new_zeros(self.layout.length)
        layers = self.layout.views(whole)
        for name, part in self.gates.views(buffer).items():
            if name in self._taps:
                put_taps(layers[name], self._taps[name], part)
            else:
                layers[name].copy_(part)
        return whole

    def over_trained(self, buffer: Tensor) -> Tensor:
        """The other way round."""
        if not self._taps:
            return buffer
        trained = buffer.new_zeros(self.gates.length)
        layers = self.layout.views(buffer)
        for name, part in self.gates.views(trained).items():
            part.copy_(by_taps(layers[name], self._taps[name]) if name in self._taps else layers[name])
        return trained

    @torch.no_grad()
    def take_out_frozen_part(self, *inputs: Inputs) -> tuple[Inputs, ...]:
        """What the layers before the first gate give of inputs (n, ...); from then on the network begins behind them.

        Nothing is done, and the inputs come back as they are, where weights are gated, where inputs are not tensors in
        memory, or where that output is larger than the input or not all that the rest reads.
        """
        parts = None
        gates = [module for module in self.module.modules() if isinstance(module, ScaledActivation)]
        if gates and all(isinstance(x, Tensor) for x in inputs):
            parts = split_before(self.module, ScaledActivation, self._bottleneck)
        if parts is None or parts[0](inputs[0][:1].clone()).numel() > inputs[0][:1].shape.numel():
            return inputs
        head, self.module = parts
        for gate in gates:
            activation: Any = gate.activation
            if hasattr(activation, "inplace"):
                activation.inplace = False  # it would overwrite what is kept
        return tuple(torch.cat([head(batch) for batch in batches_of(x, EVALUATION_BATCH)]) for x in inputs)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (n, D) and logits (n, C) of a minibatch."""
        logits = self.module(_channels_last_in_bf16(x))
        return self._at_bottleneck.taken(), logits

    @torch.no_grad()
    def features(self, x: Inputs) -> Tensor:
        """Features (n, D) of all samples; what lies behind the bottleneck is not run."""
        return torch.cat([self._features_of(batch) for batch in batches_of(x, EVALUATION_BATCH)])

    def _features_of(self, batch: Tensor) -> Tensor:
        self._at_bottleneck.stops = True
        try:
            self.module(_channels_last_in_bf16(batch))
        except _PastBottleneck:
            pass
        finally:
            self._at_bottleneck.stops = False
        return self._at_bottleneck.taken()

    @torch.no_grad()
    def outputs(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """Features (n, D) and logits (n, C) of all samples, without gradients."""
        features, logits = zip(*(self(batch) for batch in batches_of(x, EVALUATION_BATCH)), strict=True)
        return torch.cat(features), torch.cat(logits)


def _channels_last_in_bf16(x: Tensor) -> Tensor:
    """Images (n, C, H, W) in the order in memory in which oneDNN convolves in bf16 without copies."""
    if x.dim() == 4 and x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return x.contiguous(memory_format=torch.channels_last)
    return x


@torch.no_grad()
def outputs_of(model: nn.Module, bottleneck: str, x: Tensor) -> list[Tensor]:
    """Output of the bottleneck, as it is once the forward pass has ended, and of the model."""
    kept: list[Tensor] = []
    hook = bottleneck_module(model, bottleneck).register_forward_hook(lambda _module, _x, output: kept.append(output))
    try:
        return [model(x.clone()), *kept]
    finally:
        hook.remove()


def bottleneck_module(model: nn.Module, name: str) -> nn.Module:
    """The module of that name. ``ValueError`` with the known names otherwise."""
    modules = {known: module for known, module in model.named_modules() if known}
    if name not in modules:
        raise ValueError(f"unknown bottleneck {name!r}; the modules of {type(model).__name__}: {', '.join(modules)}")
    return modules[name]
