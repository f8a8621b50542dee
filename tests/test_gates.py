"""The gates' arithmetic against their definitions in double precision."""

import math

import pytest
import torch

from ffw_fast import philox
from ffw_fast.gates import (
    GATES,
    GateKind,
    gate,
    gate_kind,
    gate_movement,
    gate_slope,
    half_open,
    reproducible_exp,
    sigmoid_slope,
)

TEMPERATURES = (1e-30, 1e-8, 0.03, 1.0, 50.0, 1e30)


def scores_and_uniform(dtype=torch.float64, count=4001):
    source = torch.Generator().manual_seed(0)
    scores = torch.randn(count, generator=source, dtype=torch.float64)
    scores[:5] = torch.tensor([0.0, -0.0, 1e-300, -1e-300, -1e-5])
    return scores.to(dtype), philox.uniform(count, philox.make_draw(4)).to(dtype)


def test_names():
    assert GATES == ("ffw", "hard", "bernoulli", "concrete")
    assert [int(gate_kind(name)) for name in GATES] == [0, 1, 2, 3]
    assert [kind.is_random for kind in GateKind] == [False, False, True, True]
    with pytest.raises(ValueError, match="unknown gate 'soft'; known gates: ffw, hard, bernoulli, concrete"):
        gate_kind("soft")


@pytest.mark.parametrize("kind", GateKind)
@pytest.mark.parametrize("temperature", [0.03, 1.0, 50.0])
def test_values_and_slopes_are_those_of_the_definition(kind, temperature):
    scores, uniform = scores_and_uniform()
    t = torch.tensor(temperature, dtype=torch.float32)
    exact = t.double()
    s = torch.sigmoid(scores / exact)
    noisy = scores + torch.logit(uniform)
    q = torch.sigmoid(noisy / exact)
    values = {
        GateKind.FFW: (2 * s).clamp_max(1),
        GateKind.HARD: (scores >= 0).double(),
        GateKind.BERNOULLI: (uniform < s).double(),
        GateKind.CONCRETE: (noisy >= 0).double(),
    }
    slopes = {
        GateKind.FFW: 2 * s * (1 - s) / exact,
        GateKind.HARD: s * (1 - s) / exact,
        GateKind.BERNOULLI: s * (1 - s) / exact,
        GateKind.CONCRETE: q * (1 - q) / exact,
    }
    torch.testing.assert_close(gate(kind, scores, t, uniform), values[kind], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(gate_slope(kind, scores, t, uniform), slopes[kind], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_ffw_is_exactly_one_where_the_weight_is_kept(temperature):
    scores = torch.tensor([0.0, -0.0, 1e-30, 1e-3, 1.0, 1e30, torch.inf])
    assert (gate(GateKind.FFW, scores, torch.tensor(temperature)) == 1).all()


@pytest.mark.parametrize("temperature", [0.03, 1.0, 50.0])
def test_movement_is_the_derivative_by_the_logarithm_of_the_temperature(temperature):
    scores, _ = scores_and_uniform()
    log_t = torch.tensor(temperature, dtype=torch.float32).double().log().expand_as(scores).clone().requires_grad_()
    soft = (2 * torch.sigmoid(scores / log_t.exp())).clamp_max(1)
    (expected,) = torch.autograd.grad(soft.sum(), log_t)
    moved = gate_movement(GateKind.FFW, scores, torch.tensor(temperature))
    assert (moved[scores >= 0] == 0).all()
    torch.testing.assert_close(moved[scores < 0], expected.abs()[scores < 0], rtol=1e-9, atol=1e-15)


def test_sigmoid_slope_keeps_its_tails():
    x = torch.tensor([-80.0, 80.0, -700.0, 700.0], dtype=torch.float64)
    torch.testing.assert_close(sigmoid_slope(x), torch.exp(-x.abs()), rtol=1e-12, atol=0)


def test_reproducible_exp_is_accurate_to_a_unit_in_the_last_place():
    x = torch.linspace(-87, 88, 200_001)
    exact = torch.exp(x.double())
    assert ((reproducible_exp(x).double() - exact).abs() / exact).max() < 1.2e-7
    assert reproducible_exp(torch.tensor(float("nan"))).isnan()
    assert torch.equal(reproducible_exp(torch.tensor([1e9, -1e9])), reproducible_exp(torch.tensor([88.0, -87.0])))


def test_half_open_is_the_distance_of_all_gates_from_open_or_shut():
    temperature = torch.tensor(1.0)
    layers = [torch.tensor([[-100.0, 0.0, 5.0]]), torch.tensor([-math.log(3)])]  # gates of ffw: 0, 1, 1 and 1/2
    assert half_open(GateKind.FFW, layers, temperature) == pytest.approx(0.5 / 4)
    assert half_open(GateKind.HARD, layers, temperature) == 0
    quarter = torch.tensor([-math.log(3) / 2])  # of bernoulli at T = 1/2, open with probability 1/4
    assert half_open(GateKind.BERNOULLI, [quarter], torch.tensor(0.5)) == pytest.approx(0.25)
    assert half_open(GateKind.CONCRETE, [2 * quarter], torch.tensor(0.5)) == pytest.approx(0.25)
