"""Every operator, default and compiled kernel, against double precision; and the compiled kernels against the default.

Error bounds are scaled to PyTorch's own: a kernel may be twice as far from the double-precision result as the default
kernel in the same precision, and a few units in the last place more.
"""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ffw_fast import ops, philox
from ffw_fast.gates import GateKind, gate_movement
from tests.operator_inputs import (
    ADAM,
    DTYPES,
    HALF,
    RULE,
    SGD,
    adam_inputs,
    adam_results,
    as_doubles,
    fit,
    gate_inputs,
    head_inputs,
    mi_inputs,
    objective_inputs,
    one,
)

SIZES = (0, 1, 3, 7, 17, 64, 1000, 1025, 5003)
TEMPERATURES = (1e-30, 1e-8, 0.03, 1.0, 50.0, 1e30)

OPERATORS = (
    "gate_weight",
    "gate_weight_backward",
    "gated_adam_step_",
    "mutual_information",
    "mutual_information_backward",
    "objective",
    "fit_linear_head_",
)

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(params=["torch", "cpp"])
def kernels(request):
    """The operators' kernels of one backend, by name."""
    if request.param == "torch":
        return {name: getattr(ops, default_name(name)) for name in OPERATORS}
    request.getfixturevalue("compiled")
    return {name: getattr(ops, name) for name in OPERATORS}


def default_name(operator: str) -> str:
    """Name of an operator's default kernel: the underscore that marks changes in place comes last."""
    return f"{operator[:-1]}_default_" if operator.endswith("_") else f"{operator}_default"


def largest_error(result, exact):
    """Largest error relative to the exact value; what is below 1e-30 counts as that much."""
    if exact.numel() == 0:
        return 0.0
    error = (result.double() - exact).abs() / exact.abs().clamp_min(1e-30)
    assert not error.isnan().any()
    return error.max().item()


def assert_as_good_as_default(result, default, exact, slack=4.0):
    bound = 2 * largest_error(default, exact) + slack * torch.finfo(result.dtype).eps
    assert largest_error(result, exact) <= bound


# gate_weight and gate_weight_backward --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GateKind)
@pytest.mark.parametrize(("dtype", "scores_dtype"), DTYPES)
def test_gate_weight(kernels, kind, dtype, scores_dtype):
    for size, temperature in itertools.product(SIZES, (0.03, 1.0, 50.0)):
        _, *inputs = gate_inputs((size,), dtype, scores_dtype, temperature)
        result = kernels["gate_weight"](*inputs, kind)
        default = ops.gate_weight_default(*inputs, kind)
        assert result.dtype == dtype
        assert result.shape == (size,)
        if kind is GateKind.FFW:
            weight, scores, *rest = inputs
            assert torch.equal(result[scores >= 0], weight[scores >= 0])
            exact = ops.gate_weight_default(weight.double(), scores.double(), *rest, kind)
            assert_as_good_as_default(result, default, exact)
        else:
            assert torch.equal(result, default)


@pytest.mark.parametrize("kind", GateKind)
@pytest.mark.parametrize(("dtype", "scores_dtype"), DTYPES)
def test_gate_weight_backward(kernels, kind, dtype, scores_dtype):
    for size, temperature in itertools.product(SIZES, (0.03, 1.0, 50.0)):
        inputs = gate_inputs((size,), dtype, scores_dtype, temperature)
        result = kernels["gate_weight_backward"](*inputs, kind)
        default = ops.gate_weight_backward_default(*inputs, kind)
        grad, weight, scores, *rest = inputs
        exact = ops.gate_weight_backward_default(grad.double(), weight.double(), scores.double(), *rest, kind)
        assert result.dtype == scores_dtype
        assert result.shape == (size,)
        if dtype == torch.float16:  # tiny slopes are no normal numbers there
            torch.testing.assert_close(result, default, rtol=2e-3, atol=2e-7)
        else:
            # In double precision the default kernel is the exact result; the exponent's rounding counts 100 times.
            assert_as_good_as_default(result, default, exact, slack=200.0 if dtype == torch.float64 else 16.0)


