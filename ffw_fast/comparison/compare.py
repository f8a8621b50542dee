"""FFW and BISE beside what they are up against, over seeds: what each network does, what leaks, and what it took."""

import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ffw_fast.compact import compact
from ffw_fast.comparison.baselines import (
    MAGNITUDE_SPARSITIES,
    prune_by_magnitude,
    refit_last_layer,
    train_from_scratch,
    train_on_unbiased,
)
from ffw_fast.comparison.record import RESULTS, Comparison, Rows, read_comparison
from ffw_fast.data.samples import Inputs, Splits
from ffw_fast.extract import extract_by
from ffw_fast.extraction import CONFIG, Extraction, sparsity
from ffw_fast.files import digest
from ffw_fast.finetune import EPOCHS as TUNING_EPOCHS
from ffw_fast.leakage import leakage
from ffw_fast.progress import Progress
from ffw_fast.run_lock import locked
from ffw_fast.run_state import OtherRunError, check_same_run
from ffw_fast.runs.biased_network import fingerprint, trained_vanilla
from ffw_fast.runs.reading import REPORT
from ffw_fast.runs.request import Request, how_made, identifying_options
from ffw_fast.runs.run import extraction_task
from ffw_fast.runs.writing import RESULTS as OF_A_RUN
from ffw_fast.runs.writing import check_folder, check_free
from ffw_fast.settings import METHODS, Settings
from ffw_fast.sizes import macs

BASELINE_STEPS = 3600  # of the baselines that train on the unbiased set; the best epoch by validation is kept
UNDER_WAY = "under-way"  # in a seed's folder: checkpoints of its extractions until all its rows are there


@dataclass(frozen=True)
class Setting:
    """One way of extracting that is compared."""

    schedule: str
    gamma: float
    granularity: str = "weight"
    method: str = "ffw"

    def __str__(self) -> str:
        if self.method == "bise":
            return "BISE"
        kind = "" if self.granularity == "weight" else f" {self.granularity} gates,"
        return f"FFW{kind} {self.schedule}, gamma {self.gamma:g}"


def compare(request: Request, seeds: list[int], settings: list[Setting], progress: Progress) -> Rows:
    """Method -> one row of metrics a seed, on the unbiased test set with heads fitted afresh.

    Results are written to ``compare.json`` in the request's folder after every method; what is there already is not
    computed again, and an extraction that was cut off goes on from its checkpoint.

    Raises:
        OtherRunError: ``compare.json`` is of other settings; the differences are listed. Or of other data.
        OSError: the folder cannot be written, another comparison or run uses it (BlockingIOError), or files are in it
            or in the folder of a seed that a comparison would write over or remove (FileExistsError).
    """
    check_folder(request.out)
    if settings:  # what all share may have patterns of layers, which go with a granularity
        request = replace(request, extraction={**request.extraction, "granularity": settings[0].granularity})
    with locked(request.out):
        return _compare(request, seeds, settings, progress)


def _compare(request: Request, seeds: list[int], settings: list[Setting], progress: Progress) -> Rows:
    for setting in settings:
        _with(request, setting).settings.as_dict()  # bad ones are refused before any work
    path, identity = request.out / RESULTS, _identity(request)
    rows = _kept_rows(path, identity)
    for seed in seeds:
        check_free(_folder_of(request, seed), (CONFIG, *OF_A_RUN))
    comparison = Comparison(identity, rows, how_made(request))
    for seed in seeds:
        ours = replace(request, seed=seed, out=_folder_of(request, seed))
        ours.out.mkdir(parents=True, exist_ok=True)
        splits = request.workload.load(request.data_dir, seed, **request.data_options)
        data = _fingerprint(splits)
        _check_data(path, rows, seed, data)
        vanilla = cache(partial(trained_vanilla, ours, splits, progress))  # not where all rows are there
        for name, make in _methods(ours, splits, vanilla, settings, progress):
            done = rows.setdefault(name, [])
            if any(row["seed"] == seed for row in done):
                continue
            started = time.perf_counter()
            made = make()
            seconds = time.perf_counter() - started if made.seconds is None else made.seconds
            network = made.network
            row = leakage(network, ours.settings, splits, made.sparsity)
            row |= {"seconds": seconds, "epochs": made.epochs, "steps": made.steps, "needs": made.needs, "data": data}
            done.append({"seed": seed, **row, "macs": compacted_macs(network, splits.test.x)})
            comparison.write(path)
        shutil.rmtree(ours.out / UNDER_WAY, ignore_errors=True)
    return rows


def _folder_of(request: Request, seed: int) -> Path:
    return request.out / f"seed-{seed}"


def _kept_rows(path: Path, identity: dict[str, Any]) -> Rows:
    """What an earlier call has computed."""
    if not path.exists():
        check_free(path.parent, [REPORT])
        return {}
    kept = read_comparison(path)
    check_same_run(f"{path} holds another comparison; take another folder", kept.identity, identity)
    return kept.rows


def _fingerprint(splits: Splits) -> str:
    """Of all sets, the biased one by a few of its samples."""
    biased = "" if splits.vanilla is None else fingerprint(splits.vanilla)
    return biased + digest(*(part for name in ("train", "val", "test") for part in getattr(splits, name).identity()))


def _check_data(path: Path, rows: Rows, seed: int, data: str) -> None:
    """``OtherRunError`` where rows of this seed are of other data than this, which the folder named may now hold."""
    before = {row.get("data", data) for found in rows.values() for row in found if row["seed"] == seed}
    if before - {data}:
        raise OtherRunError(f"{path} holds a comparison on other data for seed {seed}; take another folder")


