"""The biased network of a run: trained once, kept in the run's folder, and taken from there the next time."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from ffw_fast.copies import state_tensors
from ffw_fast.data.pixels import Pixels
from ffw_fast.data.samples import Samples, Splits
from ffw_fast.distributed import Alone
from ffw_fast.files import digest, read_json, read_tensors, write_json, write_tensors
from ffw_fast.inputs import check_device
from ffw_fast.progress import Progress
from ffw_fast.run_lock import locked
from ffw_fast.run_state import RunState
from ffw_fast.runs.request import Request, config_of, vanilla_identity, vanilla_options
from ffw_fast.runs.writing import (
    STAGING,
    VANILLA,
    VANILLA_CHECKPOINTS,
    VANILLA_RECORD,
    check_folder,
    check_own,
    check_resumed,
    clear_results,
    remove_leftovers,
)
from ffw_fast.vanilla import train_vanilla

FINGERPRINT_SAMPLES = 1000


def prepare_vanilla(request: Request, progress: Progress) -> None:
    """Train the biased network alone, into the run folder, unless it is there already.

    Raises:
        OSError, ValueError, ImportError, FloatingPointError: as in ``run_workload``.
    """
    check_device(request.device)
    check_folder(request.out)
    check_own(request.out)
    with locked(request.out), progress:
        if request.resume:
            check_resumed(request.out, config_of(request))
        remove_leftovers(request.out)
        progress.stage("data")
        splits = request.workload.load(request.data_dir, request.seed, **vanilla_options(request))
        model = trained_vanilla(request, splits, progress)
        if is_given(request, splits):
            kept = _kept_vanilla(request.out, _record(request, splits))
            if kept is None or _digest(kept) != _digest(state_tensors(model)):  # what is there is of another network
                clear_results(request.out)
            keep_vanilla(request, splits, model)


def shared_vanilla(request: Request, splits: Splits, progress: Progress, group: Alone) -> nn.Module:
    """The biased network on every process; the first one trains it."""
    vanilla = group.together(lambda: group.first(lambda: trained_vanilla(request, splits, progress)))
    if vanilla is None:
        vanilla = request.workload.build_model(request.seed).to(request.device or "cpu").eval()
    group.copy_(*state_tensors(vanilla).values())
    return vanilla


def trained_vanilla(request: Request, splits: Splits, progress: Progress) -> nn.Module:
    """The biased network: as it comes if it is given, else the run folder's if it was trained so there, else new.

    A training that was cut off goes on from its checkpoint where that is of the same network.
    """
    recipe, settings = request.recipe, request.settings
    model = request.workload.build_model(request.seed)
    record = _record(request, splits)
    if recipe is None or splits.vanilla is None:
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
            precision=settings.precision,
            val=splits.val,
            on_epoch=lambda epoch, loss: progress.tick(epoch, f"loss {loss:.4f}"),
            state=state,
        )
    if not request.resume:  # else the checkpoint is checked against these weights
        clear_results(request.out)
    keep_vanilla(request, splits, model)
    VANILLA_CHECKPOINTS.remove_from(request.out)
    return model


def is_given(request: Request, splits: Splits) -> bool:
    """Whether the biased network comes trained."""
    return request.recipe is None or splits.vanilla is None


def _record(request: Request, splits: Splits) -> dict[str, Any]:
    """How the biased network came to be."""
    samples = splits.vanilla
    seen = None if samples is None else {"samples": len(samples.y), "data": fingerprint(samples)}
    return {**vanilla_identity(request), **(seen or {"samples": None})}


def fingerprint(samples: Samples) -> str:
    """Of all labels, and of the inputs of a few samples: to read all images of a large set would take minutes."""
    x = samples.x
    rows = torch.linspace(0, len(x) - 1, min(len(x), FINGERPRINT_SAMPLES), device="cpu").long()
    return digest(x.few(rows) if isinstance(x, Pixels) else x[rows], samples.y, samples.b)


def _kept_vanilla(out: Path, record: dict[str, Any]) -> dict[str, Tensor] | None:
    """The weights of the folder's biased network, if it is whole and was trained as the record says."""
    try:
        kept, (weights, _) = read_json(out / VANILLA_RECORD), read_tensors(out / VANILLA)
    except (OSError, ValueError):
        return None
    return weights if kept == {**record, "weights": _digest(weights)} else None


def keep_vanilla(request: Request, splits: Splits, model: nn.Module) -> None:
    """Write the biased network into the run folder, with a record of how it came to be."""
    out, record = request.out, _record(request, splits)
    weights = {
        name: value.clone(memory_format=torch.contiguous_format).cpu() for name, value in state_tensors(model).items()
    }
    with TemporaryDirectory(dir=out, prefix=STAGING) as staging:
        write_tensors(Path(staging) / VANILLA, weights)
        write_json(Path(staging) / VANILLA_RECORD, {**record, "weights": _digest(weights)})
        for name in (VANILLA, VANILLA_RECORD):
            (Path(staging) / name).replace(out / name)


def _digest(weights: dict[str, Tensor]) -> str:
    return digest(*(weights[name] for name in sorted(weights)))
