"""One workload from data to metrics, in a run folder that can be left and taken up again."""

import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ffw_fast import own
from ffw_fast.attribution import explain
from ffw_fast.backend import backend_info, without_folders
from ffw_fast.bise import guessing_network, with_guessed_bias
from ffw_fast.convolutions import cheapest_convolutions
from ffw_fast.data.datasets import stream_note
from ffw_fast.data.samples import Inputs, Samples, Splits
from ffw_fast.distributed import Alone, processes
from ffw_fast.evaluation import evaluate_predictions
from ffw_fast.extract import extract
from ffw_fast.extraction import (
    BEST_SCORES,
    CONFIG,
    HISTORY,
    METRICS,
    MODEL,
    SCORES,
    Extraction,
    sparsity,
    weight_sparsity,
)
from ffw_fast.files import digest, read_json, read_tensors, sync_folder, write_json, write_tensors
from ffw_fast.gated_network import EVALUATION_BATCH, outputs_of
from ffw_fast.heads import PrivateHeads
from ffw_fast.interrupts import Terminated
from ffw_fast.measure import measure
from ffw_fast.ops import joint_distribution, joint_information
from ffw_fast.progress import Progress
from ffw_fast.run_folder import EXAMPLES, REPORT
from ffw_fast.run_lock import locked
from ffw_fast.run_state import CHECKPOINT, PREVIOUS, Checkpoints, RunState, check_same_run
from ffw_fast.seeding import seeded_generator
from ffw_fast.settings import Settings
from ffw_fast.theory import biasedness, label_information
from ffw_fast.vanilla import Recipe, train_vanilla
from ffw_fast.version import __version__
from ffw_fast.workloads import Workload, get_workload

VANILLA = "vanilla.safetensors"
VANILLA_RECORD = "vanilla.json"
VANILLA_CHECKPOINTS = Checkpoints.named("vanilla.checkpoint")  # while it is trained
# Of one extraction from one network.
RESULTS = (CHECKPOINT, PREVIOUS, SCORES, BEST_SCORES, MODEL, METRICS, HISTORY, EXAMPLES, REPORT)
STAGING = ".writing-"
MAY_DIFFER = (  # between resumed runs
    "title", "settings", "correlations", "max_epochs", "samples", "input_shape", "device", "versions", "machine",
    "backend",
)  # fmt: skip
SHUFFLES = 10  # of the labels, for the floor of the MI


@dataclass(frozen=True)
class Request:
    """What ``ffw-fast run`` was asked for.

    Attributes:
        data_dir: folder of the full data set; None for the digits that a package ships.
        data_options: the workload's own options.
        extraction: arguments of ``ffw_fast.extract`` that differ from its defaults.
        vanilla_epochs: of the biased network's training; None for the published number.
        guess_bias: BISE's bias labels are what a network says that was trained for one epoch.
        without_val: BISE gets no unbiased validation set.
        shard: as in ``ffw_fast.extract``.
    """

    workload: Workload
    out: Path
    seed: int = 0
    data_dir: str | None = None
    data_options: dict[str, Any] = field(default_factory=dict)
    extraction: dict[str, Any] = field(default_factory=dict)
    vanilla_epochs: int | None = None
    device: str | None = None
    resume: bool = False
    guess_bias: bool = False
    without_val: bool = False
    shard: bool = False

    def __post_init__(self) -> None:
        if (self.guess_bias or self.without_val) and self.extraction.get("method") != "bise":
            raise ValueError("guessed bias labels and running without a validation set go with method 'bise'")
        if self.vanilla_epochs is not None and self.vanilla_epochs < 1:
            raise ValueError(f"vanilla_epochs must be at least 1, got {self.vanilla_epochs}")

    @property
    def settings(self) -> Settings:
        """The settings of the extraction; ``ValueError`` where one of them is bad."""
        workload = self.workload
        given = {name: value for name, value in self.extraction.items() if value is not None}
        is_bise = given.get("method") == "bise"
        own = {"where": workload.bise_where} if is_bise else {"gamma": workload.default_gamma}
        classes = workload.num_classes if self.guess_bias else workload.num_bias_classes
        basis = {"bottleneck": workload.bottleneck, "num_bias_classes": classes, "batch_size": workload.batch_size}
        return Settings.of(**{**basis, **own, **given, "seed": self.seed})

    @property
    def recipe(self) -> Recipe | None:
        """How the biased network is trained; None where it is trained already."""
        recipe = self.workload.recipe(full=self.data_dir is not None)
        if recipe is None or self.vanilla_epochs is None:
            return recipe
        return replace(recipe, epochs=self.vanilla_epochs)


