"""Which inputs of a network's layers do not depend on the network's input: found by letting NaN stand for "may vary".

The network runs once on NaN. Arithmetic hands NaN on, so a number that comes out is one that the input cannot reach.
Only a weight or factor of zero must stop it, which ``0 * NaN`` does not: layers, batch norms and channel masks get a
hook for that, and products of two tensors a rule. What swallows NaN (a comparison, say) would claim too much and is
refused; and a constant must also be seen on real samples.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ffw_fast.channels import ChannelMask
from ffw_fast.parts import DENSE_LAYERS

PRODUCTS = (torch.ops.aten.mul.Tensor, torch.ops.aten.mul_.Tensor)
SELECTING = ("aten::gather", "aten::index", "aten::index_select")  # like views, they may leave all NaN behind
ROUNDING = 1e-12  # relative, in double precision: a pool over equal numbers may round them differently


@torch.no_grad()
def constant_inputs(model: nn.Module, samples: Tensor) -> dict[str, Tensor]:
    """Layer name -> for each of its input channels, the value that it always has, or NaN where it varies.

    Args:
        model: in eval mode and double precision.
        samples: float64 (n, ...), on which the claim is checked.

    Returns:
        Float64 tensors (in_channels,) of every ``nn.Conv1d/2d/3d`` and ``nn.Linear`` that runs and has a constant
        input. A channel is constant where all its positions have one value, in every call of the layer.

    Raises:
        ValueError: an operation of the network swallows NaN.
    """
    names = {layer: name for name, layer in model.named_modules() if type(layer) in DENSE_LAYERS}
    scales = [module for module in model.modules() if isinstance(module, _BatchNorm | ChannelMask)]
    watch = _NanWatch()
    with watch, ExitStack() as hooks:
        for module in (*names, *scales):
            hooks.enter_context(module.register_forward_hook(watch.stop_at_zeros, with_kwargs=True))
        claimed = _seen_inputs(model, names, torch.full_like(samples[:1], torch.nan), watch)
    seen = _seen_inputs(model, names, samples, watch)
    agreed = {name: _agreed(claimed[name], seen[name]) for name in claimed.keys() & seen.keys()}
    return {name: agreed[name] for name in names.values() if name in agreed and not agreed[name].isnan().all()}


def _seen_inputs(model: nn.Module, names: dict[nn.Module, str], x: Tensor, watch: "_NanWatch") -> dict[str, Tensor]:
    """What every layer reads in a pass over x: (in_channels,), NaN where a channel has not one value."""
    seen: dict[str, Tensor] = {}

    def look(layer: nn.Module, inputs: tuple[Any, ...], by_name: dict[str, Any]) -> None:
        name, (read,) = names[layer], inputs or by_name.values()
        with watch.paused():
            values = _one_value(read, _channel_dim(layer, read))
            seen[name] = _agreed(seen[name], values) if name in seen else values

    with ExitStack() as hooks:
        for layer in names:
            hooks.enter_context(layer.register_forward_pre_hook(look, with_kwargs=True))
        model(x)
    return seen


def _channel_dim(layer: Any, x: Tensor) -> int:
    """The dimension of a layer's input x that holds its channels or features."""
    return x.dim() - 1 if isinstance(layer, nn.Linear) else x.dim() - (layer.weight.dim() - 1)


def _one_value(x: Tensor, dim: int) -> Tensor:
    """For each channel the one value that all its elements have, else NaN."""
    elements = x.movedim(dim, 0).flatten(1) if x.dim() > 1 else x.unsqueeze(1)
    return _agreed(elements.amin(1), elements.amax(1))  # both are NaN where one element is


def _agreed(a: Tensor, b: Tensor) -> Tensor:
    """a where b is the same up to rounding, else NaN."""
    same = (a - b).abs() <= ROUNDING * torch.maximum(a.abs(), b.abs())
    return a.masked_fill(~same, torch.nan)


class _NanWatch(TorchDispatchMode):
    """Raises ``ValueError`` at an operation that NaN goes into and does not come out of."""

    def __init__(self) -> None:
        super().__init__()
        self._is_paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._is_paused and func in PRODUCTS and all(isinstance(factor, Tensor) for factor in args):
            first, second = args
            is_zero = (first == 0) | (second == 0)  # and stays so, whatever the other factor may be
            return func(first, second).masked_fill_(is_zero, 0)
        outputs = func(*args, **(kwargs or {}))
        if not self._is_paused and not _selects(func) and _has_nan((args, kwargs)) and not _has_nan(outputs):
            raise ValueError(f"{func} decides by values")
        return outputs

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For what is not the network's own."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def stop_at_zeros(
        self, layer: Any, inputs: tuple[Any, ...], by_name: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        """Forward hook: the layer's output where NaN reaches only what has a weight for it that is not 0."""
        (x,) = inputs or by_name.values()
        with self.paused():
            varies = x.isnan()
            if not varies.any():
                return None
            known = layer.forward(x.masked_fill(varies, 0))
            return known.masked_fill(_reached(layer, varies.to(x.dtype)) > 0, torch.nan)


def _selects(func: Any) -> bool:
    """Whether an operation gives a part of its input, or fresh memory of its shape, or nothing."""
    name, returns = func._schema.name, func._schema.returns
    is_fresh = name.startswith("aten::new_") or name.endswith("_like")
    return name in SELECTING or is_fresh or not returns or returns[0].alias_info is not None


def _has_nan(values: Any) -> bool:
    tensors = (value for value in tree_leaves(values) if isinstance(value, Tensor) and value.is_floating_point())
    return any(bool(tensor.isnan().any()) for tensor in tensors)


def _reached(layer: Any, varies: Tensor) -> Tensor:
    """Positive where an input that varies (1, else 0) meets a weight that is not 0."""
    if isinstance(layer, ChannelMask):
        return layer.forward(varies)
    if isinstance(layer, _BatchNorm):
        if layer.weight is None:
            return varies
        return varies * (layer.weight != 0).view(-1, *[1] * (varies.dim() - 2))
    apply: Callable[..., Tensor] = nn.functional.linear if isinstance(layer, nn.Linear) else layer._conv_forward
    return apply(varies, (layer.weight != 0).to(varies.dtype), None)