def _identity(request: Request) -> dict[str, Any]:
    """What results must agree in to stand in one table, whatever the methods and seeds."""
    settings = request.settings.as_dict()
    for name in ("seed", *(field.name for field in fields(Setting))):
        del settings[name]
    return {
        "workload": request.workload.name,
        "data_dir": request.data_dir and os.path.abspath(request.data_dir),
        "data_options": identifying_options(request),
        "vanilla_epochs": request.recipe and request.recipe.epochs,
        "settings": settings,
    }


@dataclass(frozen=True)
class Made:
    """What a method gave: the network, its sparsity, the epochs and steps that it took, and the data that it needed.

    The seconds are those of an extraction, which may have been cut off and continued; None for the time that it took
    to make the network just now.
    """

    network: nn.Module
    sparsity: float = 0.0
    epochs: int = 0
    steps: int = 0
    needs: str = "biased"
    seconds: float | None = None


def _methods(
    request: Request, splits: Splits, vanilla: Callable[[], nn.Module], settings: list[Setting], progress: Progress
) -> Iterator[tuple[str, Callable[[], Made]]]:
    """Every method by name, and how its network is made. Baselines get the same validation set."""
    base: Settings = request.settings
    train, val = splits.train, splits.val
    steps = base.steps_of(len(train.y))
    epochs = max(1, BASELINE_STEPS // steps)

    unbiased = f"{len(train.y)} + {len(val.y)} unbiased"

    def trained(function: Callable[..., nn.Module], model: Callable[[], nn.Module]) -> Made:
        return Made(function(model(), train, val, base, epochs), 0.0, epochs, epochs * steps, unbiased)

    yield "vanilla", lambda: Made(vanilla())
    for share in MAGNITUDE_SPARSITIES:
        yield f"magnitude {share:g}", partial(_by_magnitude, vanilla, share)
    yield "DFR", lambda: trained(refit_last_layer, vanilla)
    yield "all weights fine-tuned", lambda: trained(train_on_unbiased, vanilla)
    fresh = partial(request.workload.build_model, request.seed)
    yield "trained on the unbiased set alone", lambda: trained(train_from_scratch, fresh)
    for setting in settings:
        extraction = _Extracted(request, splits, vanilla, setting, progress)
        yield str(setting), extraction.pruned
        yield f"{setting}, fine-tuned", extraction.tuned


def _with(request: Request, setting: Setting) -> Request:
    return replace(request, extraction={**request.extraction, **asdict(setting)})


class _Extracted:
    """An extraction, done once it is asked for, and the two networks made of it.

    They are of FFW's last scores, and of the scores that BISE selected on the validation set.
    """

    def __init__(
        self,
        request: Request,
        splits: Splits,
        vanilla: Callable[[], nn.Module],
        setting: Setting,
        progress: Progress,
    ) -> None:
        self.task = extraction_task(_with(request, setting), splits)
        self.vanilla, self.progress = vanilla, progress
        self.folder = request.out / UNDER_WAY / re.sub(r"[^a-z0-9.]+", "-", str(setting).lower())
        self.best = setting.method == "bise"
        biased, val = len(self.task.train.y), len(splits.val.y)
        self.needs = f"{biased} biased, {val} unbiased to select" if self.best else f"{biased} + {val} unbiased"

    @cached_property
    def found(self) -> Extraction:
        try:
            return self._extracted()
        except OtherRunError as error:  # of another version of this package: its rows stand, its half of one does not
            self.progress.note(f"{self.folder}: begun anew, since its {error}")
            shutil.rmtree(self.folder)
            return self._extracted()

    def _extracted(self) -> Extraction:
        task = self.task
        return extract_by(
            self.vanilla(),
            task.train,
            task.val,
            task.settings,
            run_dir=self.folder,
            resume=True,
            progress=self.progress,
        )

    def pruned(self) -> Made:
        return self._made(self.found.model(self.best), self.found.metrics["seconds"], 0)

    def tuned(self) -> Made:
        found = self.found
        started = time.perf_counter()
        network = found.finetune(self.task.train, self.task.val, best=self.best)
        return self._made(network, time.perf_counter() - started, TUNING_EPOCHS)

    def _made(self, network: nn.Module, seconds: float, tuning_epochs: int) -> Made:
        masks, epochs = self.found.best_masks if self.best else self.found.masks, len(self.found.history)
        steps = (epochs + tuning_epochs) * self.task.settings.steps_of(len(self.task.train.y))
        return Made(network, sparsity(masks), epochs, steps, self.needs, seconds)


def _by_magnitude(vanilla: Callable[[], nn.Module], share: float) -> Made:
    return Made(prune_by_magnitude(vanilla(), share), share)


@torch.no_grad()
def compacted_macs(network: nn.Module, x: Inputs) -> int | None:
    """Multiply-accumulate operations a sample of the compacted network; None without the extra that compacts."""
    example = x[:2].to(next(network.parameters()))
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # of layers that stay whole
            small = compact(network, example)
    except ImportError:
        return None
    return macs(small, example)


def all_settings(
    methods: list[str], schedules: list[str], gammas: list[float], granularities: list[str]
) -> list[Setting]:
    """Every combination of FFW's, and BISE's own."""
    ffw = [Setting(*combination) for combination in product(schedules, gammas, granularities)]
    own = METHODS["bise"]
    bise = Setting(own["schedule"], own["gamma"], own["granularity"], "bise")
    return [*(ffw if "ffw" in methods else []), *([bise] if "bise" in methods else [])]