@pytest.mark.parametrize("kind", GateKind)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_extreme_scores_and_temperatures(compiled, kind, temperature):
    numbers = [0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 1e-8, -1e-8, 0.5, -0.5, 87.0, -87.0, -88.0, -104.0, 3e38, -3e38]
    scores = torch.tensor([*numbers, torch.inf, -torch.inf, torch.nan] * 5)
    weight, grad = torch.linspace(1, 2, len(scores)), torch.linspace(-1, 3, len(scores))
    inputs = (weight, scores, one(temperature), philox.make_draw(1, 2))
    result, default = ops.gate_weight(*inputs, kind), ops.gate_weight_default(*inputs, kind)
    torch.testing.assert_close(result, default, rtol=1e-6, atol=1e-37, equal_nan=True)
    if kind is not GateKind.FFW:
        assert torch.equal(result, default)
    slope = ops.gate_weight_backward(grad, *inputs, kind)
    default = ops.gate_weight_backward_default(grad, *inputs, kind)
    scale = max(1.0, 1 / temperature)
    torch.testing.assert_close(slope, default, rtol=1e-4, atol=1e-36 * scale, equal_nan=True)


@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    number=st.integers(-(2**63), 2**63 - 1),
    first=st.integers(0, 2**40).map(lambda block: 4 * block),
    size=st.integers(0, 3000),
    log_temperature=st.floats(-30, 30),
    spread=st.floats(-8, 2),
)
@pytest.mark.parametrize("kind", [GateKind.BERNOULLI, GateKind.CONCRETE])
def test_sampled_masks_are_the_same_bits(compiled, kind, seed, number, first, size, log_temperature, spread):
    scores = torch.randn(size, generator=torch.Generator().manual_seed(size)) * 10**spread
    inputs = (torch.ones(size), scores, one(10**log_temperature), philox.make_draw(seed, number, first))
    assert torch.equal(ops.gate_weight(*inputs, kind), ops.gate_weight_default(*inputs, kind))


@pytest.mark.parametrize("kind", [GateKind.BERNOULLI, GateKind.CONCRETE])
def test_sampled_masks_keep_the_right_share(kernels, kind):
    scores = torch.full((200_000,), 0.4)
    mask = kernels["gate_weight"](torch.ones(200_000), scores, one(1.0), philox.make_draw(1), kind)
    assert abs(mask.mean().item() - torch.sigmoid(scores[0]).item()) < 0.004


def strided_variants(tensor):
    """The same 4-dimensional values in other layouts of memory."""
    padded = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), math.nan)
    padded[..., : tensor.shape[-1]] = tensor
    return {
        "contiguous": tensor,
        "channels_last": tensor.to(memory_format=torch.channels_last),
        "transposed": tensor.transpose(0, 1).contiguous().transpose(0, 1),
        "with gaps": padded[..., : tensor.shape[-1]],
        "expanded": tensor[:1].expand(tensor.shape),
    }


@pytest.mark.parametrize("kind", GateKind)
def test_strides(kernels, kind):
    grad, weight, scores, *rest = gate_inputs((6, 5, 4, 3))
    layouts = [strided_variants(tensor) for tensor in (grad, weight, scores)]
    for names in itertools.product(layouts[0], repeat=3):
        g, w, m = (variants[name] for variants, name in zip(layouts, names, strict=True))
        result = kernels["gate_weight"](w, m, *rest, kind)
        default = ops.gate_weight_default(w.contiguous(), m.contiguous(), *rest, kind)
        torch.testing.assert_close(result, default, rtol=1e-6, atol=1e-9)
        assert result.stride() == torch.empty_like(w).stride()
        result = kernels["gate_weight_backward"](g, w, m, *rest, kind)
        default = ops.gate_weight_backward_default(g.contiguous(), w.contiguous(), m.contiguous(), *rest, kind)
        torch.testing.assert_close(result, default, rtol=2e-5, atol=1e-9)
        assert result.stride() == torch.empty_like(m).stride()


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), (), (1,), (1, 1, 1)])
def test_empty_and_scalar(kernels, shape):
    inputs = gate_inputs(shape)
    assert kernels["gate_weight"](*inputs[1:], 0).shape == shape
    assert kernels["gate_weight_backward"](*inputs, 0).shape == shape


def test_gradient_of_another_dtype(kernels):
    grad, *rest = gate_inputs((1000,))
    expected = kernels["gate_weight_backward"](grad.bfloat16().float(), *rest, 0)
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(kernels["gate_weight_backward"](grad.bfloat16().to(dtype), *rest, 0), expected)


