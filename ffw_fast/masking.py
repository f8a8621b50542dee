"""Which layers of a network can be masked, and masked layers put in their place."""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ffw_fast import philox
from ffw_fast.channels import ChannelGraph
from ffw_fast.checks import check_seed
from ffw_fast.flat_layout import flat_offsets
from ffw_fast.gates import check_granularity, gate_kind
from ffw_fast.modules import MASKED_CLASSES, GatedActivation, MaskedLayer, check_dense, masked_layers
from ffw_fast.parts import held_elsewhere, matching, replace_module
from ffw_fast.simplify import WholeModules

DenseLayer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear  # what can be masked
LayerFilter = Callable[[str], bool] | Iterable[str] | str | None


def mask_model(
    model: nn.Module, gate: str = "ffw", granularity: str = "weight", *, include: LayerFilter = None, seed: int = 0
) -> nn.Module:
    """Put masked layers in place of a model's Conv and Linear layers and freeze all other parameters.

    Batch norm's running statistics still move in train mode: keep the model in eval mode.

    Masked are ``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d`` and ``nn.Linear`` themselves, not their subclasses (such as
    the output projection of ``nn.MultiheadAttention``, which is not read through its ``forward``). A layer that stands
    in the model under several names becomes one masked layer under all of them. Layers that are masked already stay as
    they are, so that several calls with different ``include`` can give layers different gates. Where an error is
    raised, the model is as it was.

    A layer whose weight the model's code reads past the layer's own ``forward`` would stay dense there and is refused.
    That is seen in the graph of ``torch.fx``; in a model that cannot be traced such a layer is one whose scores have
    no gradient (``grad is None``) after a backward pass.

    Args:
        model: any module; it is changed in place. ``ffw_fast.masked_layers(model)`` lists what was masked.
        gate: "ffw", "hard", "bernoulli" or "concrete".
        granularity: "weight", one gate per weight; or "channel", one gate per output channel or neuron behind every
            non-linearity that a layer's output reaches (``ffw_fast.channels``), in a ``GatedActivation`` that takes
            the non-linearity's place. The layers themselves stay dense, frozen.
        include: which layers, by a predicate on names or shell-style patterns. Default: all, the classifier included.
        seed: of random gates, 0 to 2**63 - 1.

    Returns:
        The model; a new masked layer where the model is itself a single dense layer; with channel gates behind
        functions or behind modules that run several times, a ``torch.fx.GraphModule`` of the model's parts.

    Raises:
        TypeError, ValueError: unknown gate or granularity, nothing to mask, a layer that cannot be masked, or, for
            channels, a model that ``torch.fx`` cannot trace or that is masked already.
    """
    gate_kind(gate)
    check_granularity(granularity)
    check_seed(seed)
    if granularity == "channel":
        return _gate_channels(model, gate, include, seed)
    layers = maskable_layers(model, include)
    _check_tree(model, layers)
    scores = [layer.scores for layer in masked_layers(model).values()]
    offsets = flat_offsets(weight.numel() for weight in (*scores, *(layer.weight for layer in layers.values())))
    replacements: dict[nn.Module, nn.Module] = {}
    for layer, offset in zip(layers.values(), offsets[len(scores) :], strict=False):
        masked = MASKED_CLASSES[type(layer)].from_dense(layer, gate)
        masked.draw.copy_(philox.make_draw(seed, 0, offset))
        replacements[layer] = masked
    kept = set(scores)
    for parameter in model.parameters():
        if parameter not in kept:
            parameter.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]
    _leave_fast_paths(model)
    return replacements.get(model, model)


def _check_tree(model: nn.Module, layers: dict[str, DenseLayer]) -> None:
    """Refuse layers that the model's code may reach, or read, past the model's tree, where they would stay dense."""
    held = held_elsewhere(model, set(layers.values()))
    read = _read_parameters(model)
    for name, layer in layers.items():
        if f"{name}.weight" in read:
            raise ValueError(
                f"the weight of layer {name!r} is read past the layer's own forward method, where it would stay "
                "without gates: call the layer instead, or leave it out with `include`"
            )
        if layer in held:
            raise ValueError(
                f"layer {name!r} is held by the attribute {held[layer]} too, through which it would be called without "
                "gates: keep layers in nn.ModuleList or nn.ModuleDict, or leave this one out with `include`"
            )


def _read_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters whose values the model's own code reads; none where its graph cannot be traced."""
    try:
        twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()}).eval()
        with torch.random.fork_rng(devices=[]):
            graph = WholeModules(MaskedLayer).trace(twin)
    except Exception:  # whatever the model's code raises under symbolic inputs
        return set()
    return {str(node.target) for node in graph.nodes if node.op == "get_attr" and not all(map(_describes, node.users))}


def _describes(node: fx.Node) -> bool:
    """Whether a node asks a tensor for no more than its kind."""
    name = node.args[1] if node.target is getattr else node.target
    return name in ("dtype", "device", "shape", "ndim", "size", "dim", "numel")


