"""Masked layers: drop-ins for PyTorch's dense layers with one gate per frozen weight."""

import copy
import math
import numbers
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ffw_fast import philox
from ffw_fast.autograd import GatedConv2d, GatedLinear, GateWeight
from ffw_fast.channels import ChannelGraph, ChannelMask
from ffw_fast.checks import check_seed
from ffw_fast.fusion import fuses
from ffw_fast.gates import gate_kind
from ffw_fast.parts import held_elsewhere, matching, replace_module
from ffw_fast.simplify import WholeModules

FLAT_ALIGNMENT = 16  # elements; each layer's gates start at such a multiple in the network's flat list of gates
GATED_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FLOAT32 = torch.finfo(torch.float32)
GRANULARITIES = ("weight", "channel")
DenseLayer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear  # what can be masked
LayerFilter = Callable[[str], bool] | Iterable[str] | str | None


class MaskedLayer(nn.Module):
    """What all masked layers share: a frozen weight, a score for each of its elements, and the gate between them.

    Attributes:
        weight: frozen weight, as in the dense layer.
        bias: frozen bias or None; never gated.
        scores: trainable gate scores of the weight's shape, 0 at the start. Pruning keeps a weight where they are
            at least 0.
        gate: name of the gate kind, one of ``ffw_fast.GATES``.
        temperature: float32 scalar buffer; set it with ``ffw_fast.set_temperature``.
        draw: int64 buffer that keys the uniform numbers of random gates (``ffw_fast.philox``). In training mode every
            forward pass draws a new mask, in eval mode the last one stays until ``ffw_fast.draw_gates``. Use eval
            mode under ``torch.func`` transforms, which forbid that a forward pass changes a buffer, and under
            activation checkpointing, whose second forward pass would draw another mask than the first.
    """

    weight: Any  # nn.Parameter; PyTorch declares it otherwise in each dense class
    bias: Any
    scores: nn.Parameter
    temperature: Tensor
    draw: Tensor

    dense_class: type[nn.Module]

    def add_gate(self, gate: str) -> None:
        """Freeze the layer's parameters and give it scores, a temperature and a draw."""
        self.kind = gate_kind(gate)
        self.gate = gate
        _check_weight(self.weight, type(self).__name__)
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad_(False)
        self.scores = nn.Parameter(torch.zeros_like(self.weight))
        device = self.weight.device
        self.register_buffer("temperature", torch.ones((), dtype=torch.float32, device=device))
        self.register_buffer("draw", philox.make_draw(device=device))

    def gated_weight(self) -> Tensor:
        """``weight * gate(scores)``, of the weight's shape and dtype; its gradient reaches the scores."""
        return GateWeight.apply(*self._gate())

    def _gate(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        """What the operators are told of a layer's gate in one pass; draws it anew where it is random."""
        draw = self.draw
        if self.kind.is_random:
            if self.training:
                draw_gates(self)
            draw = draw.clone()  # the backward pass needs this pass's draw, whatever is drawn before it
        return self.weight, self.scores, self.temperature, draw, int(self.kind)

    def reset_parameters(self) -> None:
        """Initialise weight and bias as the dense layer does; scores 0, temperature 1, no mask drawn yet."""
        super().reset_parameters()  # type: ignore[misc]
        if "scores" in self._parameters:  # not while the dense layer is being built
            with torch.no_grad():
                self.scores.zero_()
            self.temperature.fill_(1)
            self.draw.zero_()

    def mask(self) -> Tensor:
        """Boolean tensor of the weight's shape: which weights pruning keeps, ``scores >= 0``."""
        return self.scores.detach() >= 0

    @classmethod
    def from_dense(cls, layer: nn.Module, gate: str = "ffw") -> Self:
        """A masked layer over the dense layer's own weight and bias (shared, not copied), scores 0.

        Raises:
            TypeError: a layer of another class, or a weight that is not real floating point.
            ValueError: unknown gate, or a weight that the layer computes (parametrized) rather than holds.
        """
        if type(layer) is not cls.dense_class:
            raise TypeError(f"{cls.__name__}.from_dense needs a {cls.dense_class.__name__}, got {type(layer).__name__}")
        _check_dense(layer, f"the {cls.dense_class.__name__}")
        masked = _recast(layer, cls)
        for name, parameter in layer.named_parameters(recurse=False):
            setattr(masked, name, nn.Parameter(parameter.detach(), requires_grad=False))
        masked.add_gate(gate)
        return masked

    def to_dense(self) -> nn.Module:
        """The pruned dense layer: a copy of the weight with zeros where ``scores < 0``, and of the bias."""
        dense = _recast(self, self.dense_class)
        for name in ("scores", "temperature", "draw", "kind", "gate"):
            delattr(dense, name)
        zero = torch.zeros((), dtype=self.weight.dtype, device=self.weight.device)
        dense.weight = nn.Parameter(torch.where(self.mask(), self.weight.detach(), zero))
        dense.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone())
        return dense

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (super().extra_repr(), f"gate={self.gate!r}")))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = self.temperature
        super()._apply(fn, recurse)
        if self.temperature.dtype != torch.float32:  # half() and the like: 1e-8 has no place in 16 bits
            self.temperature = exact.to(self.temperature.device)
        return self


