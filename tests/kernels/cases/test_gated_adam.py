"""The fused Adam step on the scores against the default kernel in double precision."""

import pytest
import torch
from ffw_fast.kernels.gated_adam import gated_adam_step_

from ffw_fast import ops, philox
from ffw_fast.gates import GateKind, gate_movement

from .common import DEVICE, assert_as_good, draw, normal, one, with_gaps

SETTINGS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 1e-4}
NAMES = ("gated", "scores", "exp_avg", "exp_avg_sq")

pytestmark = pytest.mark.usefixtures("poisoned")


def state(size, dtype=torch.float32, scores_dtype=torch.float32):
    weight, grad, scores, exp_avg, exp_avg_sq = (normal(size, dtype=torch.float64, seed=seed) for seed in range(5))
    return {
        "gated": torch.full_like(weight, torch.nan).to(dtype),
        "scores": (0.2 * scores).to(scores_dtype),
        "exp_avg": (0.1 * exp_avg).to(scores_dtype),
        "exp_avg_sq": (0.01 * exp_avg_sq.square()).to(scores_dtype),
        "movement": torch.tensor(0.5, dtype=torch.float64, device=DEVICE),
        "weight": weight.to(dtype),
        "grad": grad.to(dtype),
    }


def run(function, tensors, kind, measure, count=3.0, settings=SETTINGS, temperatures=(0.5, 0.4), draws=None):
    own = {name: tensor.clone() for name, tensor in tensors.items()}
    scalars = map(one, (*temperatures, count, 1e-3))
    draws = draws or (draw(1, 5, 0), draw(1, 6, 0))
    function(*own.values(), *scalars, *draws, *settings.values(), kind, measure)
    return own


def doubled(tensors):
    return {name: tensor.double() for name, tensor in tensors.items()}


@pytest.mark.parametrize("kind", GateKind)
@pytest.mark.parametrize("size", [0, 1, 1000, 2064])
def test_step(kind, size):
    for measure, count in ((False, 1.0), (True, 2.0), (True, 30000.0)):
        tensors = state(size)
        result = run(gated_adam_step_, tensors, kind, measure, count)
        default = run(ops.gated_adam_step_default_, tensors, kind, measure, count)
        exact = run(ops.gated_adam_step_default_, doubled(tensors), kind, measure, count)
        for name in NAMES:
            assert_as_good(result[name], default[name], exact[name])
        assert torch.equal(result["weight"], tensors["weight"])
        torch.testing.assert_close(result["movement"], exact["movement"], rtol=1e-5, atol=1e-7)
        assert measure or torch.equal(result["movement"], tensors["movement"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("kind", [GateKind.FFW, GateKind.CONCRETE])
def test_16_bits(dtype, wide, kind):
    tensors = state(1030, dtype, torch.float32 if wide else dtype)
    result = run(gated_adam_step_, tensors, kind, True)
    default = run(ops.gated_adam_step_default_, tensors, kind, True)
    exact = run(ops.gated_adam_step_default_, doubled(tensors), kind, True)
    for name in NAMES[1:]:
        assert_as_good(result[name], default[name], exact[name])
    gates = ops.gate_weight_default(tensors["weight"], result["scores"], one(0.4), draw(1, 6, 0), kind)
    torch.testing.assert_close(result["gated"], gates, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.0, 0.99), (0.5, 0.9999)])
def test_other_settings(betas):
    settings = {"beta1": betas[0], "beta2": betas[1], "eps": 1e-6, "weight_decay": 0.0}
    for count in (1.0, 10.0):
        tensors = state(100)
        result = run(gated_adam_step_, tensors, GateKind.FFW, False, count, settings)
        default = run(ops.gated_adam_step_default_, tensors, GateKind.FFW, False, count, settings)
        exact = run(ops.gated_adam_step_default_, doubled(tensors), GateKind.FFW, False, count, settings)
        for name in NAMES:
            assert_as_good(result[name], default[name], exact[name])


@pytest.mark.parametrize("kind", [GateKind.FFW, GateKind.BERNOULLI, GateKind.CONCRETE])
def test_movement_of_gates_far_from_the_middle(kind):
    tensors, uniform = state(64), philox.uniform(64, draw(1, 6, 0)).double()
    for temperature in (1.0, 1e-38):
        for score in (-1e4, -80.0, -1e-4, 0.0, 80.0, 1e4):
            tensors["scores"].fill_(score)
            result = run(gated_adam_step_, tensors, kind, True, temperatures=(temperature, temperature))
            scores = result["scores"].double()
            expected = gate_movement(kind, scores, one(temperature), uniform).sum()
            torch.testing.assert_close(result["movement"] - 0.5, expected, rtol=1e-5, atol=1e-12)


def test_draws_with_gaps():
    draws = draw(1, 5, 0), draw(1, 6, 0)
    dense, other = (
        run(gated_adam_step_, state(100), GateKind.BERNOULLI, False, draws=keys)
        for keys in (draws, tuple(map(with_gaps, draws)))
    )
    assert all(torch.equal(other[name], dense[name]) for name in NAMES)


def test_padding_stays_zero_and_movement_repeats():
    tensors = state(5000)
    for name in ("scores", "exp_avg", "exp_avg_sq", "weight", "grad"):
        tensors[name][-16:] = 0
    first, second = (run(gated_adam_step_, tensors, GateKind.FFW, True) for _ in range(2))
    assert (first["scores"][-16:] == 0).all()
    assert (first["gated"][-16:] == 0).all()
    assert torch.equal(first["movement"], second["movement"])


def test_strided_buffers_are_refused():
    tensors = state(64)
    tensors["grad"] = tensors["grad"].repeat_interleave(2)[::2]
    arguments = (*tensors.values(), *map(one, (1, 1, 1, 1e-3)), draw(), draw(), *SETTINGS.values(), 0, False)
    with pytest.raises(ValueError, match="grad"):
        gated_adam_step_(*arguments)