def run_workload(request: Request, progress: Progress) -> dict[str, Any]:
    """Train the biased network, extract the sub-network, measure both, write the run folder; the metrics.

    What an earlier run left in the folder stays until this one has something of its own to put there. After an
    interrupt in the extraction what was reached is measured and written too, beside the checkpoint to resume from, and
    the interrupt is raised again; a second one leaves the checkpoint only, as SIGTERM does at once.

    In a process group of ``torch.distributed`` the first process does all but the extraction itself, and writes; the
    others return no metrics.

    Raises:
        OSError: the folder cannot be written, or another run uses it (BlockingIOError), before any training.
        ValueError, ImportError, FloatingPointError: bad settings or data, a missing extra, a loss that diverges.
        MemoryError: out of memory; at which batch size.
        KeyboardInterrupt: see above.
    """
    group = processes()
    config = _config(request)
    group.together(lambda: check_device(request.device))
    with ExitStack() as stack:
        group.together(lambda: group.first(lambda: _take_folder(request, config, stack)))
        return _run_locked(request, config, progress, group)


def _take_folder(request: Request, config: dict[str, Any], stack: ExitStack) -> None:
    check_folder(request.out)
    stack.enter_context(locked(request.out))
    _remove_leftovers(request.out)
    if request.resume:
        _check_resumed(request.out, config)


def _run_locked(request: Request, config: dict[str, Any], progress: Progress, group: Alone) -> dict[str, Any]:
    clock = _StageClock()
    with progress:
        progress.stage("data")
        splits = group.together(lambda: request.workload.load(request.data_dir, request.seed, **request.data_options))
        sets = {name: getattr(splits, name) for name in ("vanilla", "train", "val", "test")}
        config["samples"] = {name: len(samples.y) for name, samples in sets.items() if samples is not None}
        config["input_shape"] = list(splits.train.x.shape[1:])
        for name in ("train", "val", "test"):
            progress.note(stream_note(sets[name], name))
        names = _bias_names(request.workload, splits.train.b.shape[1])
        clock.lap("data")
        task = extraction_task(request, splits)
        config["settings"] = task.settings.as_dict()
        vanilla = _shared_vanilla(request, splits, progress, group)
        clock.lap("vanilla")
        group.together(lambda: group.first(lambda: _begin(request, config)))
        found, complete = _extract_or_reach(request, task, vanilla, progress)
        if group.rank > 0:
            return {}
        clock.lap("extraction")
        progress.stage("measurement" if complete else "measurement of what was reached (Ctrl-C leaves at once)")
        metrics = _test_metrics(found, splits, request.seed)
        clock.lap("measurement")
    metrics |= {
        "epochs": len(found.history),
        "seconds": found.metrics["seconds"],
        "stages": clock.laps,
        "complete": complete,
        "bias_names": names,
        "warnings": found.warnings,
        "validation": found.metrics,
    }
    _write_results(request.out, found, config, metrics, splits.test)
    if not complete:
        raise KeyboardInterrupt
    return metrics


