"""How much of a network is gone with its pruned channels: their own weights, and those that would read them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ffw_fast.channels import ChannelGraph
from ffw_fast.graph_nodes import (
    is_activation,
    is_addition,
    is_layer,
    leaves_channels,
    node_name,
    pooled_dimensions,
)
from ffw_fast.parts import module_of

FLATTENED = -1


class Alive(NamedTuple):
    """Which channels of a tensor may be other than constant, boolean (channels,), and where they lie.

    ``layout`` is the number of dimensions behind theirs, which is the second; 0 where theirs is the last, as behind a
    Linear layer; ``FLATTENED`` where each is several features of the last.
    """

    channels: Tensor
    layout: int


def share_gone(channels: ChannelGraph, masks: dict[str, Tensor]) -> float:
    """Share of all Conv and Linear weights that are gone: their output channel is zero, or their input is.

    What the graph does not show (channels that are concatenated or permuted) counts as alive.
    """
    model = channels.model
    alive: dict[fx.Node, Alive | None] = {}
    gates = {place.node: Alive(masks[name], len(place.shape) - 1) for name, place in channels.places.items()}
    rows_of = channels.kept_rows(masks)
    gone: dict[str, int] = {}
    total: dict[str, int] = {}
    for node in channels.graph.nodes:
        inputs = [alive.get(source) for source in node.all_input_nodes]
        alive[node] = _alive(model, node, inputs)
        if is_layer(model, node):
            layer: Any = module_of(model, node)
            name = str(node.target)
            rows, columns = rows_of[name], _columns(layer, inputs[0])
            kept = int((rows.unsqueeze(1) & columns).sum()) * (layer.weight.numel() // columns.numel())
            total[name] = layer.weight.numel()
            gone[name] = min(gone.get(name, total[name]), total[name] - kept)  # of several calls
            alive[node] = Alive(rows, layer.weight.dim() - 2)
        if (gate := gates.get(node)) is not None:
            reached = alive[node]
            alive[node] = gate if reached is None else Alive(reached.channels & gate.channels, gate.layout)
    return sum(gone.values()) / sum(total.values())


def _alive(model: nn.Module, node: fx.Node, inputs: list[Alive | None]) -> Alive | None:
    """Which channels of the output of the model's node may be other than constant; None: any."""
    if is_addition(node) and len(inputs) == 2:
        first, second = inputs
        if first is None or second is None or first.layout != second.layout:
            return None
        same = first.channels.shape == second.channels.shape
        return Alive(first.channels | second.channels, first.layout) if same else None
    if len(inputs) != 1 or (source := inputs[0]) is None:
        return None
    if dimensions := pooled_dimensions(model, node):
        return source if dimensions == source.layout else None
    module, name = module_of(model, node), node_name(node)
    if isinstance(module, nn.Flatten) or name == "flatten":
        return _flattened(node, module, source)
    if name == "mean":
        return _averaged(node, source)
    return source if leaves_channels(model, node) or is_activation(model, node) else None


def _flattened(node: fx.Node, module: nn.Module | None, source: Alive) -> Alive | None:
    """Channels behind a flatten: each is several features, or stays in place where only what follows is flattened."""
    first: Any
    last: Any
    if isinstance(module, nn.Flatten):
        first, last = module.start_dim, module.end_dim
    else:
        first, last = (
            node.kwargs.get(name, node.args[place] if len(node.args) > place else default)
            for place, name, default in ((1, "start_dim", 0), (2, "end_dim", -1))
        )
    if source.layout < 1 or last not in (-1, source.layout + 1):
        return source if source.layout == 0 and first == 1 else None  # nothing happens to (n, features)
    return Alive(source.channels, FLATTENED) if first == 1 else Alive(source.channels, 1) if first == 2 else None


def _averaged(node: fx.Node, source: Alive) -> Alive | None:
    """Channels behind a mean: over all that follows them it leaves each as one feature."""
    given: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    keeps = node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False)
    if source.layout < 1 or not isinstance(given, int | tuple | list):
        return None
    axes = {axis % (source.layout + 2) for axis in ([given] if isinstance(given, int) else given)}
    if axes != set(range(2, source.layout + 2)):
        return None
    return source if keeps else Alive(source.channels, 0)


def _columns(layer: Any, alive: Alive | None) -> Tensor:
    """Boolean (1 or out_channels, in_channels / groups) of the layer's inputs that are alive, or (1, 1): all."""
    every = torch.ones(1, 1, dtype=torch.bool, device=layer.weight.device).expand(len(layer.weight), 1)
    if alive is None:
        return every
    channels = alive.channels
    if isinstance(layer, nn.Linear):
        is_image = alive.layout == FLATTENED and layer.in_features % len(channels) == 0
        if is_image or (alive.layout == 0 and layer.in_features == len(channels)):
            return channels.repeat_interleave(layer.in_features // len(channels)).expand(len(layer.weight), -1)
        return every
    if alive.layout != layer.weight.dim() - 2 or len(channels) != layer.in_channels:
        return every
    return channels.view(layer.groups, -1).repeat_interleave(len(layer.weight) // layer.groups, dim=0)
