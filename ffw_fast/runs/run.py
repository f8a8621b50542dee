"""One workload from data to metrics, in a run folder that can be left and taken up again."""

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ffw_fast.bise import BiasedObjective
from ffw_fast.bottleneck import outputs_of
from ffw_fast.channels import ChannelGraph
from ffw_fast.data.datasets import stream_note
from ffw_fast.data.samples import Samples, Splits
from ffw_fast.distributed import Alone, processes
from ffw_fast.extract import check_processes, extract_by
from ffw_fast.extraction import CONFIG, METRICS, Extraction, sparsity, weight_sparsity
from ffw_fast.files import read_json, write_json
from ffw_fast.inputs import check_device, check_test, prepare
from ffw_fast.interrupts import Terminated
from ffw_fast.leakage import leakage
from ffw_fast.progress import Progress
from ffw_fast.run_lock import locked
from ffw_fast.run_state import CHECKPOINT
from ffw_fast.runs.biased_network import is_given, keep_vanilla, shared_vanilla
from ffw_fast.runs.guessed_bias import guessing_network, with_guessed_bias
from ffw_fast.runs.request import Request, config_of
from ffw_fast.runs.writing import (
    check_folder,
    check_own,
    check_resumed,
    clear_results,
    remove_leftovers,
    write_results,
)
from ffw_fast.settings import DEFAULTS, Settings
from ffw_fast.workloads import Workload


def run_workload(request: Request, progress: Progress) -> dict[str, Any]:
    """Train the biased network, extract the sub-network, measure both, write the run folder; the metrics.

    What an earlier run left in the folder stays until this one has something of its own to put there. After an
    interrupt in the extraction what was reached is measured and written too, beside the checkpoint to resume from, and
    the interrupt is raised again; a second one leaves the checkpoint only, as SIGTERM does at once.

    In a process group of ``torch.distributed`` the first process does all but the extraction itself, and writes; the
    others return no metrics.

    Raises:
        OSError: before any training: the folder cannot be written, another run uses it (BlockingIOError), or it holds
            files that are not of a run (FileExistsError).
        ValueError, ImportError, FloatingPointError: bad settings or data, a missing extra, a loss that diverges.
        MemoryError: out of memory; at which batch size.
        KeyboardInterrupt: see above.
    """
    group = processes()
    check_processes(request.settings, group.count)
    config = config_of(request)
    group.together(lambda: check_device(request.device))
    with ExitStack() as stack:
        group.together(lambda: group.first(lambda: _take_folder(request, config, stack)))
        return _run_locked(request, config, progress, group)


def _take_folder(request: Request, config: dict[str, Any], stack: ExitStack) -> None:
    check_folder(request.out)
    check_own(request.out)
    stack.enter_context(locked(request.out))
    if request.resume:
        check_resumed(request.out, config)
    remove_leftovers(request.out)


def _run_locked(request: Request, config: dict[str, Any], progress: Progress, group: Alone) -> dict[str, Any]:
    clock = _StageClock()
    with progress:
        progress.stage("data")
        splits = group.together(lambda: request.workload.load(request.data_dir, request.seed, **request.data_options))
        sets = {name: getattr(splits, name) for name in ("vanilla", "train", "val", "test")}
        if splits.test is splits.val:
            del sets["test"]
        config["samples"] = {name: len(samples.y) for name, samples in sets.items() if samples is not None}
        config["input_shape"] = list(splits.train.x.shape[1:])
        for name, samples in sets.items():
            progress.note(None if name == "vanilla" else stream_note(samples, name))
        names = _bias_names(request.workload, splits.train.b.shape[1])
        clock.lap("data")
        task = extraction_task(request, splits)
        config["settings"] = task.settings.as_dict()
        if not is_given(request, splits):  # what does not fit is found out before its training, and before it is kept
            group.together(lambda: check_task(task, splits.test, request.workload.build_model(request.seed)))
        vanilla = shared_vanilla(request, splits, progress, group)
        if is_given(request, splits):
            group.together(lambda: check_task(task, splits.test, vanilla))
        clock.lap("vanilla")
        extracting = _Extracting(request, task, vanilla, lambda: _begin(request, config, splits, vanilla))
        found, complete = extracting.reached(progress)
        if group.rank > 0:
            return {}
        clock.lap("extraction")
        progress.stage("measurement" if complete else "measurement of what was reached (Ctrl-C leaves at once)")
        metrics = _test_metrics(found, splits)
        clock.lap("measurement")
    metrics |= {
        "measured_on": "val" if splits.test is splits.val else "test",
        "epochs": len(found.history),
        "seconds": found.metrics["seconds"],
        "stages": clock.laps,
        "complete": complete,
        "bias_names": names,
        "warnings": found.warnings,
        "validation": found.metrics,
    }
    write_results(request.out, found, config, metrics, splits.test)
    if not complete:
        raise KeyboardInterrupt
    return metrics


def _begin(request: Request, config: dict[str, Any], splits: Splits, vanilla: nn.Module) -> None:
    """Make the folder this run's: what an earlier one left in it goes."""
    if not request.resume:
        clear_results(request.out)
    if is_given(request, splits):
        keep_vanilla(request, splits, vanilla)
    write_json(request.out / CONFIG, config)