def _bias_names(workload: Workload, biases: int) -> list[str]:
    """The workload's names of its biases, or numbers where it has none."""
    if not workload.bias_names:
        return ["bias"] if biases == 1 else [f"bias {number}" for number in range(1, biases + 1)]
    if len(workload.bias_names) != biases:
        raise ValueError(f"there are {biases} biases in the data and {len(workload.bias_names)} names of biases")
    return list(workload.bias_names)


def _begin(request: Request, config: dict[str, Any]) -> None:
    """Make the folder this run's."""
    if not request.resume:
        _clear_results(request.out)
    write_json(request.out / CONFIG, config)


def _shared_vanilla(request: Request, splits: Splits, progress: Progress, group: Alone) -> nn.Module:
    """The biased network on every process; the first one trains it."""
    vanilla = group.together(lambda: group.first(lambda: trained_vanilla(request, splits, progress)))
    if vanilla is None:
        vanilla = request.workload.build_model(request.seed).to(request.device or "cpu").eval()
    group.copy_(*vanilla.state_dict().values())
    return vanilla


def prepare_vanilla(request: Request, progress: Progress) -> None:
    """Train the biased network alone, into the run folder, unless it is there already.

    Raises:
        OSError, ValueError, ImportError, FloatingPointError: as in ``run_workload``.
    """
    check_device(request.device)
    check_folder(request.out)
    with locked(request.out), progress:
        _remove_leftovers(request.out)
        progress.stage("data")
        splits = request.workload.load(request.data_dir, request.seed, **vanilla_options(request))
        trained_vanilla(request, splits, progress)


def is_finished(request: Request) -> bool:
    """Whether the run folder holds all results of this very request, its number of epochs included.

    Raises:
        ValueError: it holds another run.
    """
    config = _config(request)
    _check_resumed(request.out, config)
    try:
        kept, metrics = read_json(request.out / CONFIG), read_json(request.out / METRICS)
    except (FileNotFoundError, ValueError):  # not begun, or killed while it wrote
        return False
    settings = kept.get("settings")
    if isinstance(settings, dict) and config["settings"]["correlations"] is None:  # the data set's own stand there
        settings = {**settings, "correlations": None}
    return settings == config["settings"] and metrics.get("complete") is True


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


def _extract_or_reach(request: Request, task: Task, vanilla: nn.Module, progress: Progress) -> tuple[Extraction, bool]:
    """The extraction, and whether it came to its end: after an interrupt it is what the checkpoint holds, if any."""
    settings = task.settings
    try:
        return _extract(request, task, vanilla, progress), True
    except Terminated:  # whoever sends SIGTERM sends SIGKILL next
        raise
    except KeyboardInterrupt:
        if processes().count > 1:  # the others may be past it or behind it
            raise
        checkpoint = request.out / CHECKPOINT
        if not checkpoint.exists():
            raise
        ended = replace(task, settings=replace(settings, max_epochs=_epochs_done(checkpoint)))
        found = _extract(replace(request, resume=True), ended, vanilla, Progress())
        return replace(found, settings=settings), False


def _epochs_done(checkpoint: Path) -> int:
    with safe_open(checkpoint, framework="pt") as file:
        return len(json.loads(file.metadata()["record"])["history"])


def _extract(request: Request, task: Task, vanilla: nn.Module, progress: Progress) -> Extraction:
    return extract(
        vanilla,
        task.train,
        task.val,
        run_dir=request.out,
        resume=request.resume,
        shard=request.shard,
        progress=progress,
        **task.settings.as_dict(),
    )


class _StageClock:
    """Seconds that each stage of a run took."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.laps[stage], self._last = now - self._last, now


def check_device(device: str | None) -> None:
    """``ValueError`` for a device that PyTorch does not know or cannot compute on."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # PyTorch's own wording, without its advice to developers
        raise ValueError(f"cannot run on device {device!r}: {str(error).splitlines()[0]}") from error


