"""Temperature schedules, all of them: when T falls, how far, and when a run ends."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from ffw_fast.gates import GateKind
from ffw_fast.plateau import Plateau

MI_THRESHOLD = 0.05
MI_PATIENCE = 5
COOLING = 10.0
ROUNDING = 1e-3  # eight tenfold falls in float32 end a rounding below 1e-8, which does not count as below
FINAL_TEMPERATURE = 1e-8
LARGEST_FALL = 0.02  # of ln T in one step of the adaptive schedule
STEPS_OF_SCORES = 20  # the adaptive schedule scales lr down from T = 20 lr on ...
LAST_STEPS = 0.01  # ... and ends at T = lr / 100
EPOCHS_A_HALVING = 10
LAST_HALF = 1e-3


class Schedule(Protocol):
    """What the loop asks of a temperature schedule.

    Attributes:
        anneals: whether T also falls within an epoch, by what the gates feel (``falls_by``).
        last_temperature: the T to which it falls, where the run ends.
    """

    anneals: bool
    __dataclass_fields__: ClassVar[dict[str, Any]]  # it is a dataclass: a checkpoint holds its fields

    @property
    def last_temperature(self) -> float: ...

    def after_epoch(self, temperature: float, validation_mi: float) -> tuple[float, bool]:
        """Temperature of the next epoch, and whether the pruned network is due to be judged now."""
        ...

    def has_ended(self, temperature: float) -> bool:
        """Whether the run ends at this temperature."""
        ...


@dataclass
class PublishedSchedule:
    """T falls tenfold when the validation MI has not improved by 5% for more than 5 epochs; ends at T < 1e-8."""

    plateau: Plateau = field(default_factory=lambda: Plateau(MI_THRESHOLD, MI_PATIENCE))
    anneals: bool = False

    @property
    def last_temperature(self) -> float:
        return FINAL_TEMPERATURE

    def after_epoch(self, temperature: float, validation_mi: float) -> tuple[float, bool]:
        if not self.plateau.reached(validation_mi):
            return temperature, False
        self.plateau.failures = 0
        return temperature / COOLING, True

    def has_ended(self, temperature: float) -> bool:
        return temperature < self.last_temperature * (1 - ROUNDING)


@dataclass
class AdaptiveSchedule:
    """T falls in every step so far that the mean gate moves by at most ``anneal_rate`` through it.

    ``ln T <- ln T - min(anneal_rate / a, 0.02)`` with ``a`` the mean of ``|dg / d ln T|`` over the gates of the step's
    forward pass. The scores' learning rate is ``lr min(1, T / (20 lr))``, since below that every step would flip gates
    at random; the run ends at ``T < lr / 100``. The pruned network is judged once per tenfold fall.
    """

    anneal_rate: float
    lr: float
    judged_at: float = 1.0
    anneals: bool = True

    @property
    def last_temperature(self) -> float:
        return LAST_STEPS * self.lr

    def after_epoch(self, temperature: float, validation_mi: float) -> tuple[float, bool]:
        due = temperature <= self.judged_at / COOLING or self.has_ended(temperature)
        if due:
            self.judged_at = temperature
        return temperature, due

    def has_ended(self, temperature: float) -> bool:
        return temperature < self.last_temperature


@dataclass
class HalvingSchedule:
    """BISE's: T halves every 10 epochs, from 1 until it is at most 1e-3: 100 epochs."""

    epochs: int = 0
    anneals: bool = False

    @property
    def last_temperature(self) -> float:
        return LAST_HALF

    def after_epoch(self, temperature: float, validation_mi: float) -> tuple[float, bool]:
        self.epochs += 1
        falls = self.epochs % EPOCHS_A_HALVING == 0
        return (temperature / 2 if falls else temperature), falls

    def has_ended(self, temperature: float) -> bool:
        return temperature <= self.last_temperature


SCHEDULES = ("published", "adaptive", "halving")


def make_schedule(name: str, anneal_rate: float, lr: float) -> PublishedSchedule | AdaptiveSchedule | HalvingSchedule:
    """The schedule of that name, one of ``SCHEDULES``; ``lr`` is the scores'."""
    if name == "halving":
        return HalvingSchedule()
    return PublishedSchedule() if name == "published" else AdaptiveSchedule(anneal_rate, lr)


def restore_schedule(schedule: Schedule, record: dict[str, Any]) -> Schedule:
    """A schedule of the same kind in the state that ``dataclasses.asdict`` gave."""
    if "plateau" in record:
        record = {**record, "plateau": Plateau(**record["plateau"])}
    return type(schedule)(**record)


def judging_shift(kind: GateKind, temperature: float, anneals: bool) -> float:
    """What is added to the scores so that "keep where m >= 0" prunes where the gate is below one half.

    While an annealed T is high, the network pruned at one half is the one near to the gated network, since the gate of
    ``ffw`` is almost 1 just below ``m = 0`` and 1/2 at ``m = -T ln 3``. The gates of the other kinds are 1/2 at 0.
    """
    return temperature * math.log(3) if anneals and kind is GateKind.FFW else 0.0
