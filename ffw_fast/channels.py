"""Gates of whole channels: where they stand in a network, found by its graph, and the network without pruned channels.

The rule. A gate stands behind every non-linearity that a Conv's or Linear's output reaches through batch norm,
dropout and one addition at most, and multiplies its output channels. It is named after that layer; where an addition
brings several together (a residual block with a convolution in its shortcut), after the nearest one, the first in
``model.named_modules()`` among equals. A layer whose output reaches no non-linearity has no gate: the classifier,
whose outputs are the logits, or a linear projection. So a residual block conv-norm-ReLU-conv-norm-add-ReLU has two
gates, named after its two convolutions, and the second one also silences what comes through the shortcut.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ffw_fast.graph_nodes import (
    PASSING,
    PASSING_FUNCTIONS,
    STATELESS,
    first_input,
    is_activation,
    is_addition,
    is_layer,
    leaves_channels,
    node_name,
    pooled_dimensions,
)
from ffw_fast.modes import evaluation_mode
from ffw_fast.parts import DENSE_LAYERS, held_elsewhere, matching, module_of, replace_module

HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
)
WRAPPED = ("_orig_mod", "module")  # where torch.compile and DataParallel keep the network itself


@dataclass(frozen=True)
class Place:
    """Where one gate stands.

    Attributes:
        layer: name of the Conv or Linear after whose output channels the gate is named.
        node: the non-linearity in the graph; the gate multiplies its output.
        shape: (channels, 1, ...), which broadcasts against the non-linearity's output.
        silent: layers and batch norms whose output nothing but the non-linearity sees: in them a pruned channel may be
            zero.
        is_silenced: whether those zeros make the gate's output zero. Not where a shortcut enters the sum, or where the
            non-linearity does not map 0 to 0.
        between: names of the modules that lie before the gate but already have the channels silent.
    """

    layer: str
    node: fx.Node
    shape: tuple[int, ...]
    silent: tuple[str, ...]
    is_silenced: bool
    between: tuple[str, ...]

    @property
    def channels(self) -> int:
        return self.shape[0]


class ChannelMask(nn.Module):
    """Multiplies channels by a fixed mask, zeros and ones of shape (channels, 1, ...)."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, input: Tensor) -> Tensor:
        return input * self.mask.to(input.dtype)


