"""The public entry ``extract``: finds the unbiased sub-network of a biased network."""

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ffw_fast.backend import backend_info
from ffw_fast.bise_loop import BiseLoop
from ffw_fast.copies import state_tensors
from ffw_fast.data.datasets import reading_note
from ffw_fast.distributed import processes
from ffw_fast.extraction import Extraction
from ffw_fast.files import digest
from ffw_fast.inputs import check_device, prepare
from ffw_fast.loop import Loop
from ffw_fast.modes import training_modes
from ffw_fast.progress import Progress, make_progress
from ffw_fast.run_state import RunState
from ffw_fast.settings import Settings


def extract(
    model: nn.Module,
    train: Any,
    val: Any,
    *,
    bottleneck: str,
    num_bias_classes: int,
    method: str = "ffw",
    gamma: float | None = None,
    alpha: float = 1.0,
    gate: str | None = None,
    granularity: str | None = None,
    schedule: str | None = None,
    anneal_rate: float = 1e-4,
    max_epochs: int = 200,
    batch_size: int = 100,
    seed: int = 0,
    precision: str = "fp32",
    where: str | None = None,
    correlations: Sequence[float] | None = None,
    aligned: Sequence[int] | None = None,
    cache_augmented: bool = False,
    device: torch.device | str | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    shard: bool = False,
    progress: bool | Progress = True,
) -> Extraction:
    """Find the unbiased sub-network of a biased network by learning one gate per frozen weight.

    Minimises ``alpha CE + gamma mean_i MI_i`` by Adam on the gate scores, with private heads that read the biases off
    the bottleneck and are refitted once an epoch, while the temperature T of the gates falls.

    With ``method="bise"`` the training set is the biased one, and no unbiased set is needed: see ``ffw_fast.bise`` for
    the objective. What is None below takes the method's own default, FFW's before BISE's:

    =========== ============ =============
    gamma       10           1
    gate        "ffw"        "hard"
    granularity "weight"     "channel"
    schedule    "published"  "halving"
    =========== ============ =============

    Args:
        model: a trained classifier, (n, ...) -> logits (n, classes). It is copied, frozen and run in eval mode; the
            model itself stays as it is.
        train, val: unbiased sets; for BISE ``train`` is the biased one and ``val`` may be None. Tensors ``(x, y, b)``
            with x float (n, ...), y (n,) and b (n,) or (n, biases), or a Dataset or DataLoader that yields
            ``(x, (y, b...))``, ``(x, y, b)`` or ``(index, x, y, attributes)``. What fits into memory and stays the same
            is read once and kept; else it is read in every pass, and where it augments at random the heads are
            refitted without cached features: see ``cache_augmented``.
        bottleneck: name of the module whose output is the features that must not tell the bias.
        num_bias_classes: K, the number of classes of each bias.
        method: "ffw" or "bise".
        gamma, alpha: weights of the mutual information and of the cross-entropy.
        gate: "ffw", "hard", "bernoulli" or "concrete".
        granularity: "weight", one gate per weight; or "channel", one gate per output channel or neuron, behind every
            non-linearity that a layer's output reaches (``ffw_fast.channels``), so that what is pruned is structured.
        schedule: "published", T falls tenfold where the validation MI is on a plateau, from 1 to below 1e-8; or
            "adaptive", T falls in every step by what the gates feel of it; or "halving", T halves every 10 epochs.
        anneal_rate: of the adaptive schedule: how far the mean gate may move in one step through T's fall.
        max_epochs: the run ends there even where the schedule has not; ``Extraction.warnings`` says so.
        batch_size: of the gates, of the heads and of the validation MI.
        seed: of the heads' start, the order of samples and random gates. The global generators are not touched.
        precision: "fp32", or "bf16" for autocast: other results, for processors that have instructions for it.
        where: with channel gates, shell-style patterns of layer names, separated by commas ("layer1.*, layer2.*"): only
            the channels of these are gated.
        correlations: of BISE: for each bias the probability that it goes with the target in ``train``, strictly between
            0 and 1. Default: importance weights are counted from the labels.
        aligned: of BISE: the bias label that goes with each target. Default: the target's own number.
        cache_augmented: with samples that are augmented at random, fit the heads on the features of one draw, computed
            once a fit, and not of a new draw in every epoch of it: other results, in far fewer passes.
        device: where to run; default: where the model is.
        run_dir: a folder for checkpoints; without ``resume`` those that are there are replaced.
        resume: continue from the run folder's newest checkpoint, where there is one.
        shard: on several processes, let each keep scores, moments and best scores of its share of the gates alone.
        progress: whether to show it on standard error.

    Returns:
        The scores, the best scores (lowest mean validation bias accuracy of the pruned network, judged at each tenfold
        fall of T and at the end; for BISE the highest task accuracy on ``val``, judged every epoch, or without ``val``
        the last ones), the history of epochs and the metrics on ``val`` (or ``train``). BISE's metrics say by
        ``selection`` and ``measured_on`` which it was.

    Raises:
        ValueError, TypeError: bad input; what was given and expected, before any training.
        FloatingPointError: a loss or a score that is no longer finite; at which step and where in the network.
        MemoryError: out of memory; at which batch size.
        BlockingIOError: another run uses the run folder.
    """
    return extract_by(
        model,
        train,
        val,
        Settings.of(
            bottleneck=bottleneck,
            num_bias_classes=num_bias_classes,
            method=method,
            gamma=gamma,
            alpha=alpha,
            gate=gate,
            granularity=granularity,
            schedule=schedule,
            anneal_rate=anneal_rate,
            max_epochs=max_epochs,
            batch_size=batch_size,
            seed=seed,
            precision=precision,
            where=where,
            correlations=correlations,
            aligned=aligned,
            cache_augmented=cache_augmented,
        ),
        device=device,
        run_dir=run_dir,
        resume=resume,
        shard=shard,
        progress=progress,
    )


