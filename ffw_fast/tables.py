"""Tables as texts, for a terminal and for a page."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from rich import box
from rich.console import Console
from rich.table import Table

PIPE_WIDTH = 200


@dataclass(frozen=True)
class Lines:
    """A table.

    Attributes:
        title: what all its lines have in common.
        columns: their titles, where a line break may save room; the first is of what a line tells of.
        lines: as many texts in each as there are columns.
    """

    title: str
    columns: Sequence[str]
    lines: Sequence[Sequence[str]]

    def as_table(self) -> Table:
        """For a terminal."""
        table = Table(title=self.title)
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left")
        for line in self.lines:
            table.add_row(*line)
        return table


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation of what several seeds gave."""
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def print_table(table: Table) -> None:
    """On standard output; where it is no terminal, in plain characters and so wide that nothing is folded."""
    if sys.stdout.isatty():
        Console(markup=False).print(table)
        return
    table.box = box.ASCII
    Console(width=PIPE_WIDTH, markup=False).print(table)