class ChannelGraph:
    """The graph of a model and its channel gates.

    Args:
        model: any module whose forward pass ``torch.fx`` can trace. Nothing is changed until ``prune``.
        where: shell-style patterns of layer names, separated by commas, that choose among the gates. Default: all.

    Raises:
        ValueError: the model cannot be traced, has no gate, or a pattern matches none.
    """

    def __init__(self, model: nn.Module, where: str | None = None) -> None:
        self.model = model
        self.graph = _trace(model)
        self._runs = Counter(str(node.target) for node in self.graph.nodes if node.op == "call_module")
        every = {place.layer: place for place in self._find()}
        if not every:
            raise ValueError(
                f"no channel can be gated: in {type(model).__name__} no output of a Conv or Linear layer reaches a "
                "non-linearity through batch norm, pools and an addition at most"
            )
        patterns = ["*"] if where is None else [pattern.strip() for pattern in where.split(",")]
        chosen = matching(list(every), patterns, "where", "layers with a channel gate")
        self.places = {name: every[name] for name in chosen}

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Layer name -> (channels,) of every gate."""
        return {name: torch.Size([place.channels]) for name, place in self.places.items()}

    def check_bottleneck(self, bottleneck: str) -> None:
        """``ValueError`` for a bottleneck at which the gated and the pruned network differ, or that is not seen."""
        for place in self.places.values():
            if bottleneck in place.between:
                raise ValueError(
                    f"bottleneck {bottleneck!r} lies before the gate of its channels, which stands behind "
                    f"{place.node.target if place.node.op == 'call_module' else place.node.name!r}: name that instead"
                )
        if self._needs_graph and bottleneck not in self._runs:
            raise ValueError(
                f"bottleneck {bottleneck!r} is a container; with channel gates behind functions or modules that run "
                f"several times it must be one of the modules without parts: {', '.join(sorted(self._runs))}"
            )

    def explicit(self) -> tuple[nn.Module, dict[str, str]]:
        """A model in which every gate has a module of its own to stand behind, and layer name -> that module's name.

        It is the model itself where each of these non-linearities is a module that runs once and that no code reaches
        past the model's tree; else a ``GraphModule`` of the model's own parts, with an ``nn.Identity`` behind each that
        is no module that runs once.
        """
        sites = {name: str(place.node.target) for name, place in self.places.items() if self._runs_once(place.node)}
        if not self._needs_graph:
            return self.model, sites
        module = fx.GraphModule(self.model, self.graph)
        for hooks in HOOKS:  # of the whole model, which a graph leaves out
            getattr(module, hooks).update(getattr(self.model, hooks))
        nodes = {node.name: node for node in module.graph.nodes}
        for name, place in self.places.items():
            if name in sites:
                continue
            sites[name] = site = f"gate_of_{name.replace('.', '_')}"
            module.add_submodule(site, nn.Identity())
            node = nodes[place.node.name]
            with module.graph.inserting_after(node):
                behind = module.graph.call_module(site, (node,))
            node.replace_all_uses_with(behind)
            behind.args = (node,)
        module.recompile()
        module.train(self.model.training)
        return module, sites

    def prune(self, masks: dict[str, Tensor]) -> nn.Module:
        """The model, or a ``GraphModule`` of its parts, in which the channels that masks (channels,) drop are zero.

        They are zeros in weights, biases and batch norms wherever these suffice. Where not, a ``ChannelMask`` follows
        the non-linearity.
        """
        self.check_masks(masks)
        for name, rows in self.silent_rows(masks).items():
            _silence(self.model.get_submodule(name), rows)
        return self.masked(
            {name: mask for name, mask in masks.items() if not (self.places[name].is_silenced or mask.all())}
        )

    def masked(self, masks: dict[str, Tensor]) -> nn.Module:
        """The model, or a ``GraphModule`` of its parts, with a ``ChannelMask`` behind the non-linearities of masks."""
        if not masks:
            return self.model
        model, sites = self.explicit()
        for name, kept in masks.items():
            mask = kept.view(self.places[name].shape)
            layer: Any = self.model.get_submodule(name)
            fixed = ChannelMask(mask.to(layer.weight.device, layer.weight.dtype))
            replace_module(model, sites[name], nn.Sequential(model.get_submodule(sites[name]), fixed))
        return model

    def check_masks(self, masks: dict[str, Tensor]) -> None:
        """``ValueError`` unless there is one boolean mask (channels,) for every gate."""
        given = {name: tuple(mask.shape) for name, mask in masks.items()}
        expected = {name: tuple(shape) for name, shape in self.shapes.items()}
        if given != expected:
            raise ValueError(f"masks do not fit the model's channel gates: got {given}, expected {expected}")

    def silent_rows(self, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        """Name of a layer or batch norm -> boolean (channels,) of the channels that are kept in it."""
        return {module: masks[name] for name, place in self.places.items() for module in place.silent}

    def kept_rows(self, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        """Name of every Conv and Linear layer -> boolean (out_channels,) of those that pruning leaves in it."""
        silent = self.silent_rows(masks)
        layers = {str(node.target): self._module(node) for node in self.graph.nodes if is_layer(self.model, node)}
        return {
            name: silent.get(name, torch.ones(len(layer.weight), dtype=torch.bool, device=layer.weight.device))
            for name, layer in layers.items()
        }

    @cached_property
    def _needs_graph(self) -> bool:
        nodes = [place.node for place in self.places.values()]
        if not all(self._runs_once(node) for node in nodes):
            return True
        return bool(held_elsewhere(self.model, {self._module(node) for node in nodes}))

    def _runs_once(self, node: fx.Node) -> bool:
        return node.op == "call_module" and self._runs[str(node.target)] == 1

    def _module(self, node: fx.Node) -> Any:
        return module_of(self.model, node)

    def _find(self) -> Iterator[Place]:
        """Every place in the order of the graph; a layer gives its name to the first that it reaches."""
        order = {name: index for index, (name, _module) in enumerate(self.model.named_modules())}
        taken: set[str] = set()
        for node in self.graph.nodes:
            if not is_activation(self.model, node):
                continue
            sources = list(self._sources(first_input(node)))
            found = [(depth, order[name], name) for depth, name in sources if name not in taken]
            if not found or any(name == "" for _depth, name in sources):
                continue
            name = min(found)[2]
            layer: Any = self.model.get_submodule(name)
            trail, is_silent = self._silent(first_input(node))
            modules = {module: self.model.get_submodule(module) for module in trail}
            silent = {module: part for module, part in modules.items() if isinstance(part, (*DENSE_LAYERS, _BatchNorm))}
            if any(_channels(part) != len(layer.weight) for part in silent.values()):
                continue  # a sum that broadcasts: channels are not told apart
            taken.add(name)
            shape = (len(layer.weight), *[1] * (layer.weight.dim() - 2))
            zero = self._maps_zero_to_zero(node, shape)
            between = trail if self._runs_once(node) or node.op != "call_module" else (*trail, str(node.target))
            yield Place(name, node, shape, tuple(silent), is_silent and zero, tuple(between))

    def _sources(
        self, node: Any, depth: int = 0, additions: int = 1, pools: frozenset[int] = frozenset()
    ) -> Iterator[tuple[int, str]]:
        """(distance, name) of the layers that a non-linearity's input comes from, through pools of these dimensions.

        The name is empty where a pool mixes the channels of a layer that it is not made for.
        """
        if is_layer(self.model, node):
            layer: Any = self._module(node)
            if self._runs_once(node):
                yield depth, str(node.target) if pools <= {layer.weight.dim() - 2} else ""
        elif leaves_channels(self.model, node):
            pooled = pools | {pooled_dimensions(self.model, node)} - {0}
            yield from self._sources(first_input(node), depth + 1, additions, pooled)
        elif is_addition(node) and additions:
            for source in node.all_input_nodes:
                yield from self._sources(source, depth + 1, additions - 1, pools)

    def _silent(self, node: Any, additions: int = 1) -> tuple[tuple[str, ...], bool]:
        """Modules in which zeros can stand, or which then give zeros, and whether they make the node's output zero.

        Where a layer is read elsewhere too, the batch norm behind it can be zero; one without weight and bias cannot.
        """
        if node is None or len(node.users) != 1:
            return (), False
        if is_addition(node) and additions:
            parts = [self._silent(source, additions - 1) for source in node.all_input_nodes]
            is_zero = len(parts) == 2 and all(zero for _names, zero in parts)
            return tuple(name for names, _zero in parts for name in names), is_zero
        module, name = self._module(node), str(node.target)
        if not self._runs_once(node):
            passes = isinstance(module, STATELESS) or node_name(node) in PASSING_FUNCTIONS
            return self._silent(first_input(node), additions) if passes else ((), False)
        if type(module) in DENSE_LAYERS:
            return (name,), True
        if not isinstance(module, PASSING) or (isinstance(module, _BatchNorm) and module.weight is None):
            return (), False
        names, zero = self._silent(first_input(node), additions)
        return (name, *names), zero or isinstance(module, _BatchNorm)

    def _maps_zero_to_zero(self, node: fx.Node, shape: tuple[int, ...]) -> bool:
        if len(node.all_input_nodes) != 1:
            return False
        zeros = next(self.model.parameters()).new_zeros(1, *shape)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda _source: zeros)
        with torch.no_grad():
            if node.op == "call_module":
                given = self._module(node)(*args, **kwargs)
            elif node.op == "call_method":
                given = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                given = node.target(*args, **kwargs)  # type: ignore[operator]
        return not given.any()


def _trace(model: nn.Module) -> fx.Graph:
    """The graph of the model in eval mode, whose functions have that mode among their arguments."""
    try:
        with evaluation_mode(model):
            return fx.Tracer().trace(model)
    except Exception as error:  # whatever the model's code raises under symbolic inputs
        wrapped = next((name for name in WRAPPED if isinstance(getattr(model, name, None), nn.Module)), None)
        raise ValueError(
            f"channel gates are found by the network's graph, and torch.fx cannot trace {type(model).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}; "
            + (f"hand in model.{wrapped}" if wrapped else "granularity='weight' needs no graph")
        ) from error


def _channels(module: Any) -> int:
    return module.num_features if isinstance(module, _BatchNorm) else len(module.weight)


@torch.no_grad()
def _silence(module: Any, kept: Tensor) -> None:
    """Zeros in the rows of weight and bias that are not kept, in parameters of the module's own."""
    for name in ("weight", "bias"):
        parameter = getattr(module, name)
        if parameter is not None:
            rows = kept.to(parameter.device).view(-1, *[1] * (parameter.dim() - 1))
            setattr(module, name, nn.Parameter(parameter.masked_fill(~rows, 0), parameter.requires_grad))
