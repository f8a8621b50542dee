"""Gradients of the raw operators: the straight-through gate, and mutual information by the logits."""

import torch
from torch import Tensor

from ffw_fast import ops


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
    def backward(ctx, grad: Tensor):
        weight, scores, temperature, draw = ctx.saved_tensors
        weight_grad = scores_grad = None
        if ctx.needs_input_grad[0]:
            weight_grad = ops.gate_weight(grad, scores, temperature, draw, ctx.kind)
        if ctx.needs_input_grad[1]:
            scores_grad = ops.gate_weight_backward(grad, weight, scores, temperature, draw, ctx.kind)
        return weight_grad, scores_grad, None, None, None


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
    def backward(ctx, grad: Tensor, _joint_grad):
        logits, labels, joint = ctx.saved_tensors
        return ops.mutual_information_backward(grad, logits, labels, joint), None