def check_folder(out: Path) -> None:
    """Make the folder; ``OSError`` with its name where it cannot be made or written."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"the run folder {out} is a file")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out, prefix=STAGING):
            pass
    except OSError as error:
        raise type(error)(f"the run folder {out} cannot be written: {error.strerror or error}") from error


def _check_resumed(out: Path, config: dict[str, Any]) -> None:
    """``OtherRunError`` where the folder holds another run than the one that is to be continued."""
    if not (out / CONFIG).exists():
        return
    check_same_run(f"{out} holds another run, which cannot be resumed", read_json(out / CONFIG), config, MAY_DIFFER)


def _remove_leftovers(out: Path) -> None:
    """Remove what a run that was killed left half written."""
    for path in out.glob(f"{STAGING}*"):
        shutil.rmtree(path, ignore_errors=True)
    for pattern in ("*.tmp", "*.new"):
        for path in out.glob(pattern):
            path.unlink(missing_ok=True)


def _clear_results(out: Path) -> None:
    """Remove what another extraction left, so that no file belongs to another run than the one beside it."""
    for name in RESULTS:
        (out / name).unlink(missing_ok=True)


def _write_results(
    out: Path, found: Extraction, config: dict[str, Any], metrics: dict[str, Any], test: Samples
) -> None:
    """Write the extraction and the run's own records beside it, then move all of it into the folder at once."""
    with TemporaryDirectory(dir=out, prefix=STAGING) as staging:
        found.save(staging)
        if examples := explain({"vanilla": found.dense_model.eval(), "pruned": found.model()}, test):
            write_tensors(Path(staging) / EXAMPLES, examples)
        write_json(Path(staging) / CONFIG, config)
        write_json(Path(staging) / METRICS, metrics)
        (out / REPORT).unlink(missing_ok=True)  # it is of what stood here before
        for path in sorted(Path(staging).iterdir(), key=lambda path: path.name == METRICS):  # it comes last
            path.replace(out / path.name)
        sync_folder(out)


def _config(request: Request) -> dict[str, Any]:
    """What was asked for, and of which software on which machine."""
    return {
        "workload": request.workload.name,
        "title": request.workload.title,
        "seed": request.seed,
        "data_dir": request.data_dir and os.path.abspath(request.data_dir),
        "data_options": request.data_options,
        "vanilla_recipe": _as_json(request.recipe),
        "settings": request.settings.as_dict(),
        "guess_bias": request.guess_bias,
        "without_val": request.without_val,
        **how_made(request),
    }


