"""Everything that a run is asked for, checked before any work is done."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ffw_fast.gates import GateKind, gate_kind
from ffw_fast.modules import check_granularity, check_seed
from ffw_fast.schedule import SCHEDULES

METHODS = ("ffw",)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


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

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}; known methods: {', '.join(METHODS)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"unknown precision {self.precision!r}; known precisions: {', '.join(PRECISIONS)}")
        gate_kind(self.gate)
        check_granularity(self.granularity)
        if not isinstance(self.bottleneck, str):
            raise TypeError(f"bottleneck must be the name of a module, got {type(self.bottleneck).__name__}")
        for name in ("gamma", "alpha"):
            _check_number(name, getattr(self, name), positive=False)
        _check_number("anneal_rate", self.anneal_rate, positive=True)
        for name, least in (("num_bias_classes", 2), ("max_epochs", 1), ("batch_size", 1)):
            _check_integer(name, getattr(self, name), least)
        check_seed(self.seed)
        if self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}; known schedules: {', '.join(SCHEDULES)}")
        if self.schedule == "adaptive" and self.kind is GateKind.HARD:
            raise ValueError("schedule 'adaptive' follows how gates move with T; the forward of gate 'hard' has no T")

    @property
    def kind(self) -> GateKind:
        return gate_kind(self.gate)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _check_number(name: str, value: Any, positive: bool) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (positive and value == 0):
        raise ValueError(f"{name} must be a {'positive' if positive else 'non-negative'} finite number, got {value!r}")


def _check_integer(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
