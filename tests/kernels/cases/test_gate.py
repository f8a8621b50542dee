"""The gate's arithmetic in Triton: elementwise kernels against double precision, masks bit by bit."""

import math

import pytest
import torch
import triton
import triton.language as tl
from ffw_fast.kernels import gate
from ffw_fast.kernels.gate_weight import gate_weight, gate_weight_backward
from hypothesis import given, settings
from hypothesis import strategies as st

from ffw_fast import ops, philox
from ffw_fast.gates import GateKind, reproducible_exp

from .common import DEVICE, INTERPRETED, RANDOM_KINDS, draw, normal, one

HALF = (torch.bfloat16, torch.float16)
DTYPES = [(torch.float32, torch.float32)] + [(dtype, scores) for dtype in HALF for scores in (dtype, torch.float32)]
SIZES = ((0, 1.0), (1, 0.03), (17, 1.0), (1024, 1.0), (2053, 0.03))  # and temperatures

pytestmark = pytest.mark.usefixtures("poisoned")


@triton.jit
def function_kernel(x_ptr, y_ptr, count, NAME: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lane, mask=lane < count, other=1.0)
    if NAME == "exp":
        y = gate.reproducible_exp(x)
    elif NAME == "log":
        y = gate.logarithm(x)
    elif NAME == "inverse":
        y = gate.inverse_temperature(x)
    else:
        y = gate.negative_expm1(x)
    tl.store(y_ptr + lane, y, mask=lane < count)


def apply(name, x):
    y = torch.empty_like(x)
    function_kernel[(1,)](x, y, len(x), NAME=name, BLOCK=triton.next_power_of_2(len(x)), enable_fp_fusion=False)
    return y


def test_exponential_has_the_bits_of_the_reference():
    edges = torch.tensor([0.0, -0.0, 1e-30, -87.0, -87.5, 88.0, 89.0, math.inf, -math.inf, math.nan, 0.34657359])
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.linspace(-1, 1, 1001), edges]).to(DEVICE)
    result, expected = apply("exp", x), reproducible_exp(x)
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


def test_logarithm():
    x = torch.cat([torch.linspace(1, 2**23, 4000) * 2.0**-24 * 2, 1 - torch.arange(1, 90) * 2.0**-24]).to(DEVICE)
    x = x[(x > 0) & (x < 1)]
    torch.testing.assert_close(apply("log", x).double(), x.double().log(), rtol=3e-7, atol=0)


def test_inverse_temperature_is_rounded_once():
    source = torch.Generator().manual_seed(3)
    x = torch.exp(torch.rand(4000, generator=source) * 120 - 60)
    x = torch.cat([x, torch.tensor([1.0, 0.1, 1e-8, 1e-30, 1e30, 3.0])]).to(DEVICE)
    assert torch.equal(apply("inverse", x), x.reciprocal())


def test_bias_correction():
    x = -torch.logspace(-7, 2, 2000).to(DEVICE)
    torch.testing.assert_close(apply("expm1", x).double(), -torch.expm1(x.double()), rtol=4e-7, atol=0)


def gate_inputs(size, dtype, scores_dtype, temperature):
    grad, weight, scores = (normal(size, dtype=torch.float64, seed=seed) for seed in range(3))
    scores = (scores * min(4 * temperature, 2.0)).to(scores_dtype)
    return grad.to(dtype), weight.to(dtype), scores, one(temperature), draw()


def assert_relatively_as_good(result, own, exact, slack):
    """As ``common.assert_as_good``, but relative to each element."""
    if not exact.numel():
        return
    assert result.dtype == own.dtype
    error, own_error = (
        ((value.double() - exact).abs() / exact.abs().clamp_min(1e-30)).max().item() for value in (result, own)
    )
    factor = 4 if result.dtype == torch.bfloat16 and INTERPRETED else 2  # it truncates there
    assert error <= factor * own_error + slack * torch.finfo(result.dtype).eps


@pytest.mark.parametrize("kind", GateKind)
@pytest.mark.parametrize(("dtype", "scores_dtype"), DTYPES)
def test_gate_weight(kind, dtype, scores_dtype):
    for size, temperature in SIZES:
        _, *inputs = gate_inputs(size, dtype, scores_dtype, temperature)
        result, default = gate_weight(*inputs, kind), ops.gate_weight_default(*inputs, kind)
        assert result.dtype == dtype
        assert result.shape == (size,)
        if kind is GateKind.FFW:
            weight, scores, *rest = inputs
            assert torch.equal(result[scores >= 0], weight[scores >= 0])
            exact = ops.gate_weight_default(weight.double(), scores.double(), *rest, kind)
            assert_relatively_as_good(result, default, exact, slack=4)
        else:
            assert torch.equal(result, default)


