"""The operators (namespace ``ffw_fast``): schema, fake and plain-PyTorch default kernel of each, side by side.

Compiled code only adds implementations of the same operators for a device; without it the default kernels do the
work. The default kernels are also the reference that every other kernel is tested against. None of these operators
knows autograd: see ``ffw_fast.autograd``.

Arguments that several operators share:

- ``weight``: frozen weight (float64, float32, bfloat16 or float16), any shape.
- ``scores``: gate scores of the weight's shape, in the weight's dtype, or float32 beside a 16-bit weight. All
  arithmetic is done in the scores' precision, at least float32.
- ``temperature``: float32, one element. A tensor, so that a changed temperature neither synchronises nor recompiles.
- ``draw``: int64 ``[seed, number, first element]``, see ``ffw_fast.philox``; read by random gates only.
- ``kind``: number of the gate kind, ``ffw_fast.gates.GateKind``.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ffw_fast import philox
from ffw_fast.gates import GateKind, gate, gate_movement, gate_slope
from ffw_fast.image_format import image_format
from ffw_fast.plateau import Plateau

_library = torch.library.Library("ffw_fast", "DEF")
_HALF = (torch.bfloat16, torch.float16)
DEFAULTS: dict[str, Callable[..., Any]] = {}  # name of an operator -> its plain-PyTorch kernel


def _define(schema: str, default: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.split("(", 1)[0]

    @functools.wraps(default)
    def checked(*arguments: Any) -> Any:
        check_apart(name, arguments)
        return default(*arguments)

    DEFAULTS[name] = checked if "!" in schema else default
    _library.impl(name, DEFAULTS[name], "CompositeExplicitAutograd")
    torch.library.register_fake(f"ffw_fast::{name}", fake, lib=_library)


def _working(tensor: Tensor) -> Tensor:
    """The tensor in the precision that gates are computed in."""
    return tensor.float() if tensor.dtype in _HALF else tensor


def _uniform(kind: GateKind, scores: Tensor, draw: Tensor) -> Tensor | None:
    if not kind.is_random:
        return None
    return philox.uniform(scores.numel(), draw).view(scores.shape).to(_working(scores).dtype)


def _check_pair(weight: Tensor, scores: Tensor, temperature: Tensor, draw: Tensor) -> None:
    torch._check_value(
        weight.shape == scores.shape,
        lambda: f"scores must have the weight's shape {tuple(weight.shape)}, got {tuple(scores.shape)}",
    )
    wide_scores = weight.dtype in _HALF and scores.dtype == torch.float32
    torch._check_type(
        weight.is_floating_point() and (weight.dtype == scores.dtype or wide_scores),
        lambda: f"scores must have the weight's dtype {weight.dtype} (or float32 beside 16 bits), got {scores.dtype}",
    )
    torch._check_value(
        temperature.numel() == 1 and temperature.dtype == torch.float32,
        lambda: f"temperature must be one float32, got {temperature.dtype} of shape {tuple(temperature.shape)}",
    )
    torch._check_value(
        draw.shape == (3,) and draw.dtype == torch.int64,
        lambda: f"draw must be 3 int64 numbers, got {draw.dtype} of shape {tuple(draw.shape)}",
    )


def check_apart(name: str, arguments: Sequence[Any]) -> None:
    """That nothing which the operator changes in place shares memory with another of its arguments.

    Tensors with gaps are let through: they may well lie in each other's.

    Raises:
        ValueError: the names of two that do.
    """
    names, changed = _arguments(name)
    if not changed:
        return
    tensors = [(one, value) for one, value in zip(names, arguments, strict=False) if isinstance(value, Tensor)]
    spans = {one: _dense_span(tensor) for one, tensor in tensors}
    for one, other in itertools.combinations(sorted(spans, key=lambda one: one not in changed), 2):
        (start, end), (other_start, other_end) = spans[one], spans[other]
        if one in changed and start < other_end and other_start < end:
            raise ValueError(f"{one} and {other} share memory; what is changed in place needs memory of its own")


@functools.cache
def _arguments(name: str) -> tuple[list[str], set[str]]:
    """The names of the operator's arguments, and of those that it changes in place, as its schema tells them."""
    arguments = getattr(torch.ops.ffw_fast, name).default._schema.arguments
    return [known.name for known in arguments], {known.name for known in arguments if known.is_write}


