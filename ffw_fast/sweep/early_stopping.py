"""A sweep on Ray that ends unpromising settings early, by a scheduler of Ray Tune."""

import json
import math
import os
import queue
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, Self

from ffw_fast.sweep.engines import (
    BAD_INPUT,
    POLL_SECONDS,
    Job,
    Outcome,
    RayCluster,
    describe_failure,
    end_processes,
    start_process,
    wait_until_free,
)
from ffw_fast.sweep.table import STOPPED

SCHEDULERS = ("async_hyperband", "median_stopping_rule")  # of Ray Tune's, those that end trials and never pause them
METRICS = {"val_task_accuracy": "max", "val_bias_accuracy": "min", "val_mi": "min", "loss": "min"}
EPOCHS = "epochs.jsonl"  # in a setting's folder: the rows of its epochs, a line as soon as one has ended
RECORDS = "tune"  # beside the settings' folders: what Ray Tune keeps of its trials


class RayTune(RayCluster):
    """A Ray cluster, as ``RayCluster``, on which a scheduler watches every setting's epochs and may end it.

    Args:
        scheduler: one of ``SCHEDULERS``.
        metric: a column of the history, one of ``METRICS``, which says whether more of it is better.
        grace: epochs that every setting is given.

    Raises:
        ImportError: Ray Tune is not installed.
    """

    def __init__(
        self,
        address: str | None,
        threads: int,
        gpus: int,
        retries: int,
        *,
        scheduler: str,
        metric: str,
        grace: int,
    ) -> None:
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the other one prints its settings, however quiet it is to be
        try:
            from ray import tune
        except ImportError as error:
            raise ImportError("ending settings early needs Ray Tune: pip install 'ffw_fast[ray]'") from error
        super().__init__(address, threads, gpus, retries)
        self._tune = tune
        self._resources = {"cpu": threads, "gpu": gpus}
        self._scheduler, self._metric, self._grace = scheduler, metric, grace

    def run(self, jobs: Sequence[Job]) -> Generator[Outcome]:
        if any(job.epochs is None for job in jobs):  # the training of biased networks: nothing to choose by
            yield from super().run(jobs)
        elif jobs:
            yield from self._watched(jobs)

    def _watched(self, jobs: Sequence[Job]) -> Generator[Outcome]:
        """Ray Tune runs in a thread of its own, and tells of every trial that has ended."""
        ended: queue.Queue[Outcome | BaseException | None] = queue.Queue()
        stop = threading.Event()
        tuner = self._tuner(jobs, ended, stop)

        def fit() -> None:
            try:
                tuner.fit()
                ended.put(None)
            except BaseException as error:  # of the thread, raised where the sweep waits for it
                ended.put(error)

        thread = threading.Thread(target=fit)
        thread.start()
        try:
            while (outcome := ended.get()) is not None:
                if isinstance(outcome, BaseException):
                    raise outcome
                yield outcome
        finally:
            stop.set()
            thread.join()

    def _tuner(self, jobs: Sequence[Job], ended: queue.Queue, stop: threading.Event) -> Any:
        tune, retries, mode = self._tune, self._retries, METRICS[self._metric]
        options: dict[str, Any] = {"grace_period": self._grace}
        if self._scheduler == "async_hyperband":
            options["max_t"] = max(job.epochs or 1 for job in jobs) + 1  # the end of a job is a result of its own

        class Told(_NotKept, tune.Callback):  # type: ignore[name-defined]
            def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
                job, last = jobs[trial.config["job"]], trial.last_result
                code = last.get("code")
                stopped = f"{STOPPED} after {last['epoch']} epochs" if code is None else ""
                ended.put((job, stopped or describe_failure(code, job.folder)))

            def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
                if trial.num_failures > retries:
                    ended.put((jobs[trial.config["job"]], f"lost {retries + 1} times on Ray"))

        class Closed(_NotKept, tune.Stopper):  # type: ignore[name-defined]
            def __call__(self, trial_id: str, result: dict) -> bool:
                return False

            def stop_all(self) -> bool:
                return stop.is_set()

        return tune.Tuner(
            tune.with_resources(_trainable(tune, jobs, self._metric, int(self._resources["cpu"])), self._resources),
            param_space={"job": tune.grid_search(list(range(len(jobs))))},
            tune_config=tune.TuneConfig(
                scheduler=tune.schedulers.create_scheduler(self._scheduler, metric=self._metric, mode=mode, **options),
            ),
            run_config=tune.RunConfig(
                storage_path=str(jobs[0].folder.parent),
                name=RECORDS,
                stop=Closed(),
                callbacks=[Told()],
                failure_config=tune.FailureConfig(max_failures=retries),
                checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0),
                verbose=0,
            ),
        )


class _NotKept:
    """Of this process alone, while Ray Tune writes down how to go on with its trials elsewhere: that is not used."""

    def __reduce__(self) -> tuple:
        return object, ()

    def __deepcopy__(self, memo: dict) -> Self:
        return self


def _trainable(tune: Any, jobs: Sequence[Job], metric: str, threads: int) -> Any:
    """What Ray Tune takes a step of: a setting in a process of its own, whose every epoch is a result."""

    class Extraction(tune.Trainable):
        def setup(self, config: dict[str, Any]) -> None:
            self._job = with_epochs(jobs[config["job"]])
            wait_until_free(self._job.folder)
            self._rows = new_rows(self._job.folder / EPOCHS)
            self._process = start_process(self._job, {**os.environ, "OMP_NUM_THREADS": str(threads)})
            self._last = {"epoch": 0, metric: -math.inf if METRICS[metric] == "max" else math.inf}

        def step(self) -> dict[str, Any]:
            while True:
                code = self._process.poll()  # before the rows: those of a process that has ended are all there
                if (row := next(self._rows)) is not None:
                    self._last = {"epoch": row["epoch"], metric: value_of(row, metric)}
                    return self._last
                if code in (0, BAD_INPUT):
                    return {**self._last, "done": True, "code": code}
                if code is not None:
                    raise RuntimeError(describe_failure(code, self._job.folder))
                time.sleep(POLL_SECONDS)

        def cleanup(self) -> None:
            end_processes([self._process])  # it leaves a checkpoint

        def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
            return {}  # the setting's folder has its own

        def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
            pass

    return Extraction


def with_epochs(job: Job) -> Job:
    """The job, which tells of its epochs."""
    return replace(job, arguments=(*job.arguments, "--log-epochs", str(job.folder / EPOCHS)))


def new_rows(file: Path) -> Iterator[dict[str, Any] | None]:
    """Rows of the file as they come, None where there is none; each epoch once, also where a kill led to it again."""
    seen, position = 0, 0
    while True:
        text = file.read_text() if file.exists() else ""
        lines = text[position:].splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]  # the last one may be under way
        for line in whole:
            position += len(line)
            row = json.loads(line)
            if row["epoch"] > seen:
                seen = row["epoch"]
                yield row
        yield None


def value_of(row: dict[str, Any], metric: str) -> float:
    """The metric of an epoch; that of several biases is their mean.

    Raises:
        KeyError: the epoch has no such column, as without an unbiased set.
    """
    value = row[metric]
    return mean(value) if isinstance(value, list) else float(value)
