"""What numbers must be; errors say what was expected and what was given."""

import math
from typing import Any


def check_integer(name: str, value: Any, least: int, most: int | None = None) -> None:
    """``ValueError`` unless the value is a whole number of at least ``least``, and at most ``most``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        expected = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be a whole number {expected}, got {value!r}")


def check_number(name: str, value: Any, positive: bool) -> None:
    """``ValueError`` unless the value is a finite number, above 0 or at least not below."""
    if not is_number(value) or not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name} must be a {'positive' if positive else 'non-negative'} finite number, got {value!r}")


def check_probability(name: str, value: Any) -> None:
    """``ValueError`` unless the value lies in [0, 1]."""
    if not is_number(value) or not 0 <= value <= 1:  # a NaN fails the comparison
        raise ValueError(f"{name} must be a probability from 0 to 1, got {value!r}")


def check_seed(seed: Any) -> None:
    """``ValueError`` for what is no seed: random gates keep it in 64 bits."""
    check_integer("seed", seed, 0, 2**63 - 1)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
