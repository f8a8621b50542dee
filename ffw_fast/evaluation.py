"""How good a classifier is, by groups: average, worst group, with and against the bias."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ffw_fast.inputs import as_samples

EVALUATION_BATCH = 500


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in [0, 1] of one classifier on one set.

    A group is the samples of one target and one combination of biases that occurs in the set. A sample is aligned with
    a bias where the bias label equals the target label, else it conflicts.

    Attributes:
        average: over all samples.
        worst_group: the lowest accuracy of a group.
        bias_aligned: for each bias, over the samples aligned with it; NaN where there are none.
        bias_conflicting: for each bias, over the samples that conflict with it; NaN where there are none.
        cells: by which biases a sample is aligned with, such as "aligned/conflicting" for two biases.
        groups: (target, bias, ...) -> accuracy.
        sizes: (target, bias, ...) -> number of samples.
    """

    average: float
    worst_group: float
    bias_aligned: list[float]
    bias_conflicting: list[float]
    cells: dict[str, float]
    groups: dict[tuple[int, ...], float]
    sizes: dict[tuple[int, ...], int]

    def as_dict(self) -> dict[str, Any]:
        """Everything but the groups one by one, ready for JSON: NaN becomes None."""
        record = asdict(self)
        del record["groups"], record["sizes"]
        for name in ("bias_aligned", "bias_conflicting"):
            record[name] = [None if value != value else value for value in record[name]]
        return record


@torch.no_grad()
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
        model: (n, ...) -> logits (n, classes). It is run in eval mode and given back in the mode that it was in.
        data: tensors ``(x, y, b)``, a Dataset or a DataLoader, as for ``ffw_fast.extract``. Target and bias labels are
            compared by their numbers; where these mean different things, only averages and groups say something.
        num_bias_classes: where given, bias labels are checked to lie below it.
        batch_size: samples a forward pass.
        device: where to run; default: where the model is.

    Raises:
        ValueError, TypeError: bad data, or logits that do not fit it.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    samples = as_samples(data, "data", num_bias_classes)
    where = torch.device(device) if device is not None else next(iter(model.parameters()), torch.empty(0)).device
    modes = {part: part.training for part in model.modules()}
    model.eval().to(where)
    try:
        logits = torch.cat([model(x.to(where)).cpu() for x in samples.x.split(batch_size)])
    finally:
        for part, training in modes.items():
            part.training = training
    if logits.dim() != 2 or samples.y.max() >= logits.shape[1]:
        raise ValueError(f"logits of shape {tuple(logits.shape)} do not fit target labels up to {samples.y.max()}")
    return evaluate_predictions(logits.argmax(1), samples.y.cpu(), samples.b.cpu())


def evaluate_predictions(predictions: Tensor, y: Tensor, b: Tensor) -> Evaluation:
    """The same of predictions (n,), targets y (n,) and biases b (n, biases)."""
    right = (predictions == y).double()
    aligned = b == y.unsqueeze(1)
    keys, group = torch.cat([y.unsqueeze(1), b], dim=1).unique(dim=0, return_inverse=True)
    sizes = torch.bincount(group, minlength=len(keys))
    accuracies = torch.bincount(group, weights=right, minlength=len(keys)) / sizes
    names = [tuple(key) for key in keys.tolist()]
    cells: dict[str, float] = {}
    for pattern in aligned.unique(dim=0).tolist():
        name = "/".join("aligned" if is_aligned else "conflicting" for is_aligned in pattern)
        cells[name] = _mean(right, (aligned == torch.tensor(pattern)).all(1))
    return Evaluation(
        average=right.mean().item(),
        worst_group=accuracies.min().item(),
        bias_aligned=[_mean(right, column) for column in aligned.T],
        bias_conflicting=[_mean(right, ~column) for column in aligned.T],
        cells=cells,
        groups=dict(zip(names, accuracies.tolist(), strict=True)),
        sizes=dict(zip(names, sizes.tolist(), strict=True)),
    )


def _mean(right: Tensor, chosen: Tensor) -> float:
    return right[chosen].mean().item()  # NaN for an empty choice
