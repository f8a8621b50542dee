"""How good a classifier is, by groups: average, worst group, with and against the bias."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ffw_fast.checks import check_integer
from ffw_fast.copies import copy_of
from ffw_fast.data.samples import EVALUATION_BATCH, Inputs, batches_of
from ffw_fast.inputs import as_samples, check_device
from ffw_fast.modes import evaluation_mode


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in [0, 1] of one classifier on one set.

    A group is the samples of one target and one combination of biases that occurs in the set. A sample is aligned with
    a bias where the bias label equals the target label, else it conflicts.

    Attributes:
        average: over all samples.
        worst_group: the lowest accuracy of a group.
        bias_worst_group: for each bias, the lowest accuracy over pairs of a target and that bias alone; the groups are
            larger than those of ``worst_group`` where there are several biases.
        bias_aligned: for each bias, over the samples aligned with it; NaN where there are none.
        bias_conflicting: for each bias, over the samples that conflict with it; NaN where there are none.
        cells: by which biases a sample is aligned with, such as "aligned/conflicting" for two biases; those that occur.
        groups: (target, bias, ...) -> accuracy.
        sizes: (target, bias, ...) -> number of samples.
    """

    average: float
    worst_group: float
    bias_worst_group: list[float]
    bias_aligned: list[float]
    bias_conflicting: list[float]
    cells: dict[str, float]
    groups: dict[tuple[int, ...], float]
    sizes: dict[tuple[int, ...], int]

    def as_dict(self, groups: bool = False) -> dict[str, Any]:
        """Ready for JSON, NaN as None; the groups one by one, of which there may be many, only where asked for."""
        record = asdict(self)
        del record["groups"], record["sizes"]
        for name in ("bias_aligned", "bias_conflicting"):
            record[name] = [None if math.isnan(value) else value for value in record[name]]
        if groups:
            record["groups"] = [
                {"target": key[0], "bias": list(key[1:]), "accuracy": accuracy, "size": self.sizes[key]}
                for key, accuracy in self.groups.items()
            ]
        return record


def evaluate(
    model: nn.Module,
    data: Any,
    *,
    num_bias_classes: int | None = None,
    batch_size: int = EVALUATION_BATCH,
    device: torch.device | str | None = None,
) -> Evaluation:
    """Average, worst-group, bias-aligned and bias-conflicting accuracy of a classifier.

    Args:
        model: (n, ...) -> logits (n, classes). It is run in eval mode and stays as it was.
        data: tensors ``(x, y, b)``, a Dataset or a DataLoader, as for ``ffw_fast.extract``. Target and bias labels are
            compared by their numbers; where equal numbers mean nothing, as with ten digits and two fonts, aligned and
            conflicting mean nothing either, and average and groups are what there is. Inputs in a narrower
            floating-point format than the model's weights are widened to it.
        num_bias_classes: where given, bias labels are checked to lie below it.
        batch_size: samples a forward pass.
        device: where to run; default: where the model is.

    Raises:
        ValueError, TypeError: bad data, a model that fails on it, or logits that do not fit it.
    """
    check_integer("batch_size", batch_size, 1)
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, got {type(model).__name__}")
    check_device(device)
    samples = as_samples(data, "data", num_bias_classes)
    logits = _logits(model, samples.x, batch_size, device)
    if samples.y.max() >= logits.shape[1]:
        raise ValueError(f"y holds label {samples.y.max()}, but the model has {logits.shape[1]} classes")
    if not logits.isfinite().all():
        raise ValueError("the model gives NaN or inf as logits")
    return evaluate_predictions(logits.argmax(1), samples.y.cpu(), samples.b.cpu())


@torch.no_grad()
def _logits(model: nn.Module, x: Inputs, batch_size: int, device: torch.device | str | None) -> Tensor:
    """Logits (n, classes) on the CPU of the model in eval mode, whose parts then are in the mode that they were in."""
    weight = next(model.parameters(), torch.empty(0, dtype=x.dtype, device="cpu"))
    where = torch.device(device) if device is not None else weight.device
    if where != weight.device:
        model = copy_of(model).to(where)
    dtype = weight.dtype if torch.promote_types(x.dtype, weight.dtype) == weight.dtype else x.dtype
    with evaluation_mode(model):
        batches = [_batch_logits(model, batch.to(where, dtype)) for batch in batches_of(x, batch_size)]
    return torch.cat(batches)


def _batch_logits(model: nn.Module, x: Tensor) -> Tensor:
    try:
        logits = model(x)
    except Exception as error:  # whatever the model's own code raises
        raise ValueError(f"the model fails on samples x of {x.dtype} and shape {tuple(x.shape)}: {error}") from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x):
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"the model must give logits ({len(x)}, classes) for {len(x)} samples, got {got}")
    return logits.cpu()


def evaluate_predictions(predictions: Tensor, y: Tensor, b: Tensor) -> Evaluation:
    """The same of predictions (n,), targets y (n,) and biases b (n, biases)."""
    right = (predictions == y).double()
    aligned = b == y.unsqueeze(1)
    keys, accuracies, sizes = _by_group(right, torch.cat([y.unsqueeze(1), b], dim=1))
    names = [tuple(key) for key in keys.tolist()]
    pairs = [_by_group(right, torch.stack([y, column], dim=1))[1] for column in b.T]
    cells: dict[str, float] = {}
    for pattern in aligned.unique(dim=0).tolist():
        name = "/".join("aligned" if is_aligned else "conflicting" for is_aligned in pattern)
        cells[name] = _mean(right, (aligned == aligned.new_tensor(pattern)).all(1))
    return Evaluation(
        average=right.mean().item(),
        worst_group=accuracies.min().item(),
        bias_worst_group=[found.min().item() for found in pairs],
        bias_aligned=[_mean(right, column) for column in aligned.T],
        bias_conflicting=[_mean(right, ~column) for column in aligned.T],
        cells=cells,
        groups=dict(zip(names, accuracies.tolist(), strict=True)),
        sizes=dict(zip(names, sizes.tolist(), strict=True)),
    )


def _by_group(right: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct rows of labels (n, columns), and of each its accuracy and its number of samples."""
    keys, group = labels.unique(dim=0, return_inverse=True)
    sizes = torch.bincount(group, minlength=len(keys))
    return keys, torch.bincount(group, weights=right, minlength=len(keys)) / sizes, sizes


def _mean(right: Tensor, chosen: Tensor) -> float:
    return right[chosen].mean().item()  # NaN for an empty choice
