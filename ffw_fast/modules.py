"""Masked layers: drop-ins for PyTorch's dense layers with one gate per frozen weight."""

import copy
import numbers
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ffw_fast import philox
from ffw_fast.autograd import GatedConv2d, GatedLinear, GateWeight
from ffw_fast.channels import ChannelMask
from ffw_fast.fusion import fuses
from ffw_fast.gates import gate_kind

GATED_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FLOAT32 = torch.finfo(torch.float32)


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
        check_dense(layer, f"the {cls.dense_class.__name__}")
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


def check_dense(layer: nn.Module, title: str) -> None:
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