def _recast(layer: nn.Module, cls: Any) -> Any:
    """The layer as another class: the same settings, hooks, parameters and buffers, in containers of its own."""
    twin = cls.__new__(cls)
    own = {name: copy.copy(value) if isinstance(value, dict | set) else value for name, value in vars(layer).items()}
    own.pop("_compiled_call_impl", None)  # what layer.compile() compiled is the other class's forward
    vars(twin).update(own)
    return twin


class _MaskedConv(MaskedLayer):
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def __init__(self, *args: Any, gate: str = "ffw", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_gate(gate)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.gated_weight(), self.bias)


class MaskedConv1d(_MaskedConv, nn.Conv1d):
    """``nn.Conv1d`` with a gate per weight: the same arguments and ``gate``. See ``MaskedLayer``."""

    dense_class = nn.Conv1d


class MaskedConv2d(_MaskedConv, nn.Conv2d):
    """``nn.Conv2d`` with a gate per weight: the same arguments and ``gate`` ("ffw", "hard", "bernoulli", "concrete").

    The weight has shape (out_channels, in_channels / groups, height, width), and so have the scores. ``ValueError``
    for an unknown gate. See ``MaskedLayer`` for its parameters and buffers.
    """

    dense_class = nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:
        if fuses(self, x):
            geometry = (self.stride, self.padding, self.dilation, self.groups)
            return GatedConv2d.apply(x, *self._gate(), self.bias, *geometry, False)
        return super().forward(x)


class MaskedConv3d(_MaskedConv, nn.Conv3d):
    """``nn.Conv3d`` with a gate per weight: the same arguments and ``gate``. See ``MaskedLayer``."""

    dense_class = nn.Conv3d


