"""The heads' fit against the default kernel in double precision."""

import math

import pytest
import torch
from ffw_fast.kernels.linear_head import fit_linear_head_

from ffw_fast import ops

from .common import DEVICE, assert_as_good, normal

SETTINGS = {
    "batch_size": 16,
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "threshold": 1e-3,
    "patience": 5,
}

pytestmark = pytest.mark.usefixtures("poisoned")


def problem(samples=40, heads=2, classes=3, width=10, epochs=2, dtype=torch.float32):
    source = torch.Generator().manual_seed(samples)
    labels = torch.randint(classes, (samples, heads), generator=source).to(DEVICE)
    order = torch.stack([torch.randperm(samples, generator=source) for _ in range(epochs)]).to(DEVICE)
    shapes = ((heads, classes, width), (heads, classes)) * 2
    state = [0.1 * normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    plateau = torch.tensor([math.inf, 0, 0], dtype=torch.float64, device=DEVICE)
    return state, plateau, normal(samples, width, seed=4).to(dtype), labels, order


def run(function, state, plateau, features, labels, order, settings):
    state, plateau = [tensor.clone() for tensor in state], plateau.clone()
    losses = function(*state, plateau, features, labels, order, *settings.values())
    return state, plateau, losses


def check(arguments, settings):
    state, plateau, features, labels, order = arguments
    result, result_plateau, losses = run(fit_linear_head_, *arguments, settings)
    own, _, own_losses = run(ops.fit_linear_head_default_, state, plateau, features.float(), labels, order, settings)
    wide = ([tensor.double() for tensor in state], plateau, features.double(), labels, order)
    exact, exact_plateau, exact_losses = run(ops.fit_linear_head_default_, *wide, settings)
    for one_result, one_own, one_exact in zip(result, own, exact, strict=True):
        assert_as_good(one_result, one_own, one_exact, slack=16.0)
    assert losses.dtype == own_losses.dtype
    torch.testing.assert_close(losses, exact_losses, rtol=3e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(result_plateau, exact_plateau, rtol=3e-6, atol=0)


@pytest.mark.parametrize("batch_size", [1, 16, 17, 40, 1000])
def test_batch_sizes(batch_size):
    samples = 9 if batch_size == 1 else 40
    check(problem(samples), SETTINGS | {"batch_size": batch_size})


@pytest.mark.parametrize(("heads", "classes", "width"), [(1, 1, 1), (3, 2, 7), (1, 17, 70), (1, 10, 130)])
def test_shapes(heads, classes, width):
    check(problem(33, heads, classes, width, epochs=1), SETTINGS)


def test_rows_beyond_one_block():
    check(problem(150, 1, 3, 5, epochs=1), SETTINGS | {"batch_size": 140})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_features(dtype):
    check(problem(dtype=dtype), SETTINGS)


@pytest.mark.parametrize("patience", [0, 1])
def test_plateau_ends_the_fit(patience):
    arguments = problem(20, 1, 2, 3, epochs=6)
    settings = SETTINGS | {"threshold": 0.5, "patience": patience}
    check(arguments, settings)
    _, plateau, losses = run(fit_linear_head_, *arguments, settings)
    assert plateau[2] == 1
    assert losses[-1].isnan()


def test_a_plateau_that_was_reached_before_does_not_stop_a_new_fit():
    state, plateau, *rest = problem(20, 1, 2, 3, epochs=2)
    plateau[0], plateau[1], plateau[2] = 5.0, 1.0, 1.0
    check((state, plateau, *rest), SETTINGS)


def test_nothing_to_do():
    state, plateau, features, labels, order = problem()
    result, _, losses = run(fit_linear_head_, state, plateau, features, labels, order[:0], SETTINGS)
    assert losses.shape == (0,)
    assert all(torch.equal(one, other) for one, other in zip(result, state, strict=True))


def test_strided_features():
    state, plateau, features, labels, order = problem(epochs=1)
    padded = torch.full((40, 13), torch.nan, device=DEVICE)
    padded[:, :10] = features
    expected, _, _ = run(fit_linear_head_, state, plateau, features, labels, order, SETTINGS)
    for other in (padded[:, :10], features.T.contiguous().T):
        result, _, _ = run(fit_linear_head_, state, plateau, other, labels, order, SETTINGS)
        assert torch.equal(result[0], expected[0])


def test_wrong_inputs_are_refused():
    state, plateau, features, labels, order = problem()
    with pytest.raises(TypeError, match="float64"):
        run(fit_linear_head_, state, plateau, features.double(), labels, order, SETTINGS)
    with pytest.raises(TypeError, match="weight must be contiguous float32"):
        run(fit_linear_head_, [state[0].double(), *state[1:]], plateau, features, labels, order, SETTINGS)
    with pytest.raises(ValueError, match="labels"):
        run(fit_linear_head_, state, plateau, features, labels[:, :1], order, SETTINGS)