def _gate_channels(model: nn.Module, gate: str, include: LayerFilter, seed: int) -> nn.Module:
    if isinstance(model, nn.Module) and (masked := masked_layers(model)):
        raise ValueError(f"channels are gated in a dense model; masked already: {', '.join(map(repr, masked))}")
    layers = maskable_layers(model)
    graph = ChannelGraph(model)
    if include is not None:
        chosen = _chosen(list(graph.places), include)
        graph.places = {name: place for name, place in graph.places.items() if name in chosen}
    offsets = flat_offsets(place.channels for place in graph.places.values())
    model.requires_grad_(False)
    gated, sites = graph.explicit()
    for (name, place), offset in zip(graph.places.items(), offsets, strict=False):
        weight = layers[name].weight
        activation = gated.get_submodule(sites[name])
        masked_activation = GatedActivation(activation, place.shape, gate, weight.dtype, weight.device)
        masked_activation.draw.copy_(philox.make_draw(seed, 0, offset))
        replace_module(gated, sites[name], masked_activation)
    return gated


def _leave_fast_paths(model: nn.Module) -> None:
    """Keep PyTorch's transformer layers from their fused path in eval mode, which reads weights past the gates."""
    for part in model.modules():
        if isinstance(part, nn.TransformerEncoderLayer) and masked_layers(part):
            part.activation_relu_or_gelu = 0  # known to none but the fused path, which 0 rules out
        elif isinstance(part, nn.TransformerEncoder) and masked_layers(part):
            part.use_nested_tensor = False


def maskable_layers(model: nn.Module, include: LayerFilter = None) -> dict[str, DenseLayer]:
    """Name -> layer of every dense layer that can be masked, in the order of ``model.named_modules()``.

    Args:
        model: any module. A layer that stands in it under several names is listed once, under the first.
        include: a predicate on names, or one or several shell-style patterns (``"layer4.*"``). Default: all.

    Raises:
        TypeError: the model is no module, or a weight is not real floating point (complex, quantised).
        ValueError: no layer is left, a pattern matches none, two layers share one weight, a lazy module is not yet
            initialised, or a layer is not what it seems, so that it could not be frozen: its weight is computed
            (parametrized), or its ``forward`` was replaced.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, got {type(model).__name__}")
    _check_initialised(model)
    found: dict[str, Any] = dict(_dense_layers(model))
    chosen = found.keys() if include is None else _chosen(list(found), include)
    layers = {name: layer for name, layer in found.items() if name in chosen}
    if not layers:
        which = _why_none(model, found)
        raise ValueError(f"nothing to mask: {type(model).__name__} has no Conv or Linear layer{which}")
    owners: dict[Tensor, str] = {}
    for name, layer in layers.items():
        check_dense(layer, f"layer {name!r}")
        weight = layer.weight
        if weight in owners:
            raise ValueError(
                f"layers {owners[weight]!r} and {name!r} share one weight: untie them, or leave one out of mask_model "
                "with `include`"
            )
        owners[weight] = name
    return layers


def _chosen(names: list[str], include: LayerFilter) -> set[str]:
    """The names that a predicate or shell-style patterns choose; every pattern must match at least one."""
    if callable(include):
        return set(filter(include, names))
    patterns = (include,) if isinstance(include, str) else include
    if not isinstance(patterns, Iterable):
        raise TypeError(f"include must be a predicate or patterns of names, got {type(include).__name__}")
    return set(matching(names, list(patterns), "include", "Conv and Linear layers"))


def _why_none(model: nn.Module, found: dict[str, nn.Module]) -> str:
    if found:
        return " of the given names"
    if masked_layers(model):
        return " that is not masked already"
    if isinstance(model, torch.jit.ScriptModule | fx.GraphModule):
        return ", as it was scripted, traced or exported: hand in the model that it was made of"
    if others := ungated_weights(model):
        return f", only weights of other modules, which cannot be gated: {', '.join(others)}"
    return ""


def ungated_weights(model: nn.Module) -> list[str]:
    """Names of the weights that are of no layer with gates, and the classes of the modules whose they are.

    Weights are parameters that extend in at least two dimensions: no biases, no scales of channels.
    """
    gated = {layer for _name, layer in _dense_layers(model)}
    return [
        f"{f'{name}.{own}' if name else own!r} ({type(module).__name__})"
        for name, module in model.named_modules()
        if module not in gated
        for own, weight in module.named_parameters(recurse=False)
        if sum(size > 1 for size in weight.shape) >= 2
    ]


def _dense_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The dense layers whose own ``forward`` is what uses their weight: exact classes, no subclass.

    ``nn.MultiheadAttention`` reads its projection's weight past that module's ``forward``; its class is a subclass. A
    parametrized layer, whose class PyTorch replaces by a subclass, is listed, to be refused.
    """
    for name, layer in model.named_modules():
        if parametrize.type_before_parametrizations(layer) in MASKED_CLASSES:
            yield name, layer


def _check_initialised(model: nn.Module) -> None:
    for tensors in (model.named_parameters(), model.named_buffers()):
        for name, tensor in tensors:
            if is_lazy(tensor):
                raise ValueError(f"{name!r} is not initialised yet: run a batch through the lazy module first")
