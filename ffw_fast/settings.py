"""Everything that a run is asked for, checked before any work is done."""

import math
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Self

import numpy as np

from ffw_fast.checks import check_integer, check_number, check_seed, is_number
from ffw_fast.gates import GateKind, check_granularity, gate_kind
from ffw_fast.precision import check_precision
from ffw_fast.schedule import SCHEDULES

METHODS: dict[str, dict[str, Any]] = {  # and the defaults in which each differs from those of ``Settings``
    "ffw": {},
    "bise": {"gamma": 1.0, "gate": "hard", "granularity": "channel", "schedule": "halving"},
}


@dataclass(frozen=True)
class Settings:
    """The arguments of ``ffw_fast.extract`` that decide its result; see there."""

    bottleneck: str
    num_bias_classes: int
    method: str = "ffw"
    gamma: float = 10.0
    alpha: float = 1.0
    gate: str = "ffw"
    granularity: str = "weight"
    schedule: str = "published"
    anneal_rate: float = 1e-4
    max_epochs: int = 200
    batch_size: int = 100
    seed: int = 0
    precision: str = "fp32"
    where: str | None = None
    correlations: tuple[float, ...] | None = None
    aligned: tuple[int, ...] | None = None
    cache_augmented: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _plain(getattr(self, field.name)))
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}; known methods: {', '.join(METHODS)}")
        check_precision(self.precision)
        gate_kind(self.gate)
        check_granularity(self.granularity)
        if not isinstance(self.bottleneck, str):
            raise TypeError(f"bottleneck must be the name of a module, got {type(self.bottleneck).__name__}")
        for name in ("gamma", "alpha"):
            check_number(name, getattr(self, name), positive=False)
        check_number("anneal_rate", self.anneal_rate, positive=True)
        for name, least in (("num_bias_classes", 2), ("max_epochs", 1), ("batch_size", 1)):
            check_integer(name, getattr(self, name), least)
        check_seed(self.seed)
        if not isinstance(self.cache_augmented, bool):
            raise TypeError(f"cache_augmented must be True or False, got {self.cache_augmented!r}")
        self._check_bise()
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}; known schedules: {', '.join(SCHEDULES)}")
        if self.where is not None and (not isinstance(self.where, str) or self.granularity != "channel"):
            raise ValueError(
                f"where must be patterns of layer names, separated by commas, beside granularity 'channel', "
                f"got {self.where!r} and granularity {self.granularity!r}"
            )
        if self.schedule == "adaptive" and self.kind is GateKind.HARD:
            raise ValueError("schedule 'adaptive' follows how gates move with T; the forward of gate 'hard' has no T")

    @property
    def kind(self) -> GateKind:
        return gate_kind(self.gate)

    def steps_of(self, samples: int) -> int:
        """How many steps an epoch of so many samples has."""
        return math.ceil(samples / self.batch_size)

    def as_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def of(cls, **given: Any) -> Self:
        """Settings in which gamma, gate, granularity and schedule are the method's own where None or absent.

        Raises:
            TypeError: an argument that ``ffw_fast.extract`` does not have.
        """
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in given if name not in known]:
            raise TypeError(f"unknown argument {unknown[0]!r}; those of extract are: {', '.join(known)}")
        defaults = METHODS["bise"].keys()
        chosen = {name: value for name, value in given.items() if name not in defaults or value is not None}
        return cls(**{**METHODS.get(str(given.get("method")), {}), **chosen})

    def _check_bise(self) -> None:
        """Of what BISE alone reads."""
        for name in ("correlations", "aligned"):
            value = getattr(self, name)
            if value is None:
                continue
            if self.method != "bise":
                raise ValueError(f"{name} goes with method 'bise', not with {self.method!r}")
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise TypeError(f"{name} must be a list of numbers, got {type(value).__name__}")
            object.__setattr__(self, name, tuple(map(_plain, value)))
        for rho in self.correlations or ():
            if not is_number(rho) or not 0 < rho < 1:
                raise ValueError(f"correlations must lie between 0 and 1, both excluded, got {rho!r}")
        for label in self.aligned or ():
            check_integer("aligned: a bias label", label, 0)
        if self.method == "bise" and self.schedule != "halving":
            raise ValueError(f"method 'bise' goes with schedule 'halving', got {self.schedule!r}")


def _plain(value: Any) -> Any:
    """Python's own number for one of numpy's, which JSON cannot hold."""
    return value.item() if isinstance(value, np.generic) else value


DEFAULTS = {field.name: field.default for field in fields(Settings) if field.default is not MISSING}