def _dense_span(tensor: Tensor) -> tuple[int, int]:
    """Start and end of a tensor's memory; nothing for one with gaps."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() == 0 or extent != tensor.numel():
        return 0, 0
    return tensor.data_ptr(), tensor.data_ptr() + extent * tensor.element_size()


# gate_weight: v = w * g, shape, dtype and strides of w ---------------------------------------------------------------


def gate_weight_default(weight: Tensor, scores: Tensor, temperature: Tensor, draw: Tensor, kind: int) -> Tensor:
    _check_pair(weight, scores, temperature, draw)
    kind, working = GateKind(kind), _working(scores)
    gates = gate(kind, working, temperature, _uniform(kind, scores, draw))
    return torch.empty_like(weight).copy_(weight.to(working.dtype) * gates)


def gate_weight_fake(weight: Tensor, scores: Tensor, temperature: Tensor, draw: Tensor, kind: int) -> Tensor:
    _check_pair(weight, scores, temperature, draw)
    return torch.empty_like(weight)


_define(
    "gate_weight(Tensor weight, Tensor scores, Tensor temperature, Tensor draw, int kind) -> Tensor",
    gate_weight_default,
    gate_weight_fake,
)
gate_weight = torch.ops.ffw_fast.gate_weight.default


# gate_weight_backward: dJ/dm = dJ/dv * w * dg/dm, shape, dtype and strides of m ---------------------------------------


def gate_weight_backward_default(
    grad: Tensor, weight: Tensor, scores: Tensor, temperature: Tensor, draw: Tensor, kind: int
) -> Tensor:
    _check_pair(weight, scores, temperature, draw)
    kind, working = GateKind(kind), _working(scores)
    slope = gate_slope(kind, working, temperature, _uniform(kind, scores, draw))
    return torch.empty_like(scores).copy_(grad.to(working.dtype) * weight.to(working.dtype) * slope)


def gate_weight_backward_fake(
    grad: Tensor, weight: Tensor, scores: Tensor, temperature: Tensor, draw: Tensor, kind: int
) -> Tensor:
    _check_pair(weight, scores, temperature, draw)
    return torch.empty_like(scores)


_define(
    "gate_weight_backward(Tensor grad, Tensor weight, Tensor scores, Tensor temperature, Tensor draw, int kind)"
    " -> Tensor",
    gate_weight_backward_default,
    gate_weight_backward_fake,
)
gate_weight_backward = torch.ops.ffw_fast.gate_weight_backward.default


# gated_adam_step_: one training step of the scores, and the gated weight that belongs to the new ones ----------------


def gated_adam_step_default_(
    gated: Tensor,
    scores: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    movement: Tensor,
    weight: Tensor,
    grad: Tensor,
    temperature: Tensor,
    next_temperature: Tensor,
    step: Tensor,
    lr: Tensor,
    draw: Tensor,
    next_draw: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    kind: int,
    measure: bool,
) -> None:
    _check_pair(weight, scores, temperature, draw)
    kept = scores, exp_avg, exp_avg_sq
    precision = torch.promote_types(scores.dtype, torch.float32)  # that of the arithmetic; eps is 0 in 16 bits
    scores, exp_avg, exp_avg_sq = (tensor.to(precision) for tensor in kept)
    gradient = gate_weight_backward_default(grad.to(precision), weight.to(precision), scores, temperature, draw, kind)
    gradient = gradient.add(scores, alpha=weight_decay)  # L2, not decoupled
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    count = step.double()
    size = (lr.double() / (1 - beta1**count)).to(scores.dtype)
    scale = (1 - beta2**count).sqrt().to(scores.dtype)
    scores.sub_(size * exp_avg / (exp_avg_sq.sqrt() / scale + eps))
    for tensor, value in zip(kept, (scores, exp_avg, exp_avg_sq), strict=True):
        tensor.copy_(value)  # nothing where they are the same
    scores = kept[0]
    gated.copy_(gate_weight_default(weight, scores, next_temperature, next_draw, kind))
    if measure:
        uniforms = _uniform(GateKind(kind), scores, next_draw)
        movement.add_(gate_movement(GateKind(kind), scores, next_temperature, uniforms).sum(dtype=torch.float64))


def gated_adam_step_fake_(*_arguments) -> None:
    return None


_define(
    "gated_adam_step_(Tensor(a!) gated, Tensor(b!) scores, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq,"
    " Tensor(e!) movement, Tensor weight, Tensor grad, Tensor temperature, Tensor next_temperature, Tensor step,"
    " Tensor lr, Tensor draw, Tensor next_draw, float beta1, float beta2, float eps, float weight_decay, int kind,"
    " bool measure) -> ()",
    gated_adam_step_default_,
    gated_adam_step_fake_,
)
gated_adam_step_ = torch.ops.ffw_fast.gated_adam_step_.default


# masked_linear: y = x (w * g)^T + bias, with ReLU if asked for; x (..., K), w and m (N, K), y (..., N) ---------------
# A kernel may fuse the gate into its operand load; the default gates the weight first. ``output`` of the gradients is
# what the layer returned where it applied ReLU, else None.


def masked_linear_default(
    x: Tensor, weight: Tensor, scores: Tensor, temperature: Tensor, draw: Tensor, kind: int, bias: Tensor | None,
    relu: bool,
) -> Tensor:  # fmt: skip
    y = nn.functional.linear(x, gate_weight(weight, scores, temperature, draw, kind), bias)
    return y.relu_() if relu else y


def masked_linear_fake(x, weight, scores, temperature, draw, kind, bias, relu) -> Tensor:
    _check_pair(weight, scores, temperature, draw)
    _check_inner(x, weight)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _check_inner(x: Tensor, weight: Tensor) -> None:
    torch._check_value(
        weight.dim() == 2 and x.dim() > 0 and x.shape[-1] == weight.shape[1],
        lambda: f"expected x (..., {weight.shape[-1]}) for a weight {tuple(weight.shape)}, got {tuple(x.shape)}",
    )


_define(
    "masked_linear(Tensor x, Tensor weight, Tensor scores, Tensor temperature, Tensor draw, int kind, Tensor? bias,"
    " bool relu) -> Tensor",
    masked_linear_default,
    masked_linear_fake,
)
masked_linear = torch.ops.ffw_fast.masked_linear.default


def _before_relu(grad: Tensor, output: Tensor | None) -> Tensor:
    """The gradient before the layer's ReLU: that behind it where the output is positive."""
    return grad if output is None else torch.where(output > 0, grad, 0)


