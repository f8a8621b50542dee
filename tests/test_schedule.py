"""Plateaus and temperature schedules against sequences worked out by hand."""

import math
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffw_fast.gates import GateKind
from ffw_fast.plateau import Plateau
from ffw_fast.schedule import AdaptiveSchedule, PublishedSchedule, judging_shift, make_schedule, restore_schedule

# plateau -------------------------------------------------------------------------------------------------------------


def test_plateau_by_hand():
    """Improvement is at least 10%, two failures in a row are borne; 0.9 of the best counts, a little more does not."""
    rule = Plateau(threshold=0.1, patience=2)
    values = [10.0, 9.5, 9.01, 9.0, 8.5, 8.2, 8.11, 7.0, 7.0, 7.0, 7.0]
    reached = [False, False, False, False, False, False, True, False, False, False, True]
    assert [rule.reached(value) for value in values] == reached
    assert (rule.best, rule.failures) == (7.0, 3)


def test_slow_improvement_is_measured_from_the_best_and_not_from_the_last():
    rule = Plateau(threshold=0.1, patience=5)
    assert [rule.reached(value) for value in (100, 96, 92, 88, 84, 80)] == [False] * 6
    assert (rule.best, rule.failures) == (88, 2)


def test_not_a_number_is_no_improvement():
    rule = Plateau(threshold=0.1, patience=1)
    assert [rule.reached(value) for value in (math.nan, math.nan, 1.0, math.nan, math.nan)] == [
        False,
        True,
        False,
        False,
        True,
    ]


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 0.5), st.integers(0, 6))
def test_plateau_is_the_rule_in_words(values, threshold, patience):
    rule = Plateau(threshold, patience)
    best, failures = math.inf, 0
    for value in values:
        if value <= best * (1 - threshold):
            best, failures = value, 0
        else:
            failures += 1
        assert rule.reached(value) == (failures > patience)


# published -----------------------------------------------------------------------------------------------------------


def test_published_schedule_by_hand():
    """MI falls by 5% or more for three epochs, then stays: every six failures in a row cut T."""
    schedule = make_schedule("published", 1e-4, 1e-3)
    temperature, temperatures, judged = 1.0, [], []
    for mi in [0.8, 0.76, 0.7, *[0.67] * 12, 0.6, *[0.59] * 5]:
        temperature, due = schedule.after_epoch(temperature, mi)
        temperatures.append(temperature)
        judged.append(due)
    assert temperatures == [*[1.0] * 8, *[0.1] * 6, *[pytest.approx(0.01)] * 7]
    assert [epoch for epoch, due in enumerate(judged) if due] == [8, 14]
    assert not schedule.anneals


def test_the_published_run_ends_below_1e_8_after_nine_cuts():
    schedule, temperature, cuts = PublishedSchedule(), 1.0, 0
    for _ in range(200):
        if schedule.has_ended(temperature):
            break
        lower, due = schedule.after_epoch(temperature, 0.5)
        cuts += due
        temperature = lower
    assert cuts == 9
    assert temperature == pytest.approx(1e-9)
    assert not schedule.has_ended(1e-8)
    assert not schedule.has_ended(1e-8 * (1 - 1e-6))  # what eight float32 divisions may leave
    assert schedule.has_ended(0.99e-8)


# halving -------------------------------------------------------------------------------------------------------------


def test_the_halving_schedule_takes_a_hundred_epochs():
    schedule, temperature, epochs = make_schedule("halving", 1e-4, 1e-3), 1.0, 0
    assert not schedule.anneals
    while not schedule.has_ended(temperature):
        epochs += 1
        lower, falls = schedule.after_epoch(temperature, 0.5)
        assert falls == (epochs % 10 == 0)
        assert lower == (temperature / 2 if falls else temperature)
        temperature = lower
    assert epochs == 100
    assert temperature == 2**-10


# adaptive ------------------------------------------------------------------------------------------------------------


def test_the_adaptive_schedule_judges_once_a_decade_and_at_the_end():
    schedule = make_schedule("adaptive", 1e-4, 1e-3)
    assert schedule.anneals
    temperatures = [0.9, 0.2, 0.1, 0.05, 0.011, 0.0099, 0.002, 0.0005, 1.1e-5, 0.9e-5]
    judged = [schedule.after_epoch(temperature, 0.3) for temperature in temperatures]
    assert [temperature for temperature, _ in judged] == temperatures
    assert [due for _, due in judged] == [False, False, True, False, False, True, False, True, True, True]
    assert not schedule.has_ended(1.1e-5)
    assert schedule.has_ended(0.99e-5)


# state and judging ---------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), max_size=30), st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_a_restored_schedule_goes_on_as_the_saved_one(before, after):
    for name in ("published", "adaptive", "halving"):
        schedule = make_schedule(name, 1e-4, 1e-3)
        for value in before:
            schedule.after_epoch(value, value)
        restored = restore_schedule(make_schedule(name, 1e-4, 1e-3), asdict(schedule))
        assert restored == schedule
        for value in after:
            assert restored.after_epoch(value, value) == schedule.after_epoch(value, value)


@pytest.mark.parametrize("temperature", [1.0, 0.034, 1e-5])
def test_annealed_ffw_gates_are_judged_where_they_are_one_half(temperature):
    shift = judging_shift(GateKind.FFW, temperature, anneals=True)
    assert 2 / (1 + math.exp(shift / temperature)) == pytest.approx(0.5)
    assert judging_shift(GateKind.FFW, temperature, anneals=False) == 0
    assert judging_shift(GateKind.BERNOULLI, temperature, anneals=True) == 0
    assert AdaptiveSchedule(1e-4, 1e-3).anneals
