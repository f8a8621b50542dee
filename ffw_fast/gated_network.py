"""The network as the loop trains it: gated weights as leaves over flat buffers, and the bottleneck's features.

The gated weight ``v = w * g(m)`` of every layer is an ordinary leaf whose gradient autograd fills, so forward and
backward are plain convolutions and matmuls. The leaves are views of flat buffers over all layers (``flat_gates``).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ffw_fast.bottleneck import AtBottleneck, PastBottleneck, bottleneck_module, outputs_of
from ffw_fast.channels import ChannelGraph
from ffw_fast.convolutions import lay_out_by_taps, use_cheapest_convolutions
from ffw_fast.convolutions.tap_major import by_taps, put_taps
from ffw_fast.copies import copy_of
from ffw_fast.data.samples import EVALUATION_BATCH, Inputs, batches_of
from ffw_fast.distributed import Alone
from ffw_fast.flat_gates import FlatGates
from ffw_fast.flat_layout import FlatLayout
from ffw_fast.gates import GateKind
from ffw_fast.gradient_sum import GradientSum
from ffw_fast.masking import maskable_layers
from ffw_fast.parts import replace_module
from ffw_fast.precision import full_float32
from ffw_fast.simplify import Outputs, simplified, split_before, still_gives


class ScaledActivation(nn.Module):
    """A non-linearity and the factors, ``weight`` of shape (channels, 1, ...), that its output is multiplied by."""

    weight: Tensor

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        y = self.activation(input)
        return y * self.weight.to(y.dtype)


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

    Raises:
        ValueError: channels that cannot be gated or pruned, see ``ffw_fast.channels``.

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
        outputs = partial(outputs_of, bottleneck=bottleneck, x=example)
        channels = ChannelGraph(frozen, where) if granularity == "channel" else None
        sites: dict[str, str] = {}
        if channels is not None:
            channels.check_bottleneck(bottleneck)
            _check_zeros(frozen, where, outputs)
            frozen, sites = channels.explicit()
        self.module = simplified(frozen, bottleneck, outputs)
        layers = maskable_layers(self.module)
        weights = {name: layer.weight.detach() for name, layer in layers.items()}
        if channels is not None:
            weights = {name: weights[name].new_ones(place.channels) for name, place in channels.places.items()}
        self.layout = FlatLayout({name: weight.shape for name, weight in weights.items()})
        self._taps: dict[str, Tensor] = {}
        if channels is None and example.device.type == "cpu" and not kind.is_random and (group or Alone()).count == 1:
            self._taps = lay_out_by_taps(self.module, outputs)
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
        self._at_bottleneck = AtBottleneck()
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
        except PastBottleneck:
            pass
        finally:
            self._at_bottleneck.stops = False
        return self._at_bottleneck.taken()

    @torch.no_grad()
    def outputs(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """Features (n, D) and logits (n, C) of all samples, without gradients."""
        features, logits = zip(*(self(batch) for batch in batches_of(x, EVALUATION_BATCH)), strict=True)
        return torch.cat(features), torch.cat(logits)


def _check_zeros(model: nn.Module, where: str | None, outputs: Outputs) -> None:
    """Refuse a network in which the zeros that pruning leaves are not what its channel gates are when shut."""
    masked, pruned = (ChannelGraph(copy_of(model), where) for _ in range(2))
    every_other = {name: torch.arange(place.channels, device="cpu") % 2 == 0 for name, place in pruned.places.items()}
    with full_float32():
        if not still_gives(pruned.prune(every_other), outputs(masked.masked(every_other)), outputs):
            raise ValueError(
                "with channels pruned in its layers and batch norms the network computes something else than with "
                "their gates shut: a batch norm or an addition may not run over a layer's channels, or a hook may "
                "change what a layer gives. Leave that layer out with `where`, or take granularity='weight'"
            )


def _channels_last_in_bf16(x: Tensor) -> Tensor:
    """Images (n, C, H, W) in the order in memory in which oneDNN convolves in bf16 without copies."""
    if x.dim() == 4 and x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return x.contiguous(memory_format=torch.channels_last)
    return x
