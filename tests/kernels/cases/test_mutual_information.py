"""Mutual information and its gradient against double precision."""

import pytest
import torch
from ffw_fast.kernels.mutual_information import MAX_CLASSES, mutual_information, mutual_information_backward

from ffw_fast import ops

from .common import DEVICE, assert_as_good, normal

SHAPES = [
    (1, 1, 2),
    (7, 1, 10),
    (64, 2, 10),
    (100, 3, 2),
    (130, 1, 16),
    (33, 2, 17),
]  # samples, heads, classes

pytestmark = pytest.mark.usefixtures("poisoned")


def batch(samples, heads, classes, dtype=torch.float32, spread=2.0):
    source = torch.Generator().manual_seed(samples)
    labels = torch.randint(classes, (samples, heads), generator=source).to(DEVICE)
    logits = spread * normal(samples, heads, classes)
    logits += spread * torch.nn.functional.one_hot(labels, classes)
    return logits.to(dtype), labels


def check(logits, labels):
    result, joint = mutual_information(logits, labels)
    own, own_joint = ops.mutual_information_default(logits, labels)
    exact, exact_joint = ops.mutual_information_default(logits.double(), labels)
    unit = torch.finfo(torch.float32).eps
    assert_as_good(joint, own_joint, exact_joint)
    assert (result.double() - exact).abs().max() <= 2 * (own.double() - exact).abs().max() + 8 * unit
    grad = normal(labels.shape[1], seed=9)
    result = mutual_information_backward(grad, logits, labels, own_joint)
    own = ops.mutual_information_backward_default(grad, logits, labels, own_joint)
    exact = ops.mutual_information_backward_default(grad.double(), logits.double(), labels, own_joint.double())
    assert_as_good(result, own, exact, slack=16.0)
    assert result.stride() == own.stride()


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    check(*batch(*shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(dtype):
    check(*batch(70, 2, 10, dtype))


@pytest.mark.parametrize("spread", [0.0, 1e-3, 30.0, 1000.0])
def test_independent_and_certain_predictions(spread):
    check(*batch(50, 1, 5, spread=spread))


def test_classes_that_never_occur():
    logits, labels = batch(40, 1, 10, spread=60.0)
    check(logits, labels.clamp_max(3))


def test_strides():
    logits, labels = batch(20, 2, 6)
    check(logits.transpose(0, 1).contiguous().transpose(0, 1), labels.T.contiguous().T)


def test_nan_passes_through():
    logits, labels = batch(20, 2, 6)
    logits[3, 0, 1] = torch.nan
    result, _ = mutual_information(logits, labels)
    assert result[0].isnan()
    assert result[1].isfinite()


@pytest.mark.slow
def test_many_classes():
    check(*batch(50, 1, MAX_CLASSES))


def test_wrong_inputs_are_refused():
    logits, labels = batch(4, 2, 3)
    with pytest.raises(ValueError, match="classes"):
        mutual_information(normal(4, 2, MAX_CLASSES + 1), labels)
    with pytest.raises(ValueError, match="samples"):
        mutual_information(logits[:0], labels[:0])
    with pytest.raises(ValueError, match="expected logits"):
        mutual_information(logits, labels[:3])
    with pytest.raises(TypeError, match="float64"):
        mutual_information(logits.double(), labels)
