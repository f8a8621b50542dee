"""Where the commands of a sweep run: processes of this machine, or a Ray cluster. Both retry what was killed."""

import contextlib
import os
import re
import runpy
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from ffw_fast.run_lock import locked

LOG = "log.txt"  # what a command wrote to standard output and standard error
POLL_SECONDS = 0.05
CONNECT_SECONDS = 10
ENDING_SECONDS = 30  # for a job that was told to end
BAD_INPUT = 2  # the exit code of an error that comes again when the command is run again
ERROR = "ffw-fast: error: "  # how the line begins that tells of it


@dataclass(frozen=True)
class Job:
    """One call of ``ffw-fast``, that may be killed and run again.

    Attributes:
        arguments: of ``ffw-fast``; they name ``folder`` and ask to resume.
        folder: where it works, and where its log is kept.
        epochs: of an extraction at most; None for a job that makes none.
    """

    arguments: tuple[str, ...]
    folder: Path
    epochs: int | None = None
    attempt: int = 0


Outcome = tuple[Job, str]  # a job that has ended, and why it failed; empty where it did not


class Engine(Protocol):
    """Runs jobs beside each other."""

    def run(self, jobs: Sequence[Job]) -> Generator[Outcome]:
        """All jobs, in the order in which they end. Closing the generator ends those under way."""
        ...


class LocalProcesses:
    """Processes of this machine, each with its share of the cores.

    Args:
        processes: how many at once.
        threads: of each of them.
        retries: how often a job is taken up again after it was killed.
    """

    def __init__(self, processes: int, threads: int, retries: int) -> None:
        self._processes, self._retries = processes, retries
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def run(self, jobs: Sequence[Job]) -> Generator[Outcome]:
        waiting, running = list(jobs), dict[subprocess.Popen[bytes], Job]()
        try:
            while waiting or running:
                free = (job for job in tuple(waiting) if is_free(job.folder))
                for job in islice(free, self._processes - len(running)):
                    waiting.remove(job)
                    running[start_process(job, self._environment)] = job
                ended = [process for process in running if process.poll() is not None]
                for process in ended:
                    job = running.pop(process)
                    if process.returncode not in (0, BAD_INPUT) and job.attempt < self._retries:
                        waiting.insert(0, replace(job, attempt=job.attempt + 1))
                    else:
                        yield job, describe_failure(process.returncode, job.folder)
                if not ended:
                    time.sleep(POLL_SECONDS)
        finally:
            end_processes(running)


def is_free(folder: Path) -> bool:
    """Whether no process works in the folder: that of a sweep or a worker that was killed goes on without it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder):
            return True
    except BlockingIOError:
        return False


def wait_until_free(folder: Path) -> None:
    while not is_free(folder):
        time.sleep(1)


def start_process(job: Job, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    """The job's process, in a session of its own: Ctrl-C is for us, and its checkpoint outlives a kill."""
    with (job.folder / LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "ffw_fast", *job.arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )


def end_processes(processes: Collection["subprocess.Popen[bytes]"]) -> None:
    """Let all leave a checkpoint and end, and kill those that take too long."""
    for process in processes:
        process.terminate()
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(ENDING_SECONDS)
        process.kill()
        process.wait()


class RayCluster:
    """A Ray cluster: one that is there, or a local one for as long as the sweep lasts.

    The folder of the sweep must be the same on all its machines, and the package installed there.

    Args:
        address: of the cluster, as in ``ray.init``; None starts a local one.
        threads: of each job, and so the cores that it asks for.
        gpus: that each job asks for.
        retries: how often a job is taken up again after its worker was killed.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: no cluster answers at the address.
    """

    def __init__(self, address: str | None, threads: int, gpus: int, retries: int) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError("a sweep on Ray needs Ray: pip install 'ffw_fast[ray]'") from error
        self._ray, self._retries = ray, retries
        self._started_here = not ray.is_initialized()
        if self._started_here:
            _connect(ray, address)
        self._task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=retries)(run_job)

    def run(self, jobs: Sequence[Job]) -> Generator[Outcome]:
        pending = {self._task.remote(job): job for job in jobs}
        try:
            while pending:
                (reference,), _ = self._ray.wait(list(pending), num_returns=1)
                job = pending.pop(reference)
                try:
                    code = self._ray.get(reference)
                except self._ray.exceptions.RayError as error:
                    yield job, f"lost {self._retries + 1} times on Ray: {_first_line(error)}"
                    continue
                if code not in (0, BAD_INPUT) and job.attempt < self._retries:
                    again = replace(job, attempt=job.attempt + 1)
                    pending[self._task.remote(again)] = again
                else:
                    yield job, describe_failure(code, job.folder)
        finally:
            for reference in pending:
                self._ray.cancel(reference)  # as Ctrl-C there: it leaves a checkpoint
            if pending:
                self._ray.wait(list(pending), num_returns=len(pending), timeout=ENDING_SECONDS)
            for reference in pending:
                self._ray.cancel(reference, force=True)

    def close(self) -> None:
        """Leave the cluster; a local one ends with all its processes."""
        if self._started_here:
            self._ray.shutdown()


def _connect(ray: Any, address: str | None) -> None:
    try:
        if place := re.fullmatch(r"(?:ray://)?(.+):(\d+)", address or ""):  # Ray itself would try for many minutes
            socket.create_connection((place[1], int(place[2])), CONNECT_SECONDS).close()
        ray.init(address=address or "local", include_dashboard=False if address is None else None, log_to_driver=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConnectionError(f"no Ray cluster answers at {address!r}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run_job(job: Job) -> int:
    """Run the job in this process, as ``python -m ffw_fast`` would, with its output in its log; the exit code."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    wait_until_free(job.folder)
    own, sys.argv = sys.argv, ["ffw-fast", *job.arguments]
    with (job.folder / LOG).open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            runpy.run_module("ffw_fast", run_name="__main__")
        except SystemExit as end:
            return int(end.code or 0)
        except Exception:
            traceback.print_exc()
        finally:
            sys.argv = own
    return 1  # as Python itself ends


def describe_failure(code: int, folder: Path) -> str:
    """Why a job failed, from its exit code and its log: its last error, or else its last line."""
    if code == 0:
        return ""
    if code < 0:
        return f"killed by signal {-code}"
    lines = (folder / LOG).read_text(errors="replace").strip().splitlines()
    if code == BAD_INPUT:  # a warning, or what another process wrote, may come after it
        lines = [line for line in lines if line.startswith(ERROR)] or lines
    return lines[-1].removeprefix(ERROR) if lines else f"exit code {code}"