def masked_linear_input_grad_default(
    grad: Tensor, weight: Tensor, scores: Tensor, temperature: Tensor, draw: Tensor, kind: int, output: Tensor | None
) -> Tensor:
    return _before_relu(grad, output) @ gate_weight(weight, scores, temperature, draw, kind)


def masked_linear_input_grad_fake(grad, weight, scores, temperature, draw, kind, output) -> Tensor:
    _check_pair(weight, scores, temperature, draw)
    return grad.new_empty(*grad.shape[:-1], weight.shape[1])


_define(
    "masked_linear_input_grad(Tensor grad, Tensor weight, Tensor scores, Tensor temperature, Tensor draw, int kind,"
    " Tensor? output) -> Tensor",
    masked_linear_input_grad_default,
    masked_linear_input_grad_fake,
)
masked_linear_input_grad = torch.ops.ffw_fast.masked_linear_input_grad.default


def masked_linear_score_grad_default(
    grad: Tensor, x: Tensor, weight: Tensor, scores: Tensor, temperature: Tensor, draw: Tensor, kind: int,
    output: Tensor | None,
) -> Tensor:  # fmt: skip
    rows = _before_relu(grad, output).reshape(-1, weight.shape[0])
    weight_grad = rows.T @ x.reshape(-1, weight.shape[1])
    return gate_weight_backward(weight_grad, weight, scores, temperature, draw, kind).contiguous()


