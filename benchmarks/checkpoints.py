"""What checkpoints cost: the seconds spent on them over the seconds of a whole run.

Multi-Color MNIST on the shipped digits: the biased network's training, then the extraction, with the checkpoints that
``ffw-fast run`` keeps. Counted is all that is done for them: copies of the state in memory, checksums, writing, and
flushing to the disk, at ends of epochs and when the run ends.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from ffw_fast.benchmarks.command import add_json, bench_parser, write_record
from ffw_fast.benchmarks.machine import describe
from rich.console import Console
from rich.table import Table

from ffw_fast import run_state
from ffw_fast.extract import extract
from ffw_fast.progress import Progress
from ffw_fast.run_state import RunState
from ffw_fast.runs.biased_network import trained_vanilla
from ffw_fast.runs.request import Request
from ffw_fast.workloads import get_workload

Row = dict[str, Any]


def measure(out: Path, seed: int, vanilla_epochs: int | None, **extraction: Any) -> list[Row]:
    """One row for the biased network's training, one for the extraction, one for both."""
    request = Request(
        get_workload("multi-color-mnist"), out, seed, vanilla_epochs=vanilla_epochs, extraction=extraction
    )
    splits = request.workload.load(None, seed)
    with _counted("biased network") as vanilla_row:
        vanilla = trained_vanilla(request, splits, Progress())
    with _counted("extraction") as row:
        extract(vanilla, splits.train, splits.val, run_dir=out, progress=False, **request.settings.as_dict())
    both = {name: vanilla_row[name] + row[name] for name in ("writes", "bytes", "checkpoints", "seconds")}
    return [vanilla_row, row, {"part": "together", **both}]


@contextmanager
def _counted(part: str) -> Iterator[Row]:
    """A row that is filled in by what happens within."""
    row: Row = {"part": part, "writes": 0, "bytes": 0, "checkpoints": 0.0, "seconds": 0.0}

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*arguments)
            finally:
                row["checkpoints"] += time.perf_counter() - started

        return call

    def write(path: Path, *contents: Any) -> None:
        written(path, *contents)
        row["writes"] += 1
        row["bytes"] += path.stat().st_size

    written = run_state.write_tensors
    with (
        patch.object(run_state, "write_tensors", write),
        patch.object(RunState, "save", timed(RunState.save)),
        patch.object(RunState, "__exit__", timed(RunState.__exit__)),
    ):
        started = time.perf_counter()
        yield row
        row["seconds"] = time.perf_counter() - started


def cost_table(rows: list[Row]) -> Table:
    table = Table(title="Multi-Color MNIST: what checkpoints cost")
    for column in ("", "writes", "MB a write", "seconds", "of them on checkpoints", "share"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(
            row["part"],
            str(row["writes"]),
            f"{row['bytes'] / max(1, row['writes']) / 1e6:.1f}",
            f"{row['seconds']:.2f}",
            f"{row['checkpoints']:.3f}",
            f"{row['checkpoints'] / row['seconds']:.2%}",
        )
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = bench_parser("checkpoints", __doc__)
    parser.add_argument("--schedule", default="published", choices=("published", "adaptive"), help="default: published")
    parser.add_argument("--max-epochs", type=int, default=200, help="of the extraction (default: 200)")
    parser.add_argument("--vanilla-epochs", type=int, help="of the biased network (default: the workload's)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--out", type=Path, help="where checkpoints are written: the disk counts (default: temporary)")
    add_json(parser)
    options = parser.parse_args(arguments)
    with TemporaryDirectory(dir=options.out) as folder:
        rows = measure(
            Path(folder),
            options.seed,
            options.vanilla_epochs,
            schedule=options.schedule,
            max_epochs=options.max_epochs,
        )
    Console().print(cost_table(rows))
    write_record(options.json, {"machine": describe(), "rows": rows})


if __name__ == "__main__":
    main()
