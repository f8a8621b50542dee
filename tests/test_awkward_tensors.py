"""Operators on tensors that nobody hands in on purpose. Torch has no negative strides: ``flip`` copies.

Sizes 0, 1 and odd, strides, gaps, dtypes, extreme scores and temperatures, and 2 GB of data are in ``test_ops``.
"""

import math

import pytest
import torch

from ffw_fast import ops, philox
from ffw_fast.gates import GateKind
from tests.operator_inputs import adam_inputs, one

pytestmark = pytest.mark.usefixtures("poisoned", "compiled")
STEP = torch.tensor([-3e38, -1.0, -1e-6, -1e-38, -1e-45, -0.0, 0.0, 1e-45, 1e-38, 1e-6, 1.0, 3e38])


@pytest.mark.parametrize("kind", [GateKind.FFW, GateKind.HARD])
def test_at_the_final_temperature_the_gate_is_the_step_and_its_gradient_is_finite(kind):
    """But for the scores within some tens of T from 0, where it is what the formula says."""
    weight, draw = torch.full_like(STEP, 3.0), philox.make_draw(1, 2)
    result = ops.gate_weight(weight, STEP, one(1e-8), draw, kind)
    expected = torch.where(STEP >= 0, 3.0, 0.0)
    if kind is GateKind.FFW:
        expected[(STEP < 0) & (STEP > -1e-20)] = 3.0  # min(2 sigmoid(-0), 1) is 1
    assert torch.equal(result, expected)
    slope = ops.gate_weight_backward(torch.ones_like(STEP), weight, STEP, one(1e-8), draw, kind)
    assert slope.isfinite().all()
    assert (slope[STEP.abs() > 1e-7] == 0).all()


@pytest.mark.parametrize("kind", GateKind)
@pytest.mark.parametrize("temperature", [1e-30, 1e-8, 1.0, 1e30])
def test_no_gradient_of_a_finite_score_is_nan(kind, temperature):
    weight, draw = torch.full_like(STEP, 3.0), philox.make_draw(1, 2)
    slope = ops.gate_weight_backward(torch.ones_like(STEP), weight, STEP, one(temperature), draw, kind)
    assert not slope.isnan().any()


def test_an_output_that_is_one_number_seen_many_times_is_refused():
    changed, rest = adam_inputs(8)
    for position in range(4):
        expanded = list(changed)
        expanded[position] = changed[position][:1].expand(8)
        with pytest.raises(RuntimeError, match="copy_"):
            ops.gated_adam_step_(*expanded, *rest, 0, False)


ADAM = ("gated", "scores", "exp_avg", "exp_avg_sq", "movement", "weight", "grad")


@pytest.mark.parametrize(
    "kernel", [ops.gated_adam_step_, ops.DEFAULTS["gated_adam_step_"]], ids=["compiled", "default"]
)
@pytest.mark.parametrize(("one", "other"), [(0, 1), (1, 2), (2, 3), (0, 5), (3, 6)])
@pytest.mark.parametrize("shift", [0, 1, 31])
def test_outputs_that_share_memory_are_refused_by_name(kernel, one, other, shift):
    """With each other, or with an input; by one number as well as by all. Nothing is changed."""
    changed, rest = adam_inputs(32)
    arguments = [*changed, *rest]
    memory = torch.full((64,), 7.0)
    arguments[one], arguments[other] = memory[:32], memory[shift : shift + 32]
    with pytest.raises(ValueError, match=f"{ADAM[one]} and {ADAM[other]} share memory"):
        kernel(*arguments, 0, False)
    assert (memory == 7).all()
    arguments[other] = memory[32:]
    kernel(*arguments, 0, False)


def test_a_movement_within_the_scores_is_refused():
    changed, rest = adam_inputs(4, torch.float64)
    with pytest.raises(ValueError, match="scores and movement share memory"):
        ops.gated_adam_step_(*changed[:4], changed[1][2:3], *rest, 0, True)


def test_outputs_in_each_others_gaps_are_as_good_as_any():
    changed, rest = adam_inputs(32)
    expected = [tensor.clone() for tensor in changed]
    ops.gated_adam_step_(*expected, *rest, 0, False)
    memory = torch.stack([changed[1], changed[2]], dim=1)
    ops.gated_adam_step_(changed[0], memory[:, 0], memory[:, 1], *changed[3:], *rest, 0, False)
    assert torch.equal(memory[:, 0], expected[1])
    assert torch.equal(memory[:, 1], expected[2])


def test_outputs_with_gaps_that_share_memory_stay_in_it():
    """What comes out is not defined; the memory behind it stays as it was."""
    memory = torch.full((128,), 7.0)
    changed, rest = adam_inputs(32)
    ops.gated_adam_step_(changed[0], memory[8:72:2], memory[8:72:2], memory[16:80:2], changed[4], *rest, 0, False)
    assert (memory[:8] == 7).all()
    assert (memory[1::2] == 7).all()
    assert (memory[80:] == 7).all()


@pytest.mark.parametrize(
    "kernel", [ops.fit_linear_head_, ops.DEFAULTS["fit_linear_head_"]], ids=["compiled", "default"]
)
@pytest.mark.parametrize(("one", "other"), [(0, 2), (1, 3), (0, 5), (1, 4)])
def test_heads_that_share_memory_are_refused_by_name(kernel, one, other):
    names = ("weight", "bias", "weight_momentum", "bias_momentum", "plateau", "features")
    memory = torch.zeros(400, dtype=torch.float64)
    shapes = ((1, 2, 3), (1, 2), (1, 2, 3), (1, 2), (3,), (5, 3))
    tensors = [memory[50 * i :][: math.prod(shape)].view(shape) for i, shape in enumerate(shapes)]
    labels, order = torch.zeros(5, 1, dtype=torch.int64), torch.arange(5)[None]
    settings = (5, 0.1, 0.9, 0.0, 1e-3, 5)
    kernel(*tensors, labels, order, *settings)
    start = memory[50 * one + math.prod(shapes[one]) - 1 :]  # its last number
    tensors[other] = start[: math.prod(shapes[other])].view(shapes[other])
    with pytest.raises(ValueError, match=f"{names[one]} and {names[other]} share memory"):
        kernel(*tensors, labels, order, *settings)


@pytest.mark.parametrize("offset", [1, 2, 3, 5])
def test_buffers_that_start_at_any_element(offset):
    """Vectors of 64 bytes must not be expected to be aligned."""
    changed, rest = adam_inputs(1003)
    aligned = [tensor.clone() for tensor in changed]
    ops.gated_adam_step_(*aligned, *rest, 0, True)
    shifted = [torch.cat([torch.zeros(offset, dtype=tensor.dtype), tensor])[offset:] for tensor in changed[:4]]
    ops.gated_adam_step_(*shifted, changed[4], *rest, 0, True)
    assert all(torch.equal(*pair) for pair in zip(shifted, aligned, strict=False))


@pytest.mark.parametrize("count", [2**31 + 7, 2**40])
def test_more_elements_than_32_bits_count_virtually(count):
    """Shapes and strides of the results, without the memory."""
    weight = torch.empty(count, device="meta")
    temperature, draw = torch.empty((), device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    result = ops.gate_weight(weight, weight, temperature, draw, 0)
    assert (result.shape, result.stride()) == (weight.shape, weight.stride())
    assert ops.gate_weight_backward(weight, weight, weight, temperature, draw, 0).shape == weight.shape