def how_made(request: Request) -> dict[str, Any]:
    """Of which software on which machine."""
    return {
        "device": request.device or "cpu",
        "versions": {"ffw_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": {
            "system": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
        },
        "backend": without_folders(backend_info()),
    }


def _as_json(recipe: Recipe | None) -> dict[str, Any] | None:
    return None if recipe is None else {**asdict(recipe), "milestones": list(recipe.milestones)}


def vanilla_options(request: Request) -> dict[str, Any]:
    """The workload's options without those of the unbiased sets."""
    others = {option.name for option in request.workload.options if option.of_unbiased_sets}
    return {name: value for name, value in request.data_options.items() if name not in others}


def vanilla_identity(request: Request) -> dict[str, Any]:
    """What the biased network depends on: requests that agree in it can share one."""
    return {
        "workload": request.workload.name,
        "data_dir": request.data_dir and os.path.abspath(request.data_dir),
        "data_options": vanilla_options(request),
        "seed": request.seed,
        "recipe": _as_json(request.recipe),
        "precision": request.settings.precision,
    }


def trained_vanilla(request: Request, splits: Splits, progress: Progress) -> nn.Module:
    """The biased network: as it comes if it is trained, else the run folder's if it was trained so there, else new.

    A training that was cut off goes on from its checkpoint where that is of the same network.
    """
    recipe, settings = request.recipe, request.settings
    model = request.workload.build_model(request.seed)
    record = {**vanilla_identity(request), "samples": splits.vanilla and len(splits.vanilla.y)}
    if recipe is None or splits.vanilla is None:
        if not (request.resume and (request.out / VANILLA).exists()):  # the checkpoint is checked against the weights
            _keep_vanilla(request.out, record, model)
        return model.to(request.device or "cpu").eval()
    if (kept := _kept_vanilla(request.out, record)) is not None:
        model.load_state_dict(kept)
        VANILLA_CHECKPOINTS.remove_from(request.out)  # which a kill may have left
        return model.to(request.device or "cpu").eval()
    progress.stage("vanilla training", recipe.epochs)
    with RunState(request.out, record, resume=True, files=VANILLA_CHECKPOINTS) as state:
        train_vanilla(
            model,
            splits.vanilla,
            recipe,
            seed=request.seed,
            device=request.device,
            precision="bf16" if settings.precision == "bf16" else "fp32",
            val=splits.val,
            on_epoch=lambda epoch, loss: progress.tick(epoch, f"loss {loss:.4f}"),
            state=state,
        )
    if not request.resume:  # else the checkpoint is checked against these weights
        _clear_results(request.out)
    _keep_vanilla(request.out, record, model)
    VANILLA_CHECKPOINTS.remove_from(request.out)
    return model


def _kept_vanilla(out: Path, record: dict[str, Any]) -> dict[str, Tensor] | None:
    """The weights of the folder's biased network, if it is whole and was trained as the record says."""
    try:
        kept, (weights, _) = read_json(out / VANILLA_RECORD), read_tensors(out / VANILLA)
    except (OSError, ValueError):
        return None
    return weights if kept == {**record, "weights": _digest(weights)} else None


def _keep_vanilla(out: Path, record: dict[str, Any], model: nn.Module) -> None:
    weights = {name: value.contiguous().cpu() for name, value in model.state_dict().items()}
    with TemporaryDirectory(dir=out, prefix=STAGING) as staging:
        write_tensors(Path(staging) / VANILLA, weights)
        write_json(Path(staging) / VANILLA_RECORD, {**record, "weights": _digest(weights)})
        for name in (VANILLA, VANILLA_RECORD):
            (Path(staging) / name).replace(out / name)


def _digest(weights: dict[str, Tensor]) -> str:
    return digest(*(weights[name] for name in sorted(weights)))


def load_run(folder: str | os.PathLike[str], model: str | None = None) -> Extraction:
    """The extraction of a run folder, with the biased network that stands beside it, on the CPU.

    No code is run that the folder names, so that one from a stranger can be read.

    Args:
        model: of a run of ``own`` alone: ``module:function`` that builds the network, as it was given to the run.

    Raises:
        FileNotFoundError: the folder holds no finished run.
        ValueError: a file is damaged, the workload is unknown or has another network now, or ``model`` is not given to
            a run of ``own``, or given to another one.
        ImportError, TypeError: the model's module or function cannot be used.
    """
    folder = Path(folder)
    if missing := [name for name in (CONFIG, VANILLA, SCORES) if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} holds no finished run of ffw-fast: it has no {', '.join(missing)}")
    config = read_json(folder / CONFIG)
    network = _network_of_run(folder, str(config.get("workload")), model)  # its weights are read below
    weights, _ = read_tensors(folder / VANILLA)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{folder / VANILLA} does not fit {type(network).__name__}: {error}") from error
    return Extraction.load(folder, network.eval())


def _network_of_run(folder: Path, workload: str, model: str | None) -> nn.Module:
    """The network of a run's workload, or of ``own`` what the user's function builds, never one that a file names."""
    if workload != own.NAME:
        if model is not None:
            raise ValueError(f"{folder} holds a run of {workload}, which has a network of its own: leave out the model")
        return get_workload(workload).build_model(seed=0)
    if model is None:
        raise ValueError(
            f"{folder} holds a run of your own model, which is built by a function of yours; {CONFIG} has its name "
            "(data_options.model), but what a file names is not called, as a stranger's folder could run any code so: "
            "give the function by --model MODULE:FUNCTION, in Python load_run(folder, model='module:function')"
        )
    return own.make_network(model)


def _test_metrics(found: Extraction, splits: Splits, seed: int) -> dict[str, Any]:
    """The biased network, the pruned one and the best one on the unbiased test set."""
    kept = {layer: torch.ones_like(mask) for layer, mask in found.masks.items()}
    networks: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
        "vanilla": (lambda: found.dense_model.eval(), kept),
        "pruned": (found.model, found.masks),
        "best": (lambda: found.model(best=True), found.best_masks),
    }
    settings = found.settings
    return {
        name: leakage(
            network(),
            settings.bottleneck,
            settings.num_bias_classes,
            splits.for_heads,
            splits.test,
            seed=seed,
            batch_size=settings.batch_size,
            sparsity=sparsity(masks),
        )
        | {
            "weight_sparsity": weight_sparsity(found.dense_model, settings, masks),
            "layer_sparsity": {layer: _pruned_share(mask) for layer, mask in masks.items()},
        }
        for name, (network, masks) in networks.items()
    }


