"""What a run shows while it works: a live line on a terminal, plain lines elsewhere, both on standard error."""

import sys
import time
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

PLAIN_LINES = 20  # about so many lines of a long stage where there is no terminal


class Progress:
    """Shows nothing: what a run tells of itself, for others to show.

    A run is a sequence of stages, each with a number of epochs at most. ``stage`` begins one, ``tick`` ends an epoch.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        pass

    def stage(self, title: str, epochs: int) -> None:
        """A stage begins that takes at most so many epochs."""

    def tick(self, done: int, text: str) -> None:
        """So many epochs of the stage are done; what there is to say of the last one."""

    def epoch(self, row: dict[str, Any]) -> None:
        """An epoch of the extraction has ended; its row of the history."""
        self.tick(row["epoch"], describe_epoch(row))


class PlainLines(Progress):
    """Single lines, thinned out for long stages: for logs and pipes."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file or sys.stderr
        self._title, self._epochs, self._started = "", 1, time.monotonic()

    def stage(self, title: str, epochs: int) -> None:
        self._title, self._epochs, self._started = title, epochs, time.monotonic()

    def tick(self, done: int, text: str) -> None:
        every = max(1, self._epochs // PLAIN_LINES)
        if done % every and done != self._epochs:
            return
        elapsed = time.monotonic() - self._started
        left = elapsed / done * (self._epochs - done)
        print(f"{self._title} {done}/{self._epochs}: {text} (at most {left:.0f} s left)", file=self._file, flush=True)


class LiveLine(Progress):
    """A bar, the last epoch's figures and the time left at most."""

    def __init__(self) -> None:
        self._bars = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TextColumn("at most"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task: Any = None

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._bars.stop()

    def stage(self, title: str, epochs: int) -> None:
        self._task = self._bars.add_task(title, total=epochs, text="")

    def tick(self, done: int, text: str) -> None:
        self._bars.update(self._task, completed=done, text=text)


def describe_epoch(row: dict[str, Any]) -> str:
    """The figures of an epoch of the extraction that one wants to see pass by."""
    bias = sum(row["val_bias_accuracy"]) / len(row["val_bias_accuracy"])
    return (
        f"T {row['temperature']:.1e}, loss {row['loss']:.3f}, MI {row['val_mi']:.3f}, "
        f"task {row['val_task_accuracy']:.3f}, bias {bias:.3f}"
    )


def make_progress(progress: bool | Progress) -> Progress:
    """The given progress itself, or for a bool what suits standard error."""
    if isinstance(progress, Progress):
        return progress
    if not progress:
        return Progress()
    return LiveLine() if sys.stderr.isatty() else PlainLines()
