"""What a run should make one doubt, in plain words: nothing to remove or find, a poor bottleneck, too few epochs.

Each function gives the warnings that hold, none where all is well. They end up in ``Extraction.warnings``.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ffw_fast.bottleneck import bottleneck_module
from ffw_fast.flat_gates import FlatGates
from ffw_fast.masking import ungated_weights
from ffw_fast.measure import Measurement
from ffw_fast.parts import DENSE_LAYERS
from ffw_fast.schedule import COOLING, LARGEST_FALL, AdaptiveSchedule, Schedule
from ffw_fast.settings import DEFAULTS, Settings

DEVIATIONS = 2.0  # of an accuracy at chance from it, by chance
MOST_NAMES = 8  # in a line
MOST_WITHOUT_GRADIENT = 0.5  # share of the gates
COLLAPSE = 0.9  # of the most that T may fall


def of_settings(settings: Settings) -> Iterator[str]:
    """Of what was asked for and does nothing."""
    if settings.schedule != "adaptive" and settings.anneal_rate != DEFAULTS["anneal_rate"]:
        yield (
            f"anneal_rate={settings.anneal_rate:g} changes nothing: it is of schedule 'adaptive', and the schedule is "
            f"{settings.schedule!r}"
        )


def of_vanilla(vanilla: Measurement, y: Tensor, b: Tensor) -> Iterator[str]:
    """Of the biased network as it is, on unbiased samples with targets y (n,) and biases b (n, heads)."""
    if vanilla.task_accuracy <= highest_by_chance(y):
        yield (
            f"the biased network's accuracy on unbiased samples is at chance ({vanilla.task_accuracy:.3f}): the bias "
            "is all that it learned, so there may be no unbiased sub-network to find"
        )
    for index, accuracy in enumerate(vanilla.bias_accuracy):
        if accuracy <= highest_by_chance(b[:, index]):
            yield (
                f"the private head of bias {index} does not beat chance on the biased network ({accuracy:.3f}): there "
                "is nothing of this bias to remove, or its labels are not those of the samples"
            )


def highest_by_chance(labels: Tensor) -> float:
    """What an accuracy that knows only the most frequent label may reach, up to two standard deviations."""
    share = int(labels.bincount().max()) / len(labels)
    return share + DEVIATIONS * math.sqrt(share * (1 - share) / len(labels))


def of_layers(model: nn.Module) -> Iterator[str]:
    """Of weights that have no gates."""
    if weights := ungated_weights(model):
        shown = ", ".join(weights[:MOST_NAMES]) + f" and {len(weights) - MOST_NAMES} more" * (len(weights) > MOST_NAMES)
        yield (
            f"the weights {shown} have no gates and stay as they are, whatever they know of the bias: gates are of "
            f"{', '.join(layer.__name__ for layer in DENSE_LAYERS)}, and not of their subclasses"
        )


@torch.no_grad()
def of_bottleneck(network: nn.Module, bottleneck: str, x: Tensor) -> Iterator[str]:
    """Of what flows through the bottleneck of a network in eval mode, seen on a few samples x (n, ...).

    Nothing of the network but its gates requires gradients.
    """
    kept: list[Tensor] = []

    def hold_fixed(_module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        """Every sample gets the features of the first."""
        kept.append(output)
        return output[:1].expand_as(output).clone()

    logits = network(x.clone())
    with bottleneck_module(network, bottleneck).register_forward_hook(hold_fixed), torch.enable_grad():
        fixed = network(x.clone())
    if not kept[0].requires_grad:
        yield (
            f"no gate acts on what bottleneck {bottleneck!r} gives, so that nothing of the bias can be removed there: "
            "no layer with gates lies before it, or gradients are not followed so far (torch.no_grad, a reentrant "
            "checkpoint)"
        )
    tolerance = 1e-3 * float(logits.abs().max())
    if not _same(fixed, fixed[:1].expand_as(fixed), tolerance):
        yield (
            f"bottleneck {bottleneck!r} feeds only a part of the network: with its output held fixed the logits still "
            "differ between samples, so that the bias may reach them around it"
        )
    if _same(fixed, logits, tolerance) and not _same(kept[0], kept[0][:1].expand_as(kept[0]), 0.0):
        yield (
            f"the logits do not depend on bottleneck {bottleneck!r}: whatever is removed there, the network's answers "
            "stay as they are"
        )


def _same(once: Tensor, again: Tensor, tolerance: float) -> bool:
    return bool(((once - again).abs() <= tolerance).all())


def of_gates(gates: FlatGates, second_moments: Tensor) -> Iterator[str]:
    """Of gates that never got a gradient: Adam's second moments, flat as the scores, are exactly 0 there."""
    heard = torch.stack([(part != 0).sum(dtype=torch.float64) for part in gates.parts(second_moments).values()])
    pairs = zip(gates.counts.items(), gates.total_(heard).tolist(), strict=True)
    silent = {name: 1 - found / count for (name, count), found in pairs}
    for name, share in silent.items():
        if share == 1:
            yield (
                f"no gate of layer {name!r} ever got a gradient, so nothing of it is pruned: its weights are 0, its "
                "units are dead, or nothing that is trained depends on it"
            )
    share = sum(silent[name] * gates.counts[name] for name in silent) / gates.count
    if MOST_WITHOUT_GRADIENT < share < 1:
        yield (
            f"{share:.0%} of the gates never got a gradient, so they stay open: their weights are 0, or their inputs "
            "or their units are dead"
        )


def of_schedule(schedule: Schedule, gates: FlatGates, epochs: int) -> Iterator[str]:
    """Of a run that ended after so many epochs before T was where its schedule ends. To be called on all processes."""
    temperature = gates.temperature.item()
    if schedule.has_ended(temperature):
        return
    left = "the gates are open or shut, but the scores that decide which were not trained to the end"
    if gates.half_open() > 0:
        left = (
            "gates are still partly open that pruning shuts, so the pruned network is not yet the one that was trained"
        )
    remedy = "allow more epochs (max_epochs)" + (" or take a larger anneal_rate" if schedule.anneals else "")
    yield (
        f"the run ended after {epochs} epoch{'s' * (epochs > 1)}, before its schedule did: T is {temperature:.2g} and "
        f"was to fall to {schedule.last_temperature:.2g}; {left}: {remedy}"
    )


def of_annealing(schedule: Schedule, temperature: float, steps: int) -> Iterator[str]:
    """Of an adaptive schedule that brought T from 1 to this temperature in so many steps."""
    fall = -math.log(temperature)
    if (
        isinstance(schedule, AdaptiveSchedule)
        and temperature <= 1 / COOLING  # at T = 1 gates hardly feel T, so that it always begins to fall fast
        and fall >= COLLAPSE * LARGEST_FALL * steps
    ):
        yield (
            f"anneal_rate={schedule.anneal_rate:g} is so large that it hardly held T back, which collapsed to "
            f"{temperature:.2g} in {steps} steps, by {LARGEST_FALL:.0%} in most, the most it may fall: gates were "
            "thrown to the sides they leaned to before others could make up for them: take a smaller anneal_rate"
        )
