"""What is measured of a network on a set: from features and logits that are already there."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ffw_fast.ops import joint_distribution, joint_information


@dataclass(frozen=True)
class Measurement:
    """One network on one set. Accuracies are in [0, 1]; MI is in units of log K.

    Attributes:
        task_accuracy: of the network's logits.
        bias_accuracy: of each private head.
        bias_mi: of each private head's predictions and its bias label, over the whole set.
        sparsity: share of the gates, of weights or channels, that are closed.
    """

    task_accuracy: float
    bias_accuracy: list[float]
    bias_mi: list[float]
    sparsity: float

    @property
    def mean_bias_accuracy(self) -> float:
        return sum(self.bias_accuracy) / len(self.bias_accuracy)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(logits: Tensor, head_logits: Tensor, y: Tensor, b: Tensor, sparsity: float) -> Measurement:
    """Measure logits (n, C) and head logits (n, heads, K) against labels y (n,) and b (n, heads)."""
    return Measurement(
        task_accuracy=accuracy(logits, y).item(),
        bias_accuracy=accuracy(head_logits, b).tolist(),
        bias_mi=joint_information(joint_distribution(head_logits, b)).tolist(),
        sparsity=sparsity,
    )


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of right predictions: () for logits (n, C) and labels (n,), (heads,) for (n, heads, K) and (n, heads)."""
    return (logits.argmax(-1) == labels).double().mean(0)


def minibatch_information(head_logits: Tensor, b: Tensor, batch_size: int) -> float:
    """Mean over minibatches, in order, of the mean MI of the heads: what drives the published temperature schedule."""
    whole = len(b) // batch_size * batch_size
    values = [_each(head_logits[:whole], b[:whole], batch_size)] if whole else []
    if whole < len(b):
        values.append(_each(head_logits[whole:], b[whole:], len(b) - whole))
    return torch.cat(values).mean().item()


def _each(head_logits: Tensor, b: Tensor, size: int) -> Tensor:
    """The mean MI of the heads in every minibatch of that size, which stand beside one another as heads do."""
    logits, labels = (part.unflatten(0, (-1, size)).transpose(0, 1).flatten(1, 2) for part in (head_logits, b))
    return joint_information(joint_distribution(logits, labels)).unflatten(0, (-1, b.shape[1])).mean(1)
