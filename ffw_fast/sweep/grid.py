"""Grids of settings as one types them: every option of ``ffw-fast run`` with several values, and their combinations."""

import argparse
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")


@dataclass(frozen=True)
class Values:
    """The values of one option: as typed, for other command lines, and parsed."""

    texts: tuple[str, ...]
    parsed: tuple[Any, ...] = field(compare=False)


def parse_values(text: str, kind: Callable[[str], Any], choices: Any = None) -> Values:
    """``1,3,10``, or ``0..9`` for all whole numbers from 0 to 9, or both: ``0..3,7``.

    Raises:
        argparse.ArgumentTypeError: a part that is no value of the option, or that is there twice.
    """
    texts: list[str] = []
    for part in text.split(","):
        if bounds := RANGE.fullmatch(part.strip()):
            first, last = map(int, bounds.groups())
            if last < first:
                raise argparse.ArgumentTypeError(f"the range {part} is empty; it goes from low to high")
            texts += map(str, range(first, last + 1))
        else:
            texts.append(part.strip())
    parsed = [_parse(value, kind, choices) for value in texts]
    if twice := [value for value in texts if parsed.count(_parse(value, kind, choices)) > 1]:
        raise argparse.ArgumentTypeError(f"{twice[0]} is there twice in {text}")
    return Values(tuple(texts), tuple(parsed))


def _parse(text: str, kind: Callable[[str], Any], choices: Any) -> Any:
    try:
        value = kind(text)
    except (ValueError, TypeError) as error:
        expected = getattr(kind, "__name__", "value")
        raise argparse.ArgumentTypeError(f"{text!r} is no {expected}; give values as in 1,3,10 or 0..9") from error
    if choices is not None and value not in choices:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(map(str, choices))}")
    return value


def accept_grids(parser: argparse.ArgumentParser, single: tuple[str, ...]) -> None:
    """Let every option that takes one value take several, but for the ``single`` ones."""
    for action in _options(parser):
        if action.dest not in single and action.nargs is None:
            kind, choices = action.type or str, action.choices
            if choices is not None:
                action.metavar, action.choices = "|".join(map(str, choices)), None
            action.type = _values_of(kind, choices)


def _options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.option_strings and action.dest != "help"]


def _values_of(kind: Any, choices: Any) -> Callable[[str], Values]:
    return lambda text: parse_values(text, kind, choices)


def combinations(
    parser: argparse.ArgumentParser, options: argparse.Namespace, left_out: tuple[str, ...]
) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Every combination: the options that vary, and the arguments of the command that runs it.

    The last option on the command line's help varies fastest, seeds in any case.
    """
    given = {action: getattr(options, action.dest) for action in _options(parser) if action.dest not in left_out}
    common = [text for action, value in given.items() for text in _as_arguments(action, value)]
    grid = [(action, value) for action, value in given.items() if isinstance(value, Values)]
    grid.sort(key=lambda entry: entry[0].dest == "seed")  # the sort is stable
    for chosen in itertools.product(*(range(len(values.texts)) for _, values in grid)):
        picked = [(action, values, index) for (action, values), index in zip(grid, chosen, strict=True)]
        varied = {action.dest: values.parsed[index] for action, values, index in picked if len(values.texts) > 1}
        own = [text for action, values, index in picked for text in (action.option_strings[0], values.texts[index])]
        yield varied, [*common, *own]


def _as_arguments(action: argparse.Action, value: Any) -> list[str]:
    """An option that stands in no grid, as it is typed; nothing where it was left out."""
    if isinstance(value, Values) or value == action.default:
        return []
    if action.nargs == 0:
        return [flag for flag in action.option_strings if flag.startswith("--no-") is (value is False)][:1]
    return [action.option_strings[0], *([str(part) for part in value] if isinstance(value, list) else [str(value)])]
