"""Checkpoints of a run: the last two are kept, and a run that was killed goes on from them to the same bits.

The extraction and the biased network's training keep theirs in this way, under names of their own.
"""

import json
import os
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from ffw_fast.files import DamagedFileError, read_tensors, sync_folder, write_tensors
from ffw_fast.run_lock import locked
from ffw_fast.settings import DEFAULTS
from ffw_fast.version import __version__

FORMAT = 2
ARRIVING = ".new"  # ends the name of a checkpoint before it is the newest
MAY_DIFFER = ("max_epochs",)  # nothing before the last epoch depends on it, so a run may be extended
SHARE = 0.01  # of a run's time that writing checkpoints may take ...
LONGEST = 300.0  # ... unless that leaves the last one older than so many seconds


class OtherRunError(ValueError):
    """A checkpoint, or a folder, of another run than the one that is to go on."""


class Checkpoints(NamedTuple):
    """Names of the files that a run keeps."""

    newest: str
    previous: str

    @classmethod
    def named(cls, name: str) -> Self:
        return cls(f"{name}.safetensors", f"{name}.previous.safetensors")

    def remove_from(self, folder: Path) -> None:
        for name in self:
            (folder / name).unlink(missing_ok=True)


CHECKPOINT, PREVIOUS = EXTRACTION = Checkpoints.named("checkpoint")


