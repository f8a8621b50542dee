"""Mutual information and the objective against their formulas, written out."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ffw_fast.heads import PrivateHeads
from ffw_fast.objective import mutual_information, objective


def plain_information(logits, labels, classes):
    """The formula, term by term, differentiable."""
    probabilities = torch.softmax(logits, dim=1)
    joint = torch.stack([probabilities[labels == label].sum(0) for label in range(classes)])
    joint = joint.clamp_min(1e-15) / len(labels)
    total = logits.new_zeros(())
    for label in range(classes):
        for prediction in range(classes):
            independent = (joint[label].sum() * joint[:, prediction].sum()).clamp_min(1e-15)
            total = total + joint[label, prediction] * torch.log(joint[label, prediction] / independent)
    return total / math.log(classes)


@given(st.integers(1, 60), st.integers(2, 7), st.floats(0, 20), st.integers(0, 10**6))
def test_value_and_gradient_are_those_of_the_formula(count, classes, spread, seed):
    source = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(count, classes, generator=source, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(classes, (count,), generator=source)
    given, expected = mutual_information(logits, labels, classes), plain_information(logits, labels, classes)
    torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (given, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-12)


def test_gradient_by_finite_differences():
    logits = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(12) % 4
    assert torch.autograd.gradcheck(lambda logits: mutual_information(logits, labels, 4), logits)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_extremes(classes):
    labels = torch.arange(20 * classes) % classes
    certain = 100.0 * torch.nn.functional.one_hot(labels, classes)
    assert mutual_information(certain, labels, classes).item() == pytest.approx(1, abs=1e-5)
    wrong_but_certain = certain.roll(1, dims=1)
    assert mutual_information(wrong_but_certain, labels, classes).item() == pytest.approx(1, abs=1e-5)
    independent = torch.randn(1, classes).expand(len(labels), classes)
    assert mutual_information(independent, labels, classes).item() == pytest.approx(0, abs=1e-6)
    one_label = torch.zeros_like(labels)
    assert mutual_information(certain, one_label, classes).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_computed_in_32(dtype):
    labels = torch.arange(300) % 3
    logits = torch.randn(300, 3).to(dtype).requires_grad_()
    given = mutual_information(logits, labels, 3)
    assert given.dtype == torch.float32
    torch.testing.assert_close(given.double(), plain_information(logits.double(), labels, 3), rtol=1e-4, atol=1e-6)
    given.backward()
    assert logits.grad.dtype == dtype


def test_compile_whole():
    torch._dynamo.reset()
    logits, labels = torch.randn(30, 3, requires_grad=True), torch.arange(30) % 3
    compiled = torch.compile(lambda logits: mutual_information(logits, labels, 3), fullgraph=True, backend="aot_eager")
    given, expected = compiled(logits), mutual_information(logits, labels, 3)
    torch.testing.assert_close(given, expected)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (given, expected)]
    torch.testing.assert_close(*gradients)
    torch._dynamo.reset()


LOGITS, LABELS = torch.zeros(6, 3), torch.arange(6) % 3


@pytest.mark.parametrize(
    ("logits", "labels", "classes", "message"),
    [
        (LOGITS[:0], LABELS[:0], 3, "empty batch"),
        (LOGITS, LABELS, 1, "num_classes must be at least 2, got 1"),
        (LOGITS, LABELS, 4, r"logits must be floating point of shape \(n, 4\), got torch.float32 \(6, 3\)"),
        (LOGITS[0], LABELS, 3, r"logits must be .* got torch.float32 \(3,\)"),
        (LOGITS.long(), LABELS, 3, r"logits must be .* got torch.int64 \(6, 3\)"),
        (LOGITS, LABELS[:5], 3, r"labels must be int64 of shape \(6,\), got torch.int64 \(5,\)"),
        (LOGITS, LABELS[:, None], 3, r"labels must be int64 of shape \(6,\), got torch.int64 \(6, 1\)"),
        (LOGITS, LABELS.int(), 3, r"labels must be int64 of shape \(6,\), got torch.int32 \(6,\)"),
        (LOGITS, LABELS.float(), 3, "labels must be int64"),
        (LOGITS, LABELS + 1, 3, r"labels must be in \[0, 3\), got 1 to 3"),
        (LOGITS, LABELS - 1, 3, r"labels must be in \[0, 3\), got -1 to 1"),
    ],
)
def test_bad_arguments(logits, labels, classes, message):
    with pytest.raises(ValueError, match=message):
        mutual_information(logits, labels, classes)


@pytest.mark.parametrize(("alpha", "gamma"), [(1.0, 10.0), (0.5, 0.0), (0.0, 2.0)])
def test_objective(alpha, gamma):
    source = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(20, 4, generator=source), torch.randint(4, (20,), generator=source)
    head_logits, biases = torch.randn(20, 2, 3, generator=source), torch.randint(3, (20, 2), generator=source)
    total, cross_entropy, information = objective(logits, labels, head_logits, biases, alpha, gamma).losses
    each = [plain_information(head_logits[:, index].double(), biases[:, index], 3) for index in (0, 1)]
    picked = torch.log_softmax(logits.double(), 1).gather(1, labels[:, None])
    assert cross_entropy.item() == pytest.approx(-picked.mean().item(), rel=1e-5)
    assert information.item() == pytest.approx(sum(each).item() / 2, rel=1e-4)
    assert total.item() == pytest.approx(alpha * cross_entropy.item() + gamma * information.item(), rel=1e-5)


def test_gradients_reach_the_features_and_never_the_heads():
    heads = PrivateHeads.create(2, 3, 5, seed=0, batch_size=4, device=torch.device("cpu"))
    features, logits = torch.randn(8, 5, requires_grad=True), torch.randn(8, 3, requires_grad=True)
    biases, labels = torch.randint(3, (8, 2)), torch.randint(3, (8,))
    objective(logits, labels, heads.logits(features), biases, 0.5, 10.0).backward(logits, features, heads)
    assert not heads.weight.requires_grad
    information = [mutual_information(heads.logits(features)[:, index], biases[:, index], 3) for index in (0, 1)]
    plain = 0.5 * torch.nn.functional.cross_entropy(logits, labels) + 10 * sum(information) / 2
    expected = torch.autograd.grad(plain, (logits, features))
    torch.testing.assert_close((logits.grad, features.grad), expected, rtol=1e-4, atol=1e-6)


def test_what_depends_on_no_gate_gets_no_gradient():
    heads = PrivateHeads.create(1, 3, 5, seed=0, batch_size=4, device=torch.device("cpu"))
    features, logits = torch.randn(8, 5), torch.randn(8, 3, requires_grad=True)
    biases, labels = torch.randint(3, (8, 1)), torch.randint(3, (8,))
    objective(logits, labels, heads.logits(features), biases, 1.0, 1.0).backward(logits, features, heads)
    assert logits.grad is not None and features.grad is None
    with pytest.raises(ValueError, match="neither logits nor features depend on what is trained"):
        objective(logits, labels, heads.logits(features), biases, 1.0, 1.0).backward(logits.detach(), features, heads)