@pytest.mark.parametrize("kind", GateKind)
@pytest.mark.parametrize(("dtype", "scores_dtype"), DTYPES)
def test_gate_weight_backward(kind, dtype, scores_dtype):
    for size, temperature in SIZES:
        inputs = gate_inputs(size, dtype, scores_dtype, temperature)
        result, default = gate_weight_backward(*inputs, kind), ops.gate_weight_backward_default(*inputs, kind)
        assert result.dtype == scores_dtype
        assert result.shape == (size,)
        if torch.float16 in (dtype, scores_dtype):  # tiny slopes are no normal numbers there
            torch.testing.assert_close(result, default, rtol=2e-3, atol=2e-7)
        else:
            grad, weight, scores, *rest = inputs
            exact = ops.gate_weight_backward_default(grad.double(), weight.double(), scores.double(), *rest, kind)
            assert_relatively_as_good(result, default, exact, slack=16)


@pytest.mark.parametrize("kind", GateKind)
@pytest.mark.parametrize("temperature", [1e-30, 1e-8, 1.0, 1e30])
def test_extreme_scores_and_temperatures(kind, temperature):
    numbers = [0.0, -0.0, 1e-38, -1e-38, 1e-8, -1e-8, 0.5, -0.5, 87.0, -87.0, -88.0, -104.0, 3e38, -3e38]
    scores = torch.tensor([*numbers, torch.inf, -torch.inf, torch.nan] * 5, device=DEVICE)
    weight, grad = (torch.linspace(*ends, len(scores), device=DEVICE) for ends in ((1, 2), (-1, 3)))
    inputs = (weight, scores, one(temperature), draw())
    result, default = gate_weight(*inputs, kind), ops.gate_weight_default(*inputs, kind)
    torch.testing.assert_close(result, default, rtol=1e-6, atol=1e-37, equal_nan=True)
    slope, default = (
        gate_weight_backward(grad, *inputs, kind),
        ops.gate_weight_backward_default(grad, *inputs, kind),
    )
    torch.testing.assert_close(slope, default, rtol=1e-4, atol=1e-36 * max(1.0, 1 / temperature), equal_nan=True)


@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    number=st.integers(-(2**63), 2**63 - 1),
    first=st.integers(0, 2**40).map(lambda block: 4 * block),
    size=st.integers(0, 3000),
    log_temperature=st.floats(-30, 30),
    spread=st.floats(-8, 2),
)
@settings(max_examples=30)
@pytest.mark.parametrize("kind", RANDOM_KINDS)
def test_sampled_masks_are_the_same_bits(kind, seed, number, first, size, log_temperature, spread):
    scores = normal(size, seed=size) * 10**spread
    inputs = (torch.ones(size, device=DEVICE), scores, one(10**log_temperature), draw(seed, number, first))
    assert torch.equal(gate_weight(*inputs, kind), ops.gate_weight_default(*inputs, kind))


def test_uniform_numbers_are_the_same_bits():
    size = 4099
    inputs = (
        torch.ones(size, device=DEVICE),
        torch.zeros(size, device=DEVICE),
        one(1.0),
        draw(-5, 2**40, 2**36),
    )
    # At m = 0 the Bernoulli gate is 1[u < 1/2]; other thresholds are covered by random scores above.
    expected = philox.uniform(size, inputs[-1]) < 0.5
    assert torch.equal(gate_weight(*inputs, GateKind.BERNOULLI) == 1, expected)


@pytest.mark.parametrize("kind", GateKind)
def test_strides(kind):
    weight, scores = normal(6, 5, 3, 3), normal(6, 5, 3, 3, seed=1)
    last = weight.to(memory_format=torch.channels_last)
    rest = (one(0.5), draw())
    expected = gate_weight(weight, scores, *rest, kind)
    for first, second in (
        (last, scores),
        (weight, scores.to(memory_format=torch.channels_last)),
        (last, scores.to(memory_format=torch.channels_last)),
        (weight.transpose(0, 1), scores.transpose(0, 1)),
        (normal(6, 5, 3, 6)[..., ::2], scores),
    ):
        default = ops.gate_weight_default(first, second, *rest, kind)
        result = gate_weight(first, second, *rest, kind)
        assert result.stride() == default.stride()
        torch.testing.assert_close(result, default)
        torch.testing.assert_close(
            gate_weight_backward(first, first, second, *rest, kind),
            ops.gate_weight_backward_default(first, first, second, *rest, kind),
        )
    assert torch.equal(gate_weight(last, scores, *rest, kind), expected)


def test_wrong_inputs_are_refused():
    weight, rest = normal(4), (one(1.0), draw())
    with pytest.raises(TypeError, match="float64"):
        gate_weight(weight.double(), weight.double(), *rest, 0)
    with pytest.raises(ValueError, match="shape"):
        gate_weight(weight, normal(5), *rest, 0)
