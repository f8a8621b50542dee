"""Grids as they are typed on the command line."""

import argparse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffw_fast.sweep.grid import accept_grids, combinations, parse_values


@given(st.integers(-50, 50), st.integers(0, 20), st.lists(st.integers(100, 200), unique=True, max_size=4))
def test_ranges_and_lists_of_whole_numbers(first, length, more):
    text = ",".join([f"{first}..{first + length}", *map(str, more)])
    assert parse_values(text, int).parsed == (*range(first, first + length + 1), *more)


def test_one_value_is_a_list_of_one():
    assert parse_values("1e-4", float).parsed == (1e-4,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is no int"),
        ("1,", "'' is no int"),
        ("1,x", "'x' is no int"),
        ("3..1", "3..1 is empty"),
        ("1..3,2", "2 is there twice"),
        ("1.5", "'1.5' is no int"),
    ],
)
def test_bad_values_are_named(text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        parse_values(text, int)


def test_the_same_number_in_two_spellings_is_there_twice():
    with pytest.raises(argparse.ArgumentTypeError, match="twice"):
        parse_values("1,1.0", float)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(exit_on_error=False)
    made.add_argument("--out", default="here")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--rate", type=float, default=0.5)
    made.add_argument("--kind", choices=("soft", "hard"), default="soft")
    made.add_argument("--fold", action=argparse.BooleanOptionalAction)
    made.add_argument("--trace", action="store_true")
    return made


def grid_of(*arguments: str) -> list[tuple[dict, list[str]]]:
    made = parser()
    accept_grids(made, single=("out",))
    return list(combinations(made, made.parse_args(arguments), left_out=("out",)))


def test_every_combination_is_a_command_line_of_its_own():
    found = grid_of("--seed", "1,2", "--rate", "1,2", "--no-fold", "--trace", "--out", "x")
    assert [varied for varied, _ in found] == [{"rate": r, "seed": s} for r in (1.0, 2.0) for s in (1, 2)]
    for varied, arguments in found:
        read = parser().parse_args(arguments)
        assert (read.seed, read.rate, read.kind) == (varied["seed"], varied["rate"], "soft")
        assert (read.fold, read.trace, read.out) == (False, True, "here")


def test_what_has_one_value_does_not_vary():
    ((varied, arguments),) = grid_of("--kind", "hard")
    assert varied == {}
    assert parser().parse_args(arguments).kind == "hard"


def test_choices_hold_for_every_value():
    with pytest.raises(argparse.ArgumentError, match="'warm' is not one of soft, hard"):
        grid_of("--kind", "soft,warm")