def _bias_names(workload: Workload, biases: int) -> list[str]:
    """The workload's names of its biases, or numbers where it has none."""
    if not workload.bias_names:
        return ["bias"] if biases == 1 else [f"bias {number}" for number in range(1, biases + 1)]
    if len(workload.bias_names) != biases:
        raise ValueError(f"there are {biases} biases in the data and {len(workload.bias_names)} names of biases")
    return list(workload.bias_names)


def is_finished(request: Request) -> bool:
    """Whether the run folder holds all results of this very request, its number of epochs included.

    Raises:
        ValueError: it holds another run.
    """
    config = config_of(request)
    check_resumed(request.out, config)
    try:
        kept, metrics = read_json(request.out / CONFIG), read_json(request.out / METRICS)
    except (FileNotFoundError, ValueError):  # not begun, or killed while it wrote
        return False
    settings = {**DEFAULTS, **kept.get("settings", {})}  # the version that wrote it may not have known all
    if config["settings"]["correlations"] is None:  # the data set's own stand there
        settings["correlations"] = None
    is_same = settings == config["settings"] and metrics.get("epochs", 0) <= request.settings.max_epochs
    return is_same and metrics.get("complete") is True


@dataclass(frozen=True)
class Task:
    """What is extracted from: settings and sets as ``ffw_fast.extract`` takes them."""

    settings: Settings
    train: Samples
    val: Samples | None


def extraction_task(request: Request, splits: Splits) -> Task:
    """FFW's unbiased sets; or BISE's biased one, with its correlations where they are known, and one to select by."""
    settings = request.settings
    if settings.method != "bise":
        return Task(settings, splits.train, splits.val)
    train = splits.train if splits.vanilla is None else splits.vanilla
    val = None if request.without_val else splits.val
    if request.guess_bias:
        recipe = request.recipe
        if recipe is None:
            raise ValueError(f"{request.workload.name} has no recipe to train the network that guesses bias labels by")
        network = request.workload.build_model(request.seed)
        guesser = guessing_network(network, train, recipe, seed=request.seed, device=request.device)
        train, val = with_guessed_bias(train, guesser), val and with_guessed_bias(val, guesser)
    elif settings.correlations is None:
        settings = replace(settings, correlations=splits.correlations)
    return Task(settings, train, val)


def check_task(task: Task, test: Samples, model: nn.Module) -> None:
    """The errors of ``extract`` where data and settings do not fit a model of this kind, and those of the test set."""
    settings = task.settings
    problem = prepare(model, task.train, task.val, settings)
    check_test(problem, test)
    if settings.method == "bise":
        weight = next(model.parameters())
        logits, _features = outputs_of(model.eval(), settings.bottleneck, problem.train.x[:2].to(weight.device))
        BiasedObjective.from_settings(settings, problem.train, logits.shape[1])
    if settings.granularity == "channel":
        ChannelGraph(model.eval(), settings.where).check_bottleneck(settings.bottleneck)


class _Extracting:
    """The extraction of a run, whose folder becomes its own with the first checkpoint."""

    def __init__(self, request: Request, task: Task, vanilla: nn.Module, begin: Callable[[], None]) -> None:
        self._request, self._task, self._vanilla, self._make_folder_own = request, task, vanilla, begin
        self._has_checkpoint = request.resume

    def reached(self, progress: Progress) -> tuple[Extraction, bool]:
        """The extraction, and whether it came to its end: after an interrupt it is what its checkpoint holds."""
        request, settings = self._request, self._task.settings
        try:
            return self._extracted(settings, request.resume, progress), True
        except Terminated:  # whoever sends SIGTERM sends SIGKILL next
            raise
        except KeyboardInterrupt:
            if processes().count > 1:  # the others may be past it or behind it
                raise
            checkpoint = request.out / CHECKPOINT
            if not (self._has_checkpoint and checkpoint.exists()):
                raise
            ended = replace(settings, max_epochs=_epochs_done(checkpoint))
            return replace(self._extracted(ended, True, Progress()), settings=settings), False

    def _extracted(self, settings: Settings, resume: bool, progress: Progress) -> Extraction:
        return extract_by(
            self._vanilla,
            self._task.train,
            self._task.val,
            settings,
            run_dir=self._request.out,
            resume=resume,
            shard=self._request.shard,
            progress=progress,
            begin=self._begin,
        )

    def _begin(self) -> None:
        self._make_folder_own()
        self._has_checkpoint = True


def _epochs_done(checkpoint: Path) -> int:
    with safe_open(checkpoint, framework="pt") as file:
        return len(json.loads(file.metadata()["record"])["history"])


class _StageClock:
    """Seconds that each stage of a run took."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage], self._last = now - self._last, now


def _test_metrics(found: Extraction, splits: Splits) -> dict[str, Any]:
    """The biased network, the pruned one and the best one on the unbiased test set."""
    kept = {layer: torch.ones_like(mask) for layer, mask in found.masks.items()}
    networks: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
        "vanilla": (lambda: found.dense_model.eval(), kept),
        "pruned": (found.model, found.masks),
        "best": (lambda: found.model(best=True), found.best_masks),
    }
    settings = found.settings
    return {
        name: leakage(network(), settings, splits, sparsity(masks))
        | {
            "weight_sparsity": weight_sparsity(found.dense_model, settings, masks),
            "layer_sparsity": {layer: _pruned_share(mask) for layer, mask in masks.items()},
        }
        for name, (network, masks) in networks.items()
    }


def _pruned_share(mask: Tensor) -> float:
    return (~mask).double().mean().item()
