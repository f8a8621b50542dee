"""The appendix's equations against brute force: sums over joint distributions, and samples drawn from the model."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ffw_fast import theory

probability = st.floats(0, 1)
classes = st.integers(2, 12)


@given(probability, classes)
def test_equation_11_is_the_information_of_bias_and_target(rho, n):
    joint = theory.bias_target_joint(rho, n)
    assert math.isclose(joint.sum().item(), 1)
    assert math.isclose(theory.bias_target_information(rho, n), theory.information(joint), abs_tol=1e-9)


@given(probability, probability, classes, probability)
def test_the_marginals_and_informations_follow_from_the_joint(rho, phi, n, epsilon):
    joint = theory.joint(rho, phi, n, epsilon)
    assert math.isclose(joint.sum().item(), 1)
    torch.testing.assert_close(joint.sum(2), theory.bias_target_joint(rho, n))
    for index, marginal, info in (
        (1, theory.bias_output_joint, theory.bias_output_information),
        (0, theory.target_output_joint, theory.target_output_information),
    ):
        torch.testing.assert_close(joint.sum(index), marginal(rho, phi, n, epsilon))
        assert math.isclose(info(rho, phi, n, epsilon), theory.information(joint.sum(index)), abs_tol=1e-9)
    expected = theory.information(theory.joint(rho, phi, n).sum(1)) / math.log2(n)
    assert math.isclose(theory.normalized_bias_output_information(rho, phi, n), expected, abs_tol=1e-9)


@given(probability, probability, classes, probability)
def test_where_the_printed_joint_does_not_hold(rho, phi, n, k):
    printed = theory.joint(rho, phi, n, task_bias=k)
    bracket = (1 - phi) * (1 - k) + phi * k
    assert math.isclose(printed.sum().item(), rho + (1 - rho) * bracket, abs_tol=1e-12)
    diagonal = printed.sum(1).diagonal()  # of bias and output
    torch.testing.assert_close(diagonal, torch.full((n,), (rho + phi * (1 - rho) * k) / n, dtype=torch.float64))


def test_the_ends_of_the_curve():
    assert theory.normalized_bias_output_information(0.1, 0.0, 10) == pytest.approx(0)
    assert theory.normalized_bias_output_information(0.1, 1.0, 10) == pytest.approx(1)
    assert theory.target_output_information(1.0, 0.3, 8) == pytest.approx(3)


def test_biasedness_and_information_are_found_again_in_samples_of_the_model():
    n, rho, phi, count = 5, 0.3, 0.4, 200_000
    joint = theory.joint(rho, phi, n, epsilon=0.1)
    source = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(joint.flatten(), count, replacement=True, generator=source)
    b, y, output = drawn // n**2, drawn // n % n, drawn % n
    assert theory.biasedness(output, y, b) == pytest.approx(phi, abs=0.01)
    expected = theory.bias_output_information(rho, phi, n, 0.1) / math.log2(n)
    assert theory.label_information(b, output, n) == pytest.approx(expected, abs=0.01)


def test_no_conflicting_sample_leaves_biasedness_open():
    labels = torch.tensor([0, 1, 2])
    assert math.isnan(theory.biasedness(labels, labels, labels))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="rho must be a probability from 0 to 1"):
        theory.bias_target_information(1.5, 10)
    with pytest.raises(ValueError, match="classes must be a whole number of at least 2, got 1"):
        theory.joint(0.5, 0.5, 1)
    with pytest.raises(ValueError, match="phi must be"):
        theory.bias_output_information(0.5, math.nan, 10)
    with pytest.raises(ValueError, match=r"shape \(n,\), got \(3,\), \(3,\), \(2,\)"):
        theory.biasedness(torch.zeros(3), torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="sum to 1"):
        theory.information(torch.ones(2, 2))