def masked_linear_score_grad_fake(grad, x, weight, scores, temperature, draw, kind, output) -> Tensor:
    _check_pair(weight, scores, temperature, draw)
    _check_inner(x, weight)
    return scores.new_empty(scores.shape)


_define(
    "masked_linear_score_grad(Tensor grad, Tensor x, Tensor weight, Tensor scores, Tensor temperature, Tensor draw,"
    " int kind, Tensor? output) -> Tensor",
    masked_linear_score_grad_default,
    masked_linear_score_grad_fake,
)
masked_linear_score_grad = torch.ops.ffw_fast.masked_linear_score_grad.default


# masked_conv2d: y = conv2d(x, w * g, bias), with ReLU if asked for; x (B, C, H, W), w and m (N, C / groups, kh, kw) --
# The result's channels are last in memory where x's are (the gradients': where grad's, or x's), else it is contiguous.


def masked_conv2d_default(
    x: Tensor, weight: Tensor, scores: Tensor, temperature: Tensor, draw: Tensor, kind: int, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, relu: bool,
) -> Tensor:  # fmt: skip
    v = gate_weight(weight, scores, temperature, draw, kind)
    y = nn.functional.conv2d(x, v, bias, stride, padding, dilation, groups)  # type: ignore[arg-type]
    return (y.relu_() if relu else y).contiguous(memory_format=image_format(x))


def masked_conv2d_fake(
    x, weight, scores, temperature, draw, kind, bias, stride, padding, dilation, groups, relu
) -> Tensor:
    _check_pair(weight, scores, temperature, draw)
    size = [
        (extent + 2 * pad - gap * (taps - 1) - 1) // step + 1
        for extent, pad, gap, taps, step in zip(x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True)
    ]
    return _image(x, [x.shape[0], weight.shape[0], *size], x)