@training_modes()
def extract_by(
    model: nn.Module,
    train: Any,
    val: Any,
    settings: Settings,
    *,
    device: torch.device | str | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    shard: bool = False,
    progress: bool | Progress = True,
    begin: Callable[[], None] = lambda: None,
) -> Extraction:
    """The same by settings that were checked already; ``begin`` as for ``RunState``."""
    if resume and run_dir is None:
        raise ValueError("resume needs run_dir, the folder that holds the checkpoint")
    group, is_ffw = processes(shard), settings.method == "ffw"
    check_processes(settings, group.count)
    group.together(lambda: check_device(device))
    problem = group.together(lambda: prepare(model, train, val, settings))
    target = torch.device(device) if device is not None else next(model.parameters()).device
    on_target = problem.to(target)
    loop = Loop(on_target, group) if is_ffw else BiseLoop(on_target, selects=val is not None)
    if group.rank > 0:  # the first process writes and shows for all
        run_dir, resume, progress = None, False, False
    with make_progress(progress) as shown:
        for name, given, samples in (("train", train, problem.train), ("val", val, problem.val)):
            if given is not None:
                shown.note(reading_note(given, samples, name))
        identity = {
            **settings.as_dict(),
            "modules": _digest_of_modules(problem.model),
            "weights": digest(*state_tensors(problem.model).values()),
            "data": digest(*problem.train.identity(), *problem.val.identity()),
        }
        group.check_same({**identity, **computing(target), "max_epochs": settings.max_epochs, "shard": shard})
        with group.together(lambda: RunState(run_dir, identity, resume, begin=begin)) as state:
            loop.run(state, shown)
    return loop.extraction(model)


def check_processes(settings: Settings, count: int) -> None:
    """``ValueError`` for what so many processes cannot extract together."""
    if settings.batch_size < count:
        raise ValueError(f"batch_size must be at least the number of processes, {count}, got {settings.batch_size}")
    if count > 1 and settings.method != "ffw":
        raise ValueError(f"method {settings.method!r} runs on one process, not on {count}; 'ffw' runs on several")


def _digest_of_modules(model: nn.Module) -> str:
    """A short fingerprint of what the model says of its modules, but for where they lie in memory."""
    said = re.sub(r" at 0x[0-9a-f]+", "", repr(model))
    return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()


def computing(device: torch.device) -> dict[str, Any]:
    """What the processes of a group must have in common so that equal numbers stay equal to the last bit."""
    instructions = backend_info()["cpu"].get("instruction_set") if device.type == "cpu" else None
    threads = torch.get_num_threads()
    return {"device": device.type, "threads": threads, "torch": torch.__version__, "instructions": instructions}
