"""What a run shows while it works: a live display on a terminal, plain lines elsewhere, both on standard error."""

import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

PLAIN_LINES = 20  # about so many lines of a long stage where there is no terminal


class Progress:
    """Shows nothing: what a run tells of itself, for others to show.

    A run is a sequence of stages, each with a number of epochs at most. ``stage`` begins one, ``tick`` ends an epoch.
    It is shown from the first ``with`` to the end of that one, so what it is handed to may say ``with`` again.
    """

    _depth = 0

    def __enter__(self) -> Self:
        self._depth += 1
        if self._depth == 1:
            self.show()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.hide()

    def show(self) -> None:
        """Begin to show something."""

    def hide(self) -> None:
        """Show nothing from now on, and leave the terminal as it was."""

    def note(self, text: str | None) -> None:
        """Something that the user should know, if anything."""

    def stage(self, title: str, epochs: int = 0) -> None:
        """A stage begins that takes at most so many epochs; 0 for one that is not counted in epochs."""

    def tick(self, done: int, text: str) -> None:
        """So many epochs of the stage are done; what there is to say of the last one."""

    def epoch(self, row: dict[str, Any]) -> None:
        """An epoch of the extraction has ended; its row of the history."""
        self.tick(row["epoch"], describe_epoch(row))


class EpochLines(Progress):
    """Hands everything on to another one, and appends the row of every epoch to a file, as a line of JSON."""

    def __init__(self, shown: Progress, file: str | os.PathLike[str]) -> None:
        self._shown, self._file = shown, Path(file)
        self.show, self.hide, self.note = shown.show, shown.hide, shown.note  # type: ignore[method-assign]
        self.stage, self.tick = shown.stage, shown.tick  # type: ignore[method-assign]
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.touch()  # what cannot be written is found out before any work

    def epoch(self, row: dict[str, Any]) -> None:
        self._shown.epoch(row)
        try:
            with self._file.open("a") as file:
                print(json.dumps(row), file=file)
        except OSError as error:  # as with checkpoints, the run goes on
            warnings.warn(f"epoch {row['epoch']} could not be appended to {self._file}: {error}", stacklevel=2)


class StageClock:
    """How long the rest of a stage takes if all its epochs are run, judged by those that were run so far."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self._started = time.monotonic()
        self._skipped: int | None = None  # epochs of an interrupted run that this one continues

    def left(self, done: int) -> float:
        """Seconds after so many epochs; to be asked after every epoch."""
        if self._skipped is None:
            self._skipped = done - 1
        return (time.monotonic() - self._started) / (done - self._skipped) * (self.epochs - done)


class PlainLines(Progress):
    """Single lines for logs and pipes: every epoch of a short stage, about 20 of a long one, and always the last."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file or sys.stderr
        self._title = ""
        self._clock = StageClock(0)
        self._unsaid = ""

    def hide(self) -> None:
        self._say_last()

    def note(self, text: str | None) -> None:
        if text:
            self._say(text)

    def stage(self, title: str, epochs: int = 0) -> None:
        self._say_last()
        self._title, self._clock = title, StageClock(epochs)
        if epochs == 0:
            self._say(title)

    def tick(self, done: int, text: str) -> None:
        epochs, left = self._clock.epochs, self._clock.left(done)
        self._unsaid = f"{self._title} {done}/{epochs}: {text}"
        if done < epochs:
            self._unsaid += f", at most {describe_time(left)} left"
        if done == 1 or done == epochs or done % max(1, epochs // PLAIN_LINES) == 0:
            self._say_last()

    def _say_last(self) -> None:
        if self._unsaid:
            self._say(self._unsaid)
            self._unsaid = ""

    def _say(self, line: str) -> None:
        print(line, file=self._file, flush=hasattr(self._file, "flush"))


class LiveDisplay(Progress):
    """A bar for every stage, with the time left at most, and below them the figures of the last epoch."""

    def __init__(self, console: Console | None = None) -> None:
        self._bars = _BarsWithFigures(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[epochs]}"),
            TextColumn("{task.fields[left]}"),
            console=console or Console(stderr=True),
            refresh_per_second=4,
        )
        self._task: TaskID | None = None
        self._clock = StageClock(0)

    def show(self) -> None:
        self._bars.start()

    def hide(self) -> None:
        self._bars.stop()

    def note(self, text: str | None) -> None:
        if text:
            self._bars.console.print(Text(text))

    def stage(self, title: str, epochs: int = 0) -> None:
        self._end_stage()
        self._clock = StageClock(epochs)
        self._task = self._bars.add_task(title, total=epochs or None, epochs="", left="")

    def tick(self, done: int, text: str) -> None:
        assert self._task is not None
        epochs, left = self._clock.epochs, self._clock.left(done)
        self._bars.figures = text
        shown = f"at most {describe_time(left)} left" if done < epochs else ""
        self._bars.update(self._task, completed=done, epochs=f"{done}/{epochs}", left=shown, refresh=True)

    def _end_stage(self) -> None:
        """A full bar for the stage that was on, however many epochs it took in the end."""
        self._bars.figures = ""
        if self._task is not None:
            self._bars.update(self._task, total=1, completed=1, left="")


class _BarsWithFigures(Bars):
    figures = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        if self.figures:
            yield Text(self.figures, style="dim")


def describe_epoch(row: dict[str, Any]) -> str:
    """The figures of an epoch of the extraction that one wants to see pass by; the bias accuracy is the heads' mean."""
    trained = f"T {row['temperature']:.1e}, loss {row['loss']:.3f}, MI "
    if "val_mi" not in row:
        return f"{trained}{row['train_mi']:.3f} in training"
    bias = sum(row["val_bias_accuracy"]) / len(row["val_bias_accuracy"])
    return f"{trained}{row['val_mi']:.3f}, task {row['val_task_accuracy']:.3f}, bias {bias:.3f}"


def describe_time(seconds: float) -> str:
    """A time in two units at most: ``42 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def make_progress(progress: bool | Progress) -> Progress:
    """The given progress itself, or for a bool what suits standard error, if there is one."""
    if isinstance(progress, Progress):
        return progress
    if not progress or sys.stderr is None:
        return Progress()
    is_terminal = getattr(sys.stderr, "isatty", lambda: False)
    return LiveDisplay() if is_terminal() else PlainLines()