class MaskedLinear(MaskedLayer, nn.Linear):
    """``nn.Linear`` with a gate per weight: the same arguments and ``gate`` ("ffw", "hard", "bernoulli", "concrete").

    The weight has shape (out_features, in_features), and so have the scores. ``ValueError`` for an unknown gate. See
    ``MaskedLayer`` for its parameters and buffers.
    """

    dense_class = nn.Linear

    def __init__(self, *args: Any, gate: str = "ffw", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_gate(gate)

    def forward(self, x: Tensor) -> Tensor:
        if fuses(self, x):
            return GatedLinear.apply(x, *self._gate(), self.bias, False)
        return nn.functional.linear(x, self.gated_weight(), self.bias)


class GatedActivation(MaskedLayer):
    """A non-linearity whose output channels are gated, one score a channel: ``activation(x) * gate(scores)``.

    Args:
        activation: the non-linearity.
        shape: (channels, 1, ...), which broadcasts against its output; the scores have shape (channels,).
        gate: "ffw", "hard", "bernoulli" or "concrete".
        dtype, device: of the scores.
    """

    def __init__(
        self,
        activation: nn.Module,
        shape: tuple[int, ...],
        gate: str = "ffw",
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.shape = shape
        self.register_buffer("weight", torch.ones(shape[0], dtype=dtype, device=device), persistent=False)
        self.add_gate(gate)

    def forward(self, input: Tensor) -> Tensor:
        y = self.activation(input)
        return y * self.gated_weight().view(self.shape).to(y.dtype)

    def to_dense(self) -> nn.Module:
        """The non-linearity, with a fixed ``ChannelMask`` behind it where channels are pruned."""
        if self.mask().all():
            return self.activation
        return nn.Sequential(self.activation, ChannelMask(self.mask().view(self.shape).to(self.weight.dtype)))

    def reset_parameters(self) -> None:
        """Scores 0, temperature 1, no mask drawn yet."""
        with torch.no_grad():
            self.scores.zero_()
        self.temperature.fill_(1)
        self.draw.zero_()


MASKED_CLASSES: dict[type[nn.Module], type[MaskedLayer]] = {
    masked.dense_class: masked for masked in (MaskedConv1d, MaskedConv2d, MaskedConv3d, MaskedLinear)
}


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
        _check_dense(layer, f"layer {name!r}")
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


def _check_dense(layer: nn.Module, title: str) -> None:
    """Refuse a layer that would not use the masked weight, or use it in a way of its own."""
    if parametrize.is_parametrized(layer) or layer._parameters.get("weight") is None:
        raise ValueError(f"the weight or bias of {title} is computed by a parametrization; remove that first")
    if "forward" in vars(layer):
        raise ValueError(f"the forward method of {title} was replaced, so its weight cannot be gated; restore it first")
    _check_weight(layer.weight, title)


def _check_weight(weight: Tensor | nn.Module, title: str) -> None:
    if weight.dtype not in GATED_DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in GATED_DTYPES)
        raise TypeError(f"the weight of {title} is {weight.dtype}; only {known} weights can be gated")


def flat_offsets(sizes: Iterable[int]) -> list[int]:
    """Where each layer's gates start in the network's flat list of gates, and the list's length as the last entry."""
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + math.ceil(size / FLAT_ALIGNMENT) * FLAT_ALIGNMENT)
    return offsets


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


def check_granularity(granularity: str) -> None:
    """``ValueError`` with the known granularities for any other."""
    if granularity not in GRANULARITIES:
        raise ValueError(f"unknown granularity {granularity!r}; known granularities: {', '.join(GRANULARITIES)}")


def masked_layers(model: nn.Module) -> dict[str, MaskedLayer]:
    """Name -> masked layer of everything that is masked in the model (``""`` for the model itself).

    Raises:
        TypeError: the model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, got {type(model).__name__}")
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, MaskedLayer)}


def _masked_layers_of(module: nn.Module, purpose: str) -> Iterable[MaskedLayer]:
    layers = masked_layers(module)
    if not layers:
        raise ValueError(f"{purpose}: {type(module).__name__} has no masked layer; call ffw_fast.mask_model first")
    return layers.values()


def set_temperature(module: nn.Module, temperature: float) -> None:
    """Set the temperature of every masked layer in the module, or of the layer itself.

    Raises:
        ValueError: the temperature is not a positive number that float32 holds in full precision, or nothing is masked.
        TypeError: it is no number, or the module is none.
    """
    if not isinstance(temperature, numbers.Real | Tensor):
        raise TypeError(f"the temperature must be a number, got {type(temperature).__name__}")
    temperature = float(temperature)
    if not FLOAT32.tiny <= temperature <= FLOAT32.max:
        raise ValueError(f"the temperature must be from {FLOAT32.tiny:.3g} to {FLOAT32.max:.3g}, got {temperature}")
    for layer in _masked_layers_of(module, "set_temperature"):
        layer.temperature.fill_(temperature)


def draw_gates(module: nn.Module) -> None:
    """Draw the random gates of every masked layer in the module anew. Gates of the other kinds stay as they are.

    Raises:
        ValueError: nothing in it is masked.
    """
    for layer in _masked_layers_of(module, "draw_gates"):
        layer.draw[1] += 1