def test_bfloat16_is_rounded_to_even_and_nan_stays_nan(kernels):
    """All floats halfway between two neighbours in bfloat16, by a gate whose slope is exactly 1."""
    halfway = (torch.arange(2**16) << 16 | 0x8000).to(torch.int32).view(torch.float32)
    weight = torch.ones(2**16, dtype=torch.bfloat16)
    scores, temperature = torch.zeros_like(weight), one(0.5)
    found = kernels["gate_weight_backward"](halfway, weight, scores, temperature, philox.make_draw(11, 7), 0)
    torch.testing.assert_close(found, halfway.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


def test_bad_arguments_are_refused(kernels):
    grad, weight, scores, temperature, draw = gate_inputs((4, 3))
    refused_type = (TypeError, RuntimeError)
    pair = (weight, scores)
    bad = [
        (ValueError, r"the weight's shape \(4, 3\), got \(12,\)", (weight, scores.view(-1), temperature, draw, 0)),
        (refused_type, "the weight's dtype torch.float32", (weight, scores.double(), temperature, draw, 0)),
        (refused_type, "the weight's dtype torch.int64", (weight.long(), scores.long(), temperature, draw, 0)),
        (ValueError, "temperature must be one float32, got torch.float64", (*pair, temperature.double(), draw, 0)),
        (ValueError, r"temperature must be one float32, got .* \(2,\)", (*pair, temperature.expand(2), draw, 0)),
        (ValueError, r"draw must be 3 int64 numbers, got .* \(2,\)", (*pair, temperature, draw[:2], 0)),
        (ValueError, "draw must be 3 int64 numbers, got torch.int32", (*pair, temperature, draw.int(), 0)),
        (ValueError, "4 is not a valid GateKind", (*pair, temperature, draw, 4)),
    ]
    for error, message, arguments in bad:
        with pytest.raises(error, match=message):
            kernels["gate_weight"](*arguments)
        with pytest.raises(error, match=message):
            kernels["gate_weight_backward"](grad, *arguments)


def test_gradient_of_another_shape_is_refused(compiled):
    _, *rest = gate_inputs((4, 3))
    with pytest.raises(ValueError, match=r"grad must have the weight's shape \(4, 3\), got \(12,\)"):
        ops.gate_weight_backward(torch.zeros(12), *rest, 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", GateKind)
def test_more_than_two_gigabytes(compiled, kind):
    count, tail = 2**30 + 4099, 5000
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 10 * 2**30:
        pytest.skip("needs 10 GB of free memory")
    torch.use_deterministic_algorithms(False)  # poisoning would cost another pass
    weight = torch.full((count,), 3.0, dtype=torch.bfloat16)
    scores = torch.zeros_like(weight)
    start = count - tail - (count - tail) % 4
    scores[start:] = torch.randn(count - start).bfloat16()
    result = ops.gate_weight(weight, scores, one(0.5), philox.make_draw(1, 2), kind)
    rest = (one(0.5), philox.make_draw(1, 2, first_element=start), kind)
    torch.testing.assert_close(result[start:], ops.gate_weight_default(weight[start:], scores[start:], *rest))


# gated_adam_step_ ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", [False, True])
@pytest.mark.parametrize("kind", GateKind)
@pytest.mark.parametrize(("dtype", "scores_dtype"), DTYPES)
def test_gated_adam_step(compiled, kind, dtype, scores_dtype, measure):
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(scores_dtype, 3e-2)
    for size in (0, 1, 7, 1025, 5003):
        changed, rest = adam_inputs(size, dtype, scores_dtype)
        results = adam_results(ops.gated_adam_step_, changed, rest, kind, measure)
        defaults = adam_results(ops.gated_adam_step_default_, changed, rest, kind, measure)
        gated, *others = results
        for result, default in zip(others, defaults[1:], strict=True):
            torch.testing.assert_close(result, default.to(result.dtype), rtol=tolerance, atol=tolerance * 0.1)
        # The gated weight belongs to the new scores, whatever their last bit.
        weight, scores = rest[0], results[1]
        expected = ops.gate_weight_default(weight, scores, rest[3], rest[7], kind)
        half_an_ulp = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, 1e-2)
        torch.testing.assert_close(gated, expected, rtol=half_an_ulp, atol=half_an_ulp if kind is GateKind.FFW else 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gated_adam_step_in_16_bits_computes_in_32_and_gates_the_scores_that_are_kept(kernels, dtype):
    changed, rest = adam_inputs(5003, dtype)
    changed[2:4] = [torch.zeros_like(changed[2]), torch.zeros_like(changed[3])]  # squares of 1e-3 are 0 in float16
    rest = (rest[0], rest[1] * 1e-3, *rest[2:])
    gated, scores, *_ = adam_results(kernels["gated_adam_step_"], changed, rest, GateKind.FFW, False)
    assert scores.isfinite().all()
    assert (scores != changed[1]).any()
    torch.testing.assert_close(gated, ops.gate_weight(rest[0], scores, rest[3], rest[7], 0), rtol=0, atol=0)


def test_gated_adam_step_is_adam(kernels):
    """Twenty steps at a fixed temperature: what torch.optim.Adam makes of the straight-through gradients."""
    _, weight, scores, temperature, draw = gate_inputs((1000,), torch.float64)
    trained = torch.nn.Parameter(scores.clone())
    adam = torch.optim.Adam([trained], lr=float(one(1e-2)), betas=ADAM[:2], eps=ADAM[2], weight_decay=ADAM[3])
    gated, mine = torch.empty_like(weight), scores.clone()
    moments = [torch.zeros_like(scores), torch.zeros_like(scores), torch.zeros((), dtype=torch.float64)]
    for step in range(1, 21):
        grad = torch.randn(1000, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        trained.grad = ops.gate_weight_backward_default(grad, weight, trained.detach(), temperature, draw, 0)
        adam.step()
        times = (temperature, temperature, one(step), one(1e-2))
        kernels["gated_adam_step_"](gated, mine, *moments, weight, grad, *times, draw, draw, *ADAM, 0, False)
        torch.testing.assert_close(mine, trained.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(gated, ops.gate_weight_default(weight, mine, temperature, draw, 0))


@pytest.mark.parametrize("temperature", [1.0, 1e-3, 1e-38])
@pytest.mark.parametrize("kind", [GateKind.FFW, GateKind.BERNOULLI, GateKind.CONCRETE])
def test_movement_of_gates_far_from_the_middle(kernels, kind, temperature):
    """No overflow on the way to a movement of next to nothing."""
    changed, rest = adam_inputs(64)
    rest = (*rest[:3], one(temperature), rest[4], one(0.0), *rest[6:])  # the scores stay
    uniform = philox.uniform(64, rest[7]).double()
    for score in (-1e4, -80.0, -3.0, -1e-4, 0.0, 1e-4, 3.0, 80.0, 1e4):
        changed[1] = torch.full((64,), score)
        expected = gate_movement(kind, changed[1].double(), one(temperature), uniform).sum().item()
        moved = adam_results(kernels["gated_adam_step_"], changed, rest, kind, True)[4] - changed[4]
        assert moved.item() == pytest.approx(expected, rel=1e-5, abs=1e-12), score


def test_gated_adam_step_on_strided_buffers(compiled):
    changed, rest = adam_inputs(600)
    expected = adam_results(ops.gated_adam_step_, changed, rest, GateKind.FFW, True)
    strided = [tensor.repeat_interleave(2)[::2] for tensor in changed[:4]]
    assert not strided[0].is_contiguous()
    ops.gated_adam_step_(*strided, changed[4], *rest, 0, True)
    for result, tensor in zip(strided, expected, strict=False):
        assert torch.equal(result, tensor)


def test_gated_adam_step_refuses_bad_arguments(compiled):
    changed, rest = adam_inputs(8)
    for position, name in ((0, "gated"), (2, "exp_avg"), (3, "exp_avg_sq")):
        short = list(changed)
        short[position] = short[position][:-1]
        with pytest.raises(ValueError, match=rf"{name} must have the shape of \w+ \(8,\), got \(7,\)"):
            ops.gated_adam_step_(*short, *rest, 0, False)
        short[position] = changed[position].double()
        with pytest.raises(RuntimeError, match=f"{name} must have the dtype of"):
            ops.gated_adam_step_(*short, *rest, 0, False)
    with pytest.raises(ValueError, match="movement must be one float64"):
        ops.gated_adam_step_(*changed[:4], one(0), *rest, 0, False)


# mutual_information --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize(
    ("n", "heads", "classes"), [(1, 1, 2), (7, 1, 3), (100, 2, 10), (37, 3, 17), (5003, 1, 10), (9, 1, 300)]
)
def test_mutual_information(kernels, dtype, n, heads, classes):
    logits, labels = mi_inputs(n, heads, classes, dtype)
    exact, exact_joint = ops.mutual_information_default(logits.double(), labels)
    information, joint = kernels["mutual_information"](logits, labels)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert joint.dtype == information.dtype == (torch.float32 if dtype in HALF else dtype)
    torch.testing.assert_close(information.double(), exact, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(joint.double(), exact_joint, rtol=tolerance, atol=tolerance * 1e-2)

    grad = torch.arange(1, heads + 1, dtype=joint.dtype)
    result = kernels["mutual_information_backward"](grad, logits, labels, joint)
    exact = ops.mutual_information_backward_default(grad.double(), logits.double(), labels, exact_joint)
    assert result.dtype == dtype
    rough = 1e-2 if dtype in HALF else tolerance * 10
    torch.testing.assert_close(
        result.double(), exact, rtol=rough, atol=rough * exact.abs().max().item() + 4 * torch.finfo(joint.dtype).eps
    )


def test_gradient_of_mutual_information_is_its_derivative(kernels):
    logits, labels = mi_inputs(40, 2, 5, torch.float64)
    leaf = logits.clone().requires_grad_()
    ops.joint_information(ops.joint_distribution(leaf, labels)).sum().backward()
    _, joint = kernels["mutual_information"](logits, labels)
    grad = kernels["mutual_information_backward"](torch.ones(2, dtype=torch.float64), logits, labels, joint)
    torch.testing.assert_close(grad, leaf.grad, rtol=1e-9, atol=1e-14)


def test_mutual_information_of_strided_inputs(kernels):
    logits, labels = mi_inputs(50, 2, 6)
    expected, joint = kernels["mutual_information"](logits, labels)
    strided = logits.transpose(0, 2).contiguous().transpose(0, 2)
    result, _ = kernels["mutual_information"](strided, labels.T.contiguous().T)
    assert torch.equal(result, expected)
    grad = kernels["mutual_information_backward"](torch.ones(2), strided, labels, joint)
    assert grad.stride() == torch.empty_like(strided).stride()
    assert torch.equal(grad, kernels["mutual_information_backward"](torch.ones(2), logits, labels, joint))


def test_mutual_information_refuses_bad_arguments(kernels, compiled):
    logits, labels = mi_inputs(10, 2, 3)
    with pytest.raises(ValueError, match=r"expected logits \(n, heads, K\) and labels \(n, heads\)"):
        kernels["mutual_information"](logits, labels[:, :1])
    with pytest.raises((TypeError, RuntimeError), match="int64 labels"):
        kernels["mutual_information"](logits, labels.int())
    for label in (-1, 3):
        with pytest.raises(ValueError, match=rf"labels must be in \[0, 3\), got {label}"):
            ops.mutual_information(logits, labels.clone().fill_(label))
        with pytest.raises(ValueError, match=rf"labels must be in \[0, 3\), got {label}"):
            ops.mutual_information_backward(torch.ones(2), logits, labels.clone().fill_(label), torch.ones(2, 3, 3))
    with pytest.raises(ValueError, match=r"joint must be \(heads, K, K\), got \(2, 3, 2\)"):
        ops.mutual_information_backward(torch.ones(2), logits, labels, torch.ones(2, 3, 2))


# objective -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize("sizes", [(1, 2, 1, 2), (7, 3, 1, 5), (100, 10, 2, 10), (37, 4, 3, 2), (3001, 300, 1, 17)])
def test_objective(kernels, dtype, tables, sizes):
    inputs, factors = objective_inputs(*sizes, dtype, tables), (0.7, 5.0, 0.5)
    results = kernels["objective"](*inputs, *factors)
    assert results[0].dtype == (torch.float32 if dtype in HALF else dtype)
    assert results[1].dtype == results[2].dtype == dtype
    rough = 1e-10 if dtype == torch.float64 else 1e-2 if dtype in HALF else 1e-4
    for result, exact in zip(results, ops.objective_default(*as_doubles(inputs), *factors), strict=True):
        atol = rough * (exact.abs().max().item() + 1e-2)
        torch.testing.assert_close(result.double(), exact, rtol=rough, atol=atol)


@pytest.mark.parametrize("tables", [False, True])
def test_gradient_of_the_objective_is_its_derivative(kernels, tables):
    logits, labels, head_logits, bias_labels, importance, aligned = objective_inputs(30, 4, 2, 3, torch.float64, tables)
    leaves = logits.requires_grad_(), head_logits.requires_grad_()
    counted = torch.ones_like(bias_labels, dtype=torch.bool)
    weights = torch.ones(30)
    if tables:
        counted = bias_labels != aligned[labels].unsqueeze(1)
        importance = importance.double()
        weights = importance[0, labels, bias_labels[:, 0]] * importance[1, labels, bias_labels[:, 1]]
    each = [
        ops.joint_information(ops.joint_distribution(head_logits[rows, head, None], bias_labels[rows, head, None]))
        for head, rows in enumerate(counted.T)
    ]
    cross_entropy = (weights * torch.nn.functional.cross_entropy(logits, labels, reduction="none")).mean()
    plain = 0.7 * cross_entropy + 5.0 * 0.5 * sum(each)
    detached = (logits.detach(), labels, head_logits.detach(), bias_labels, importance, aligned)
    losses, *gradients = kernels["objective"](*detached, 0.7, 5.0, 0.5)
    torch.testing.assert_close(losses[:1], plain.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(tuple(gradients), torch.autograd.grad(plain, leaves), rtol=1e-8, atol=1e-13)


def test_objective_of_certain_and_of_no_samples(kernels):
    inputs = objective_inputs(40, 3, 1, 3, spread=300.0, tables=True)
    losses, by_logits, _ = kernels["objective"](*inputs, 1.0, 1.0, 1.0)
    assert losses.isfinite().all() and losses[1] > 10 and by_logits.isfinite().all()
    inputs[3] = inputs[5][inputs[1]].unsqueeze(1)  # all biases aligned
    losses, _, by_head_logits = kernels["objective"](*inputs, 1.0, 1.0, 1.0)
    assert losses[2] == 0 and not by_head_logits.any()
    inputs[0][0, 0] = torch.nan
    assert kernels["objective"](*inputs, 1.0, 1.0, 1.0)[0][1].isnan()


def test_objective_refuses_bad_arguments(compiled):
    good = objective_inputs(10, 4, 2, 3, tables=True)
    for index, bad, message in [
        (0, good[0][:5], r"expected logits \(n, C\) and labels \(n,\), got \(5, 4\), \(10,\)"),
        (0, good[0].double(), "logits and head logits must have one floating-point dtype"),
        (1, good[1] + 4, r"labels must be in \[0, 4\), got"),
        (1, good[1].int(), "labels must be int64"),
        (3, good[3][:, :1], r"expected head logits \(10, heads, K\) and bias labels \(10, heads\)"),
        (3, good[3] - 3, r"bias labels must be in \[0, 3\), got -"),
        (4, good[4][:1], r"importance must be \(heads, C, K\), got \(1, 4, 3\)"),
        (5, good[5][:1], r"aligned must be \(C,\), got \(1,\)"),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=message):
            ops.objective(*good[:index], bad, *good[index + 1 :], 1.0, 1.0, 1.0)


# fit_linear_head_ ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "width", "classes", "heads", "batch_size"),
    [
        (1, 1, 2, 1, 1),
        (5, 3, 2, 1, 2),
        (30, 0, 3, 2, 10),
        (33, 7, 3, 2, 10),
        (50, 16, 4, 1, 50),
        (64, 17, 5, 3, 64),
        (101, 100, 10, 2, 25),
        (40, 513, 6, 1, 100),
        (30, 2048, 7, 1, 16),
        (20, 100, 1000, 1, 7),
        (120, 1024, 21, 1, 60),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fit_linear_head(compiled, n, width, classes, heads, batch_size, dtype):
    inputs = head_inputs(n, width, classes, heads, dtype=dtype)
    results = fit(ops.fit_linear_head_, *inputs, batch_size)
    defaults = fit(ops.fit_linear_head_default_, *inputs, batch_size)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    for result, default in zip(results, defaults, strict=True):
        torch.testing.assert_close(result, default, rtol=tolerance, atol=tolerance * 0.1)


def test_fit_linear_head_is_sgd(kernels):
    """One batch at a time, what torch.optim.SGD makes of the cross-entropy."""
    changed, (features, labels, order) = head_inputs(70, 12, 4, epochs=2, dtype=torch.float64)
    changed[2:4] = [torch.zeros_like(tensor) for tensor in changed[2:4]]
    head = torch.nn.Linear(12, 4, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(changed[0][0])
        head.bias.copy_(changed[1][0])
    sgd = torch.optim.SGD(head.parameters(), lr=SGD[0], momentum=SGD[1], weight_decay=SGD[2])
    losses = []
    for rows in order:
        total = 0.0
        for batch in rows.split(32):
            loss = torch.nn.functional.cross_entropy(head(features[batch]), labels[batch, 0])
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            total += loss.item() * len(batch)
        losses.append(total / len(features))
    result, weight, bias, *_ = fit(kernels["fit_linear_head_"], changed, [features, labels, order], 32)
    torch.testing.assert_close(weight[0], head.weight.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(bias[0], head.bias.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result, torch.tensor(losses, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_fit_linear_head_stops_at_the_plateau(compiled):
    inputs = head_inputs(60, 5, 3, epochs=40)
    rule = (0.2, 2)
    losses, *changed = fit(ops.fit_linear_head_, *inputs, 20, rule)
    expected, *expected_changed = fit(ops.fit_linear_head_default_, *inputs, 20, rule)
    assert torch.equal(losses.isnan(), expected.isnan())
    assert losses.isnan().any()
    torch.testing.assert_close(changed[-1], expected_changed[-1], rtol=1e-5, atol=0)
    assert changed[-1][2] == 1


def test_fit_linear_head_goes_on_where_it_stopped(kernels):
    changed, (features, labels, order) = head_inputs(60, 5, 3, epochs=6)
    whole = fit(kernels["fit_linear_head_"], changed, [features, labels, order], 20)
    _, *half = fit(kernels["fit_linear_head_"], changed, [features, labels, order[:3]], 20)
    _, *parts = fit(kernels["fit_linear_head_"], half, [features, labels, order[3:]], 20)
    for result, expected in zip(parts, whole[1:], strict=True):
        assert torch.equal(result, expected)


def test_fit_linear_head_of_strided_tensors(compiled):
    changed, (features, labels, order) = head_inputs(60, 5, 3, heads=2)
    expected = fit(ops.fit_linear_head_, changed, [features, labels, order], 20)
    strided = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in changed[:4]] + [changed[4].clone()]
    fixed = [features.T.contiguous().T, labels.T.contiguous().T, order.T.contiguous().T]
    losses = ops.fit_linear_head_(*strided, *fixed, 20, *SGD, *RULE)
    for result, tensor in zip((losses, *strided), expected, strict=True):
        assert torch.equal(result, tensor)


def test_fit_linear_head_refuses_bad_arguments(compiled):
    changed, (features, labels, order) = head_inputs(12, 5, 3)
    bad = [
        (r"labels must be in \[0, 3\), got 3", [features, labels.clone().fill_(3), order], 4),
        (r"labels must be in \[0, 3\), got -1", [features, labels.clone().fill_(-1), order], 4),
        (r"order must be in \[0, 12\), got 12", [features, labels, order + 1], 4),
        (r"expected features \(n, D\)", [features[:, :4], labels, order], 4),
        (r"expected features \(n, D\)", [features, labels[:5], order], 4),
        ("weight and features must both be float32 or float64", [features.double(), labels, order], 4),
        ("labels and order must be int64", [features, labels.int(), order], 4),
        ("order must be", [features, labels, order[0]], 4),
        ("batch_size must be positive, got 0", [features, labels, order], 0),
    ]
    for message, fixed, batch_size in bad:
        with pytest.raises((ValueError, RuntimeError), match=message):
            fit(ops.fit_linear_head_, changed, fixed, batch_size)


# All operators -------------------------------------------------------------------------------------------------------


def sample_calls():
    """Arguments of one call of every operator, and of every gate kind."""
    inputs = gate_inputs((5, 7))
    logits, labels = mi_inputs(20, 2, 4)
    _, joint = ops.mutual_information_default(logits, labels)
    for kind in GateKind:
        changed, rest = adam_inputs(40)
        changed[0] = torch.zeros_like(changed[0])
        yield ops.gate_weight, (*inputs[1:], int(kind))
        yield ops.gate_weight_backward, (*inputs, int(kind))
        yield ops.gated_adam_step_, (*changed, *rest, int(kind), True)
    yield ops.mutual_information, (logits, labels)
    yield ops.mutual_information_backward, (torch.ones(2), logits, labels, joint)
    for tables in (False, True):
        yield ops.objective, (*objective_inputs(20, 3, 2, 4, tables=tables), 0.7, 5.0, 0.5)
    changed, fixed = head_inputs(20, 6, 3)
    yield ops.fit_linear_head_, (*changed, *fixed, 8, *SGD, *RULE)


CALLS = list(sample_calls())
CALL_NAMES = [f"{operator.name()}-{index}" for index, (operator, _) in enumerate(CALLS)]


def cloned(arguments):
    return [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]


@pytest.mark.parametrize(("operator", "arguments"), CALLS, ids=CALL_NAMES)
def test_opcheck(operator, arguments):
    torch.library.opcheck(operator, cloned(arguments))


@pytest.mark.parametrize(("operator", "arguments"), CALLS, ids=CALL_NAMES)
def test_compile_fullgraph(operator, arguments):
    expected_arguments, compiled_arguments = cloned(arguments), cloned(arguments)
    expected = operator(*expected_arguments)
    function = torch.compile(lambda *values: operator(*values), fullgraph=True, backend="aot_eager")
    result = function(*compiled_arguments)
    torch.testing.assert_close(result, expected)
    for mine, theirs in zip(compiled_arguments, expected_arguments, strict=True):
        if isinstance(mine, torch.Tensor):
            torch.testing.assert_close(mine, theirs)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", GateKind)
def test_fake_tensors_have_the_strides_of_the_results(kernels, kind):
    inputs = gate_inputs((4, 3, 2, 5))
    layouts = [strided_variants(tensor) for tensor in inputs[:3]]
    for name in layouts[0]:
        g, w, m = (variants[name] for variants in layouts)
        with torch._subclasses.FakeTensorMode() as mode:
            fakes = [mode.from_tensor(tensor) for tensor in (g, w, m, *inputs[3:])]
            forward, backward = ops.gate_weight(*fakes[1:], kind), ops.gate_weight_backward(*fakes, kind)
        assert forward.stride() == kernels["gate_weight"](w, m, *inputs[3:], kind).stride()
        assert backward.stride() == kernels["gate_weight_backward"](g, w, m, *inputs[3:], kind).stride()


def test_the_number_of_threads_changes_no_bit(compiled, restore_threads):
    count = 100_003
    inputs = gate_inputs((count,))
    logits, labels = mi_inputs(5003, 2, 10)
    _, joint = ops.mutual_information(logits, labels)
    batch = objective_inputs(5003, 100, 2, 10, tables=True)
    large_head, several_heads = head_inputs(300, 1024, 40, epochs=2), head_inputs(300, 33, 6, heads=3, epochs=2)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outputs = []
        for kind in GateKind:
            outputs += [ops.gate_weight(*inputs[1:], kind), ops.gate_weight_backward(*inputs, kind)]
            outputs += adam_results(ops.gated_adam_step_, *adam_inputs(count), kind, True)
        outputs += ops.mutual_information(logits, labels)
        outputs += [ops.mutual_information_backward(torch.ones(2), logits, labels, joint)]
        outputs += ops.objective(*batch, 0.7, 5.0, 0.5)
        outputs += fit(ops.fit_linear_head_, *large_head) + fit(ops.fit_linear_head_, *several_heads)
        results.append(outputs)
    for outputs in results[1:]:
        for result, expected in zip(outputs, results[0], strict=True):
            assert torch.equal(result, expected)


OTHER_INSTRUCTION_SET = """
import sys, torch
from ffw_fast import ops
from ffw_fast.backend import backend_info, load
from ffw_fast.gates import GateKind
from tests import operator_inputs as t
load()
if backend_info()["cpu"]["instruction_set"] != sys.argv[1]:
    sys.exit("not available")
for kind in GateKind:
    for dtype, scores_dtype in t.DTYPES:
        inputs = t.gate_inputs((5003,), dtype, scores_dtype)
        close = dict(rtol=1e-2 if dtype in t.HALF else 1e-5, atol=1e-4 if dtype in t.HALF else 1e-7)
        mine, default = ops.gate_weight(*inputs[1:], kind), ops.gate_weight_default(*inputs[1:], kind)
        torch.testing.assert_close(mine, default, **close)
        assert kind == 0 or torch.equal(mine, default)
        mine, default = (f(*inputs, kind) for f in (ops.gate_weight_backward, ops.gate_weight_backward_default))
        torch.testing.assert_close(mine, default, **close)
    changed, rest = t.adam_inputs(5003)
    mine, default = (t.adam_results(f, changed, rest, kind, True)
                     for f in (ops.gated_adam_step_, ops.gated_adam_step_default_))
    for result, expected in zip(mine[1:], default[1:]):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
for arguments in ((101, 100, 10, 2), (64, 17, 5, 3), (30, 2048, 7, 1)):
    inputs = t.head_inputs(*arguments)
    mine, default = (t.fit(f, *inputs, 25) for f in (ops.fit_linear_head_, ops.fit_linear_head_default_))
    for result, expected in zip(mine, default):
        torch.testing.assert_close(result, expected, rtol=2e-4, atol=2e-5)
logits, labels = t.mi_inputs(101, 2, 10)
torch.testing.assert_close(ops.mutual_information(logits, labels), ops.mutual_information_default(logits, labels))
"""


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2", "avx512"])
def test_other_instruction_sets(compiled, instruction_set):
    """Each set of loops in a process of its own: the choice is made once."""
    environment = os.environ | {"FFW_FAST_CPU_CAPABILITY": instruction_set}
    command = [sys.executable, "-c", OTHER_INSTRUCTION_SET, instruction_set]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "not available" in done.stderr:
        pytest.skip(f"this machine has no {instruction_set}")
    assert done.returncode == 0, done.stderr
