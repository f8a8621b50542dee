"""Gradients of the raw operators: the straight-through gate, masked layers, and mutual information by the logits."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ffw_fast import ops


class _Bound(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def apply_defaults(self) -> None:
        """There are none."""


class _Positional(inspect.Signature):
    """The signature of a function that is always given all its arguments, in order."""

    def bind(self, *args: Any) -> _Bound:  # type: ignore[override]
        return _Bound(args, {})


def _called_in_order(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Spares ``apply`` from matching arguments with the names of ``forward``, which costs more than a small layer."""
    parameters = inspect.signature(function.forward).parameters.values()
    function.forward.__signature__ = _Positional(list(parameters))  # type: ignore[attr-defined]
    return function


class _Refusing(torch.autograd.Function):
    """A gradient as it is, whose own derivative by ``sources``, which it was computed from, is an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, *_sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, _grad: Tensor):
        raise RuntimeError(
            "this gradient has no derivative of its own: the straight-through gradient of a gate is not that of a "
            "function, and mutual_information and fused masked layers have first derivatives alone"
        )


def _once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass by raw operators, through which ``create_graph=True`` would lead to zeros.

    PyTorch's decorator of that name looks at the incoming gradient alone, and this one at what was saved, too.
    """

    @functools.wraps(backward)
    def refusing(ctx: Any, *grads: Tensor) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *grads)
        sources = [source for source in (*grads, *ctx.saved_tensors) if source is not None and source.requires_grad]
        with torch.no_grad():
            found = backward(ctx, *grads)
        return tuple(None if part is None else _Refusing.apply(part, *sources) for part in found)

    return refusing


@_called_in_order
class GateWeight(torch.autograd.Function):
    """``v = w * g(m)`` with the straight-through gradient to the scores ``m``.

    A frozen weight costs nothing; where the weight is trained too, its gradient is ``dJ/dv * g``, which is the forward
    operator applied to the gradient.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, scores: Tensor, temperature: Tensor, draw: Tensor, kind: int) -> Tensor:
        return ops.gate_weight(weight, scores, temperature, draw, kind)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.kind = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @_once_differentiable
    def backward(ctx, grad: Tensor):
        weight, scores, temperature, draw = ctx.saved_tensors
        weight_grad = scores_grad = None
        if ctx.needs_input_grad[0]:
            weight_grad = ops.gate_weight(grad, scores, temperature, draw, ctx.kind)
        if ctx.needs_input_grad[1]:
            scores_grad = ops.gate_weight_backward(grad, weight, scores, temperature, draw, ctx.kind)
        return weight_grad, scores_grad, None, None, None


@_called_in_order
class GatedLinear(torch.autograd.Function):
    """``relu(x (w * g(m))^T + bias)``, the ReLU if asked for, by one operator; ``w`` and ``bias`` are frozen."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, scores: Tensor, temperature: Tensor, draw: Tensor, kind: int, bias: Tensor | None,
        relu: bool,
    ) -> Tensor:  # fmt: skip
        return ops.masked_linear(x, weight, scores, temperature, draw, kind, bias, relu)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.kind, _bias, relu = inputs
        ctx.save_for_backward(*tensors, output if relu else None)

    @staticmethod
    @_once_differentiable
    def backward(ctx, grad: Tensor):
        x, *gate, output = ctx.saved_tensors
        x_grad = scores_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = ops.masked_linear_input_grad(grad, *gate, ctx.kind, output)
        if ctx.needs_input_grad[2]:
            scores_grad = ops.masked_linear_score_grad(grad, x, *gate, ctx.kind, output)
        return x_grad, None, scores_grad, None, None, None, None, None


@_called_in_order
class GatedConv2d(torch.autograd.Function):
    """``relu(conv2d(x, w * g(m), bias))``, the ReLU if asked for, by one operator; ``w`` and ``bias`` are frozen."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, scores: Tensor, temperature: Tensor, draw: Tensor, kind: int, bias: Tensor | None,
        stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], groups: int, relu: bool,
    ) -> Tensor:  # fmt: skip
        return ops.masked_conv2d(
            x, weight, scores, temperature, draw, kind, bias, stride, padding, dilation, groups, relu
        )

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.kind, _bias, stride, padding, dilation, groups, relu = inputs
        ctx.geometry = stride, padding, dilation, groups
        ctx.save_for_backward(*tensors, output if relu else None)

    @staticmethod
    @_once_differentiable
    def backward(ctx, grad: Tensor):
        x, *gate, output = ctx.saved_tensors
        x_grad = scores_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = ops.masked_conv2d_input_grad(grad, x.shape, *gate, ctx.kind, *ctx.geometry, output)
        if ctx.needs_input_grad[2]:
            scores_grad = ops.masked_conv2d_score_grad(grad, x, *gate, ctx.kind, *ctx.geometry, output)
        return x_grad, None, scores_grad, *[None] * 9


@_called_in_order
class MutualInformation(torch.autograd.Function):
    """MI of labels (n, heads) and the predictions behind logits (n, heads, K): one number a head."""

    @staticmethod
    def forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return ops.mutual_information(logits, labels)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    @_once_differentiable
    def backward(ctx, grad: Tensor, _joint_grad):
        logits, labels, joint = ctx.saved_tensors
        return ops.mutual_information_backward(grad, logits, labels, joint), None