class Resumable(Protocol):
    """What can be checkpointed: its state is tensors, whose names and shapes never change, and a JSON record."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]: ...

    def forms(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """Of the state's tensors, without asking other processes for them."""
        return {name: (tensor.dtype, tensor.shape) for name, tensor in self.state()[0].items()}

    def load_state(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Snapshot:
    """A state that nothing changes any more, on the devices that it was on."""

    tensors: Mapping[str, Tensor]
    record: str

    @classmethod
    def of(cls, run: Resumable) -> Self:
        tensors, record = run.state()
        copies = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
        return cls(copies, json.dumps(record))

    def load_into(self, run: Resumable) -> None:
        run.load_state({name: tensor.clone() for name, tensor in self.tensors.items()}, json.loads(self.record))


class RunState:
    """The checkpoints of one run folder, locked from ``with`` to the end of it; without a folder nothing is written.

    Every state that is saved is kept in memory, and written where a hundredth of the time since the last write pays for
    it, at the first chance, after five minutes and at the end of ``with``, also where that is reached by an exception.
    So a run that is killed loses the epoch under way and what takes no longer than a hundred writes.

    Args:
        run_dir: the folder, made if it is not there; None for no checkpoints.
        identity: what a checkpoint must agree with to be continued: settings and a digest of the model's weights.
        resume: whether to continue from a checkpoint that is there.
        files: what the checkpoints are called.
        begin: called before the first checkpoint of a run that is begun anew takes the place of what is there.

    Raises:
        OSError: the folder cannot be written. BlockingIOError, by ``with``: another run uses it.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str] | None,
        identity: dict[str, Any],
        resume: bool,
        files: Checkpoints = EXTRACTION,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        if resume and run_dir is None:
            raise ValueError("resume needs run_dir, the folder that holds the checkpoint")
        self.last: Snapshot | None = None
        self._folder = Path(run_dir) if run_dir is not None else None
        self._identity = {"format": FORMAT, "version": __version__, **identity}
        self._resume = resume
        self._files = files
        self._begin = begin
        self._is_own = False  # whether the newest checkpoint in the folder is of this run
        self._is_written = True  # whether it is of the last state
        self._written_at, self._write_seconds = 0.0, 0.0
        self._locked = ExitStack()
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            probe = self._folder / f"{files.newest}.probe"
            probe.touch()
            probe.unlink()

    def __enter__(self) -> Self:
        if self._folder is not None:
            self._locked.enter_context(locked(self._folder))
        return self

    def __exit__(self, *_exception: object) -> None:
        with self._locked:
            if not self._is_written:
                self._write()

    def restore(self, run: Resumable) -> bool:
        """Load the newest whole checkpoint into the run if there is one to be continued; whether there was.

        Raises:
            DamagedFileError: no checkpoint is whole.
            OtherRunError: it belongs to another run; the differences are listed.
            ValueError: it is whole and does not fit this run.
        """
        if not self._resume or self._folder is None:
            return False
        newest, previous = (self._folder / name for name in self._files)
        damaged: list[DamagedFileError] = []
        for path in (newest, previous):
            try:
                snapshot = self._read(path, run)
            except FileNotFoundError:
                continue
            except DamagedFileError as error:
                damaged.append(error)
                continue
            try:
                snapshot.load_into(run)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"{path} does not fit this run: {error}") from error
            if damaged:
                path.replace(newest)
                warnings.warn(f"{damaged[0]}; the run goes on from the checkpoint before it", stacklevel=2)
            self.last, self._is_own = snapshot, newest.exists()
            return True
        if damaged:
            raise DamagedFileError("; ".join(map(str, damaged)))
        return False

    def _read(self, path: Path, run: Resumable) -> Snapshot:
        """A checkpoint that is whole and belongs to this run."""
        tensors, texts = read_tensors(path)
        if missing := {"identity", "record"} - texts.keys():
            raise DamagedFileError(f"{path} is no checkpoint: it has no {', '.join(sorted(missing))}")
        self._check(path, json.loads(texts["identity"]))
        expected = run.forms()
        found = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        if found != expected:
            unlike = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
            raise ValueError(f"{path} does not fit this run: {', '.join(unlike)}")
        return Snapshot(tensors, texts["record"])

    def keep(self, run: Resumable) -> None:
        """Keep the run's state in memory, as the last good one."""
        self.last = Snapshot.of(run)

    def save(self, run: Resumable) -> None:
        """Keep the run's state, and write it if it is time. A disk that is full is a warning: the run goes on."""
        self.keep(run)
        if self._folder is None:
            return
        self._is_written = False
        if time.perf_counter() - self._written_at >= min(self._write_seconds / SHARE, LONGEST):
            self._write()

    def _write(self) -> None:
        """Write the last state, so that a kill at any instant leaves a whole checkpoint."""
        assert self._folder is not None and self.last is not None
        started = time.perf_counter()
        newest, previous = (self._folder / name for name in self._files)
        arriving = self._folder / f"{self._files.newest}{ARRIVING}"
        texts = {"record": self.last.record, "identity": json.dumps(self._identity)}
        try:
            write_tensors(arriving, self.last.tensors, texts)
            if not self._is_own:
                self._begin()
            if self._is_own and newest.exists():  # it is not where a write before this one was cut off just below
                newest.replace(previous)
            arriving.replace(newest)
            if not self._is_own:
                previous.unlink(missing_ok=True)
            sync_folder(self._folder)
            self._is_own = self._is_written = True
        except OSError as error:
            warnings.warn(f"no checkpoint could be written, the run goes on without: {error}", stacklevel=3)
        self._written_at = time.perf_counter()
        self._write_seconds = self._written_at - started

    def _check(self, path: Path, found: dict[str, Any]) -> None:
        check_same_run(f"{path} belongs to another run", found, self._identity, MAY_DIFFER)


def check_same_run(
    otherwise: str, before: Mapping[str, Any], now: Mapping[str, Any], may_differ: Collection[str] = ()
) -> None:
    """``OtherRunError`` that says ``otherwise`` and lists the differences, where two records are not of one run.

    A record is what JSON can hold. Its settings, where it has such a part, are compared one by one; one that the
    version of the record before did not know was what is now its default.
    """
    unknown = DEFAULTS.keys() - before["settings"].keys() if isinstance(before.get("settings"), dict) else ()
    before, now = _flat(before), _flat(json.loads(json.dumps(now)))
    before |= {name: DEFAULTS[name] for name in unknown if name in now and name not in before}
    differences = [
        f"{name} was {before.get(name)!r} and is now {now.get(name)!r}"
        for name in sorted({*before, *now} - {*may_differ})
        if before.get(name) != now.get(name)
    ]
    if differences:
        raise OtherRunError(f"{otherwise}: {'; '.join(differences)}")


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    settings = record.get("settings")
    if not isinstance(settings, dict):
        return dict(record)
    return {name: value for name, value in {**record, **settings}.items() if name != "settings"}
