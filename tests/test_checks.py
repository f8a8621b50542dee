"""Checks of numbers: what passes, and what an error says."""

import numpy as np
import pytest

from ffw_fast.checks import check_integer, check_number, check_probability, check_seed

NO_NUMBERS = (True, "3", None, [1])


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), *NO_NUMBERS])
def test_no_probability(value):
    with pytest.raises(ValueError, match="rho must be a probability from 0 to 1, got"):
        check_probability("rho", value)


@pytest.mark.parametrize("value", [0, 11, 2.0, np.float64(2), *NO_NUMBERS])
def test_no_integer_in_the_range(value):
    with pytest.raises(ValueError, match="size must be a whole number from 1 to 10, got"):
        check_integer("size", value, 1, 10)
    if value != 11:
        with pytest.raises(ValueError, match="size must be a whole number of at least 1, got"):
            check_integer("size", value, 1)


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), *NO_NUMBERS])
def test_no_number_of_at_least_zero(value):
    with pytest.raises(ValueError, match="gamma must be a non-negative finite number, got"):
        check_number("gamma", value, positive=False)
    with pytest.raises(ValueError, match="rate must be a positive finite number, got"):
        check_number("rate", value, positive=True)


def test_what_passes():
    for probability in (0, 0.3, 1, np.float64(0.5)):
        check_probability("rho", probability)
    check_integer("size", 1, 1, 1)
    check_number("gamma", 0, positive=False)
    check_number("rate", 1e-300, positive=True)
    check_seed(2**63 - 1)
    with pytest.raises(ValueError, match="rate must be a positive finite number, got 0"):
        check_number("rate", 0, positive=True)
