"""The numbers behind a figure: rows of plain values, and how they are written and grouped."""

import csv
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]  # of numbers and texts; None where there is no value
Rows: TypeAlias = list[Row]


def write_rows(path: Path, rows: Rows) -> None:
    """As CSV, one column for each name that occurs."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def groups(rows: Rows, column: str) -> dict[Any, Rows]:
    """Rows by their value in a column, in order of appearance."""
    found: dict[Any, Rows] = {}
    for row in rows:
        found.setdefault(row[column], []).append(row)
    return found


def spread(values: Iterable[float]) -> tuple[float, float]:
    """Mean and standard deviation; the latter is 0 for a single value."""
    found = list(values)
    return mean(found), stdev(found) if len(found) > 1 else 0.0
