"""Gradients of the raw operators: what has no second derivative says so, and what needs none has it."""

import pytest
import torch
from torch.func import functional_call, grad, jacrev, vmap

from ffw_fast.modules import MaskedLinear
from ffw_fast.objective import mutual_information

NONE = "no derivative of its own"


def layer() -> MaskedLinear:
    masked = MaskedLinear(5, 3)
    with torch.no_grad():
        masked.scores.copy_(torch.linspace(-1, 1, 15).view(3, 5))
    return masked


def test_a_straight_through_gradient_has_no_derivative():
    masked, x = layer(), torch.randn(4, 5)
    (by_scores,) = torch.autograd.grad(masked(x).square().sum(), masked.scores, create_graph=True)
    with pytest.raises(RuntimeError, match=NONE):
        torch.autograd.grad(by_scores.square().sum(), masked.scores)


def test_nor_does_it_under_functional_transforms():
    masked, x = layer(), torch.randn(4, 5)

    def loss(scores):
        return functional_call(masked, {"scores": scores}, (x,)).square().sum()

    scores = masked.scores.detach()
    assert jacrev(loss)(scores).shape == scores.shape
    assert vmap(grad(loss))(torch.stack([scores, 2 * scores])).shape == (2, *scores.shape)
    with pytest.raises(RuntimeError, match=NONE):
        jacrev(jacrev(loss))(scores)


def test_the_second_derivative_of_the_information_is_not_dropped_from_a_sum():
    logits, labels = torch.randn(6, 3, requires_grad=True), torch.randint(3, (6,))
    loss = mutual_information(logits, labels, 3) + logits.square().sum()
    (by_logits,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match=NONE):
        by_logits.sum().backward()


def test_a_gradient_penalty_by_inputs_reaches_the_scores():
    masked, x = layer(), torch.randn(4, 5, requires_grad=True)
    (by_x,) = torch.autograd.grad(masked(x).square().sum(), x, create_graph=True)
    by_x.square().sum().backward()
    s = torch.sigmoid(masked.scores.detach())
    gate = (2 * s).clamp(max=1).requires_grad_()
    z = x.detach().clone().requires_grad_()
    dense = torch.nn.functional.linear(z, masked.weight * gate, masked.bias)
    (by_z,) = torch.autograd.grad(dense.square().sum(), z, create_graph=True)
    (by_gate,) = torch.autograd.grad(by_z.square().sum(), gate)
    torch.testing.assert_close(masked.scores.grad, by_gate * 2 * s * (1 - s))
