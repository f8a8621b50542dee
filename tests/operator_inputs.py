"""Inputs of the operators, drawn from a seed, and calls that leave them as they are."""

import math

import torch

from ffw_fast import philox

HALF = (torch.bfloat16, torch.float16)
# Of weight and scores.
DTYPES = [(dtype, dtype) for dtype in (torch.float64, torch.float32, *HALF)] + [
    (dtype, torch.float32) for dtype in HALF
]
ADAM = (0.9, 0.999, 1e-8, 1e-4)  # betas, eps, weight decay
SGD = (0.1, 0.9, 1e-4)  # learning rate, momentum, weight decay
RULE = (1e-3, 5)  # threshold and patience of the plateau


def one(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32)


def gate_inputs(shape, dtype=torch.float32, scores_dtype=None, temperature=1.0, seed=0):
    """Gradient, weight, scores spread over the gate's interesting range, temperature and draw."""
    source = torch.Generator().manual_seed(seed)
    grad, weight, scores = (torch.randn(shape, generator=source, dtype=torch.float64) for _ in range(3))
    scores = (scores * min(4 * temperature, 2.0)).to(scores_dtype or dtype)
    return grad.to(dtype), weight.to(dtype), scores, one(temperature), philox.make_draw(11, 7)


def adam_inputs(count, dtype=torch.float32, scores_dtype=None, seed=0):
    """What a step of Adam changes, and what it takes besides."""
    grad, weight, scores, temperature, draw = gate_inputs((count,), dtype, scores_dtype, seed=seed)
    source = torch.Generator().manual_seed(seed + 1)
    exp_avg = torch.randn(count, generator=source).to(scores.dtype) * 0.1
    exp_avg_sq = torch.rand(count, generator=source).to(scores.dtype)
    changed = [torch.full_like(weight, math.nan), scores, exp_avg, exp_avg_sq, torch.tensor(2.5, dtype=torch.float64)]
    draws = (draw, philox.make_draw(11, 8))
    return changed, (weight, grad, temperature, one(0.7), one(3.0), one(1e-2), *draws, *ADAM)


def adam_results(kernel, changed, rest, kind, measure):
    """Changed copies: gated weight, scores, moments and movement."""
    changed = [tensor.clone() for tensor in changed]
    kernel(*changed, *rest, int(kind), measure)
    return changed


def mi_inputs(n, heads, classes, dtype=torch.float32):
    """Logits (n, heads, classes) and labels (n, heads)."""
    source = torch.Generator().manual_seed(n + classes)
    logits = 3 * torch.randn(n, heads, classes, generator=source, dtype=torch.float64)
    return logits.to(dtype), torch.randint(0, classes, (n, heads), generator=source)


def objective_inputs(n, targets, heads, classes, dtype=torch.float32, tables=False, spread=3.0):
    """Logits and labels of a minibatch and, if asked for, tables of importance and of aligned labels."""
    source = torch.Generator().manual_seed(n + targets + classes)
    head_logits, bias_labels = mi_inputs(n, heads, classes, dtype)
    logits = (spread * torch.randn(n, targets, generator=source, dtype=torch.float64)).to(dtype)
    inputs = [logits, torch.randint(targets, (n,), generator=source), head_logits, bias_labels]
    if not tables:
        return [*inputs, None, None]
    importance = 3 * torch.rand(heads, targets, classes, generator=source)
    return [*inputs, importance, torch.randint(classes, (targets,), generator=source)]


def as_doubles(inputs):
    return [value.double() if value is not None and value.is_floating_point() else value for value in inputs]


def head_inputs(n, width, classes, heads=1, epochs=3, dtype=torch.float32):
    """What the fit of linear heads changes, and features (n, width), labels (n, heads) and the orders of epochs."""
    source = torch.Generator().manual_seed(n * width + classes)
    features = torch.randn(n, width, generator=source, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, classes, (n, heads), generator=source)
    order = torch.stack([torch.randperm(n, generator=source) for _ in range(epochs)])
    weight = torch.randn(heads, classes, width, generator=source).to(dtype) * 0.1
    bias = torch.randn(heads, classes, generator=source).to(dtype) * 0.1
    plateau = torch.tensor([math.inf, 0, 0], dtype=torch.float64)
    momenta = (torch.randn_like(weight) * 0.01, torch.randn_like(bias) * 0.01)
    return [weight, bias, *momenta, plateau], [features, labels, order]


def fit(kernel, changed, fixed, batch_size=100, rule=RULE):
    """Losses of the epochs, and changed copies."""
    changed = [tensor.clone() for tensor in changed]
    losses = kernel(*changed, *fixed, batch_size, *SGD, *rule)
    return losses, *changed