def _image(tensor: Tensor, shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised batch of images of the tensor's dtype, whose channels are last where ``like``'s are."""
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device, memory_format=image_format(like))


_define(
    "masked_conv2d(Tensor x, Tensor weight, Tensor scores, Tensor temperature, Tensor draw, int kind, Tensor? bias,"
    " int[2] stride, int[2] padding, int[2] dilation, int groups, bool relu) -> Tensor",
    masked_conv2d_default,
    masked_conv2d_fake,
)
masked_conv2d = torch.ops.ffw_fast.masked_conv2d.default


def masked_conv2d_input_grad_default(
    grad: Tensor, input_shape: Sequence[int], weight: Tensor, scores: Tensor, temperature: Tensor, draw: Tensor,
    kind: int, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    output: Tensor | None,
) -> Tensor:  # fmt: skip
    v = gate_weight(weight, scores, temperature, draw, kind)
    x = grad.new_empty(()).expand(input_shape)  # only its shape is read
    geometry = (stride, padding, dilation, groups)
    x_grad, _, _ = _convolution_backward(_before_relu(grad, output), x, v, *geometry, (True, False, False))
    return x_grad.contiguous(memory_format=image_format(grad))


def _convolution_backward(grad, x, weight, stride, padding, dilation, groups, mask) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
    )


def masked_conv2d_input_grad_fake(
    grad, input_shape, weight, scores, temperature, draw, kind, stride, padding, dilation, groups, output
) -> Tensor:
    _check_pair(weight, scores, temperature, draw)
    return _image(grad, input_shape, grad)


_define(
    "masked_conv2d_input_grad(Tensor grad, SymInt[] input_shape, Tensor weight, Tensor scores, Tensor temperature,"
    " Tensor draw, int kind, int[2] stride, int[2] padding, int[2] dilation, int groups, Tensor? output) -> Tensor",
    masked_conv2d_input_grad_default,
    masked_conv2d_input_grad_fake,
)
masked_conv2d_input_grad = torch.ops.ffw_fast.masked_conv2d_input_grad.default


def masked_conv2d_score_grad_default(
    grad: Tensor, x: Tensor, weight: Tensor, scores: Tensor, temperature: Tensor, draw: Tensor, kind: int,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, output: Tensor | None,
) -> Tensor:  # fmt: skip
    geometry = (stride, padding, dilation, groups)
    _, weight_grad, _ = _convolution_backward(_before_relu(grad, output), x, weight, *geometry, (False, True, False))
    result = gate_weight_backward(weight_grad, weight, scores, temperature, draw, kind)
    return result.contiguous(memory_format=image_format(x))


def masked_conv2d_score_grad_fake(
    grad, x, weight, scores, temperature, draw, kind, stride, padding, dilation, groups, output
) -> Tensor:
    _check_pair(weight, scores, temperature, draw)
    return _image(scores, scores.shape, x)


_define(
    "masked_conv2d_score_grad(Tensor grad, Tensor x, Tensor weight, Tensor scores, Tensor temperature, Tensor draw,"
    " int kind, int[2] stride, int[2] padding, int[2] dilation, int groups, Tensor? output) -> Tensor",
    masked_conv2d_score_grad_default,
    masked_conv2d_score_grad_fake,
)
masked_conv2d_score_grad = torch.ops.ffw_fast.masked_conv2d_score_grad.default


# mutual_information: of the bias labels and the private heads' predictions over one batch, each head for itself ------

JOINT_FLOOR = 1e-15


def joint_distribution(logits: Tensor, labels: Tensor, counted: Tensor | None = None) -> Tensor:
    """Joint (heads, K, K) of labels (rows) and predictions: of logits (n, heads, K) and labels (n, heads).

    ``counted``, boolean (n, heads), says which samples count for which head. Default: all.
    """
    probabilities = torch.softmax(_working(logits), dim=-1)
    one_hot = torch.nn.functional.one_hot(labels, logits.shape[-1]).to(probabilities.dtype)
    if counted is not None:
        one_hot = one_hot * counted.unsqueeze(-1)
    return torch.einsum("nhb,nhp->hbp", one_hot, probabilities).clamp_min(JOINT_FLOOR) / _samples(logits, counted)


def _samples(logits: Tensor, counted: Tensor | None) -> Tensor | int:
    """How many samples each head's joint is of, (heads, 1, 1), at least 1; or the same number for all."""
    return len(logits) if counted is None else counted.sum(0).clamp_min(1).view(-1, 1, 1)


def joint_information(joint: Tensor) -> Tensor:
    """MI in units of ``log K`` of each joint (heads, K, K): ``sum Q log(Q / max(Q_b Q_p, 1e-15)) / log K``."""
    independent = joint.sum(2, keepdim=True) * joint.sum(1, keepdim=True)
    terms = joint * torch.log(joint / independent.clamp_min(JOINT_FLOOR))
    return terms.sum((1, 2)) / math.log(joint.shape[-1])


def _check_logits(logits: Tensor, labels: Tensor) -> None:
    torch._check_value(
        logits.dim() == 3 and labels.shape == logits.shape[:2],
        lambda: (
            f"expected logits (n, heads, K) and labels (n, heads), got {tuple(logits.shape)} and {tuple(labels.shape)}"
        ),
    )
    torch._check_type(
        logits.is_floating_point() and labels.dtype == torch.int64,
        lambda: f"expected floating-point logits and int64 labels, got {logits.dtype}, {labels.dtype}",
    )


def mutual_information_default(logits: Tensor, labels: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    _check_logits(logits, labels)
    joint = joint_distribution(logits, labels, counted)
    return joint_information(joint), joint


def mutual_information_fake(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    _check_logits(logits, labels)
    _, heads, classes = logits.shape
    dtype = torch.float32 if logits.dtype in _HALF else logits.dtype
    return logits.new_empty(heads, dtype=dtype), logits.new_empty(heads, classes, classes, dtype=dtype)


def mutual_information_backward_default(
    grad: Tensor, logits: Tensor, labels: Tensor, joint: Tensor, counted: Tensor | None = None
) -> Tensor:
    _check_logits(logits, labels)
    samples = _samples(logits, counted)
    slope = _joint_slope(joint, samples) * (grad.view(-1, 1, 1) / samples)
    probabilities = torch.softmax(_working(logits), dim=-1)
    picked = torch.take_along_dim(slope, labels.T.unsqueeze(-1), dim=1).transpose(0, 1)  # [n, heads, K]
    if counted is not None:
        picked = picked * counted.unsqueeze(-1)
    inner = (picked * probabilities).sum(-1, keepdim=True)
    return torch.empty_like(logits).copy_(probabilities * (picked - inner))


def _joint_slope(joint: Tensor, samples: Tensor | int) -> Tensor:
    """Derivative of the MI by each entry of the joint, zero where either clamp holds."""
    rows, columns = joint.sum(2, keepdim=True), joint.sum(1, keepdim=True)
    independent = rows * columns
    free = independent >= JOINT_FLOOR
    slope = torch.log(joint / independent.clamp_min(JOINT_FLOOR)) + 1
    slope = slope - (joint * free / rows).sum(2, keepdim=True) - (joint * free / columns).sum(1, keepdim=True)
    return torch.where(joint * samples > JOINT_FLOOR, slope / math.log(joint.shape[-1]), 0)


def mutual_information_backward_fake(grad: Tensor, logits: Tensor, labels: Tensor, joint: Tensor) -> Tensor:
    _check_logits(logits, labels)
    return torch.empty_like(logits)


_define(
    "mutual_information(Tensor logits, Tensor labels) -> (Tensor, Tensor)",
    mutual_information_default,
    mutual_information_fake,
)
_define(
    "mutual_information_backward(Tensor grad, Tensor logits, Tensor labels, Tensor joint) -> Tensor",
    mutual_information_backward_default,
    mutual_information_backward_fake,
)
mutual_information = torch.ops.ffw_fast.mutual_information.default
mutual_information_backward = torch.ops.ffw_fast.mutual_information_backward.default


# objective: J = alpha mean(r CE) + gamma MI of one minibatch, and its gradient by both kinds of logits ----------------
# Logits (n, C), labels (n,), head logits (n, heads, K), bias labels (n, heads). ``importance`` (heads, C, K) gives a
# sample's weight r, a product over its biases; None: 1. ``aligned``, int64 (C,), is the bias label that goes with each
# target: only samples with another one count for a head's MI, which is 0 where there are none; None: all count.
# MI is ``share`` times the sum over the heads. Losses are (J, mean(r CE), MI).


def objective_default(
    logits: Tensor, labels: Tensor, head_logits: Tensor, bias_labels: Tensor, importance: Tensor | None,
    aligned: Tensor | None, alpha: float, gamma: float, share: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check_logits(head_logits, bias_labels)
    log_probabilities = torch.log_softmax(_working(logits), dim=1)
    target = labels.unsqueeze(1)
    weights = log_probabilities.new_ones(len(logits), 1)
    if importance is not None:
        heads = torch.arange(bias_labels.shape[1], device=labels.device)
        weights = importance[heads, target, bias_labels].to(weights.dtype).prod(1, keepdim=True)
    cross_entropy = -(weights * log_probabilities.gather(1, target)).mean()
    error = log_probabilities.exp()
    error = error.scatter_add(1, target, error.new_full((), -1.0).expand_as(target))
    grad = cross_entropy.new_full(bias_labels.shape[1:], gamma * share)
    if aligned is None:
        information, joint = mutual_information(head_logits, bias_labels)
        by_head_logits = mutual_information_backward(grad, head_logits, bias_labels, joint)
    else:
        counted = bias_labels != aligned[labels].unsqueeze(1)
        information, joint = mutual_information_default(head_logits, bias_labels, counted)
        by_head_logits = mutual_information_backward_default(grad, head_logits, bias_labels, joint, counted)
    shared = share * information.sum()
    losses = torch.stack([alpha * cross_entropy + gamma * shared, cross_entropy, shared])
    by_logits = (error * (weights * (alpha / len(logits)))).to(logits.dtype)
    return losses, by_logits.contiguous(), by_head_logits.contiguous()


def objective_fake(
    logits, labels, head_logits, bias_labels, importance, aligned, alpha, gamma, share
) -> tuple[Tensor, Tensor, Tensor]:
    _check_logits(head_logits, bias_labels)
    losses = logits.new_empty(3, dtype=torch.float32 if logits.dtype in _HALF else logits.dtype)
    return losses, logits.new_empty(logits.shape), head_logits.new_empty(head_logits.shape)


_define(
    "objective(Tensor logits, Tensor labels, Tensor head_logits, Tensor bias_labels, Tensor? importance,"
    " Tensor? aligned, float alpha, float gamma, float share) -> (Tensor, Tensor, Tensor)",
    objective_default,
    objective_fake,
)
objective = torch.ops.ffw_fast.objective.default


# fit_linear_head_: epochs of softmax regression on cached features, all heads at once, until the plateau -------------


def fit_linear_head_default_(
    weight: Tensor,
    bias: Tensor,
    weight_momentum: Tensor,
    bias_momentum: Tensor,
    plateau: Tensor,
    features: Tensor,
    labels: Tensor,
    order: Tensor,
    batch_size: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    threshold: float,
    patience: int,
) -> Tensor:
    rule = Plateau(threshold, patience, best=plateau[0].item(), failures=int(plateau[1].item()))
    losses = torch.full((len(order),), math.nan, dtype=torch.float64, device=features.device)
    for epoch, permutation in enumerate(order):
        total = torch.zeros((), dtype=torch.float64, device=features.device)
        for rows in permutation.split(batch_size):
            x, y = features[rows], labels[rows]  # [B, D], [B, heads]
            log_probabilities = torch.log_softmax(torch.einsum("nd,hkd->nhk", x, weight) + bias, dim=-1)
            total -= log_probabilities.gather(2, y.unsqueeze(-1)).sum(dtype=torch.float64)
            error = log_probabilities.exp()
            error.scatter_add_(2, y.unsqueeze(-1), error.new_full((), -1.0).expand(*y.shape, 1))
            error /= len(rows)
            for value, buffer, gradient in (
                (weight, weight_momentum, torch.einsum("nhk,nd->hkd", error, x)),
                (bias, bias_momentum, error.sum(0)),
            ):
                buffer.mul_(momentum).add_(gradient).add_(value, alpha=weight_decay)
                value.sub_(buffer, alpha=lr)
        losses[epoch] = total / labels.numel()
        if rule.reached(losses[epoch].item()):
            plateau[2] = 1
            break
    plateau[0], plateau[1] = rule.best, rule.failures
    return losses


def fit_linear_head_fake_(weight, bias, weight_momentum, bias_momentum, plateau, features, labels, order, *_settings):
    return features.new_empty(order.shape[0], dtype=torch.float64)


_define(
    "fit_linear_head_(Tensor(a!) weight, Tensor(b!) bias, Tensor(c!) weight_momentum, Tensor(d!) bias_momentum,"
    " Tensor(e!) plateau, Tensor features, Tensor labels, Tensor order, int batch_size, float lr, float momentum,"
    " float weight_decay, float threshold, int patience) -> Tensor",
    fit_linear_head_default_,
    fit_linear_head_fake_,
)
fit_linear_head_ = torch.ops.ffw_fast.fit_linear_head_.default
