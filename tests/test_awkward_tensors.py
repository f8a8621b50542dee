"""Operators on tensors that nobody hands in on purpose. Torch has no negative strides: ``flip`` copies.

Sizes 0, 1 and odd, strides, gaps, dtypes, extreme scores and temperatures, and 2 GB of data are in ``test_ops``.
"""

import pytest
import torch

from ffw_fast import ops, philox
from ffw_fast.gates import GateKind
from tests.test_ops import KINDS, adam_inputs, one

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


@pytest.mark.parametrize("kind", KINDS)
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


def test_outputs_that_are_each_other_stay_in_their_memory():
    """What comes out is not defined; the memory behind it stays as it was."""
    memory = torch.full((64,), 7.0)
    shared = memory[8:40]
    changed, rest = adam_inputs(32)
    ops.gated_adam_step_(changed[0], shared, shared, memory[16:48], changed[4], *rest, 0, False)
    assert (memory[:8] == 7).all()
    assert (memory[48:] == 7).all()


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