def _pruned_share(mask: Tensor) -> float:
    return (~mask).double().mean().item()


def leakage(
    network: nn.Module,
    bottleneck: str,
    num_bias_classes: int,
    train: Samples,
    test: Samples,
    *,
    seed: int,
    batch_size: int,
    sparsity: float = 0.0,
) -> dict[str, Any]:
    """Task accuracy of a network and what private heads, fitted afresh on its features, read of the biases.

    Heads are fitted on ``train`` and measured on ``test``. ``bias_mi_floor`` is the MI of the same predictions with
    shuffled labels: what the formula gives where there is nothing to read. ``biasedness`` and ``output_mi`` are of the
    network's own answers: see ``ffw_fast.theory``.
    """
    device = next(network.parameters()).device
    train, test = train.to(device), test.to(device)
    with cheapest_convolutions(network, test.x[:2]):
        logits, test_features = _outputs(network, bottleneck, test.x)
        heads = PrivateHeads.create(
            train.b.shape[1], num_bias_classes, test_features.shape[1], seed=seed, batch_size=batch_size, device=device
        )
        heads.fit_on(train, lambda x: _outputs(network, bottleneck, x)[1])
    head_logits = heads.logits(test_features)
    predictions, biases = logits.argmax(1).cpu(), test.b.cpu()
    groups = evaluate_predictions(predictions, test.y.cpu(), biases)
    classes = max(logits.shape[1], num_bias_classes)
    return {
        **measure(logits, head_logits, test.y, test.b, sparsity).as_dict(),
        "bias_mi_floor": information_floor(head_logits, test.b, seed),
        "biasedness": [_known(biasedness(predictions, test.y.cpu(), column)) for column in biases.T],
        "output_mi": [label_information(column, predictions, classes) for column in biases.T],
        "groups": groups.as_dict(),
    }


def _known(value: float) -> float | None:
    """As JSON has it: None for NaN."""
    return None if math.isnan(value) else value


def _outputs(network: nn.Module, bottleneck: str, x: Inputs) -> tuple[Tensor, Tensor]:
    """Logits (n, C) and features (n, D) of all samples."""
    parts = [outputs_of(network, bottleneck, batch) for batch in x.split(EVALUATION_BATCH)]
    logits, features = zip(*parts, strict=True)
    return torch.cat(logits), torch.cat(features).flatten(1)


def information_floor(head_logits: Tensor, b: Tensor, seed: int) -> list[float]:
    """Mean MI of each head's predictions with labels in random order: logits (n, heads, K), labels (n, heads)."""
    source = seeded_generator(seed, "shuffled labels")
    shuffled = [b[torch.randperm(len(b), generator=source).to(b.device)] for _ in range(SHUFFLES)]
    values = [joint_information(joint_distribution(head_logits, labels)) for labels in shuffled]
    return torch.stack(values).mean(0).tolist()
