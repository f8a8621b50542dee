"""What BISE asks for beside FFW: its objective on the biased training set itself, and its schedule's constants.

"Bias In, Bias Out? Finding Unbiased Subnetworks in Vanilla Models" (CVPR 2026) needs no unbiased set: the cross-entropy
is reweighted to the distribution in which bias and target are independent, and the mutual information is that of the
samples whose bias conflicts with their target.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ffw_fast import ops
from ffw_fast.data.samples import Samples
from ffw_fast.objective import Objective
from ffw_fast.settings import Settings

SCORES_LR = 1e-2
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
HEAD_EPOCHS = 50  # of each fit of the heads: at the start, and whenever T has fallen


@dataclass(frozen=True)
class BiasedObjective:
    """``J = alpha mean(r CE) + gamma sum_i MI_i`` of minibatches of a biased set.

    Attributes:
        importance: (biases, C, K), ``r`` of a sample is the product of ``importance[i, y, b_i]``.
        aligned: int64 (C,), the bias label that goes with each target; every other one conflicts with it.
    """

    importance: Tensor
    aligned: Tensor
    alpha: float
    gamma: float

    @classmethod
    def of(
        cls,
        y: Tensor,
        b: Tensor,
        num_classes: int,
        num_bias_classes: int,
        *,
        alpha: float,
        gamma: float,
        correlations: Sequence[float] | None = None,
        aligned: Sequence[int] | None = None,
    ) -> Self:
        """The objective for a training set with targets y (n,) and biases b (n, biases).

        Args:
            num_classes, num_bias_classes: C and K.
            correlations: of each bias, the probability that its label is the aligned one. Default: weights are counted.
            aligned: the aligned bias label of each target. Default: the target's own number.

        Raises:
            ValueError: C and K differ and no table is given, a table or correlations that do not fit, no conflicting
                sample, or, where weights are counted, none of some target: its importance would be infinite.
        """
        table = aligned_labels(num_classes, num_bias_classes, aligned).to(y.device)
        _check_conflicts(y, b, table, every_class=correlations is None)
        if correlations is None:
            importance = counted_importance(y, b, num_classes, num_bias_classes)
        else:
            if len(correlations) != b.shape[1]:
                raise ValueError(f"got {len(correlations)} correlations for {b.shape[1]} biases")
            importance = given_importance(correlations, table, num_bias_classes)
        return cls(importance, table, alpha, gamma)

    @classmethod
    def from_settings(cls, settings: Settings, train: Samples, num_classes: int) -> Self:
        """The objective that the settings ask for on this training set; see ``of``."""
        return cls.of(
            train.y,
            train.b,
            num_classes,
            settings.num_bias_classes,
            alpha=settings.alpha,
            gamma=settings.gamma,
            correlations=settings.correlations,
            aligned=settings.aligned,
        )

    def weights(self, y: Tensor, b: Tensor) -> Tensor:
        """Importance ``r`` (n,) of samples."""
        biases = torch.arange(b.shape[1], device=b.device)
        return self.importance[biases, y.unsqueeze(1), b].prod(1)

    def __call__(self, logits: Tensor, y: Tensor, head_logits: Tensor, b: Tensor) -> Objective:
        """J of one minibatch: logits (n, C), y (n,), head logits (n, heads, K), b (n, heads)."""
        tensors = (logits.detach(), y, head_logits.detach(), b)
        return Objective(*ops.objective(*tensors, self.importance, self.aligned, self.alpha, self.gamma, 1.0))


def selection(selects: bool) -> str:
    """By what the best scores were chosen, for the metrics."""
    return "best task accuracy on the unbiased validation set" if selects else "last epoch"


def aligned_labels(num_classes: int, num_bias_classes: int, aligned: Sequence[int] | None) -> Tensor:
    """The bias label that goes with each target, int64 (C,); ``ValueError`` where it cannot be told."""
    if aligned is None:
        if num_classes != num_bias_classes:
            raise ValueError(
                f"the target has {num_classes} classes and the bias {num_bias_classes}: say which bias label goes with "
                f"each target by aligned=[...], {num_classes} numbers from 0 to {num_bias_classes - 1}; all others "
                "conflict"
            )
        return torch.arange(num_classes, device="cpu")
    if len(aligned) != num_classes or not all(0 <= label < num_bias_classes for label in aligned):
        raise ValueError(
            f"aligned must hold {num_classes} bias labels from 0 to {num_bias_classes - 1}, one for each target, "
            f"got {list(aligned)}"
        )
    return torch.tensor(aligned, dtype=torch.int64, device="cpu")


def given_importance(correlations: Sequence[float], aligned: Tensor, num_bias_classes: int) -> Tensor:
    """Importance (biases, C, K) of known correlations.

    One bias: ``1 / (K rho)`` where it is aligned, ``(K - 1) / (K (1 - rho))`` where it conflicts. Several: the product
    of ``1 / rho_i`` or ``1 / (1 - rho_i)``, as published, which gives the cells of aligned and conflicting biases equal
    weight.
    """
    if len(correlations) == 1:
        (rho,) = correlations
        pairs = [(1 / (num_bias_classes * rho), (num_bias_classes - 1) / (num_bias_classes * (1 - rho)))]
    else:
        pairs = [(1 / rho, 1 / (1 - rho)) for rho in correlations]
    is_aligned = torch.nn.functional.one_hot(aligned, num_bias_classes).bool()
    return torch.stack([torch.where(is_aligned, same, other) for same, other in pairs]).float()


def counted_importance(y: Tensor, b: Tensor, num_classes: int, num_bias_classes: int) -> Tensor:
    """Importance (biases, C, K) counted from labels: ``p_target(y, b) / p_train(y, b)``, the target uniform.

    Several biases are taken as independent given the target, ``p(y) prod_i p(b_i | y)``: most of the joint's cells
    would be empty. Cells without a sample are 0; nothing looks them up.
    """
    tables = []
    for column in b.T:
        counts = torch.bincount(y * num_bias_classes + column, minlength=num_classes * num_bias_classes)
        counts = counts.view(num_classes, num_bias_classes).double()
        conditional = counts / counts.sum(1, keepdim=True)
        tables.append(torch.where(counts > 0, 1 / (num_bias_classes * conditional), 0))
    of_target = torch.bincount(y, minlength=num_classes).double() / len(y)
    tables[0] = tables[0] * torch.where(of_target > 0, 1 / (num_classes * of_target), 0).unsqueeze(1)
    return torch.stack(tables).float()


def _check_conflicts(y: Tensor, b: Tensor, aligned: Tensor, every_class: bool) -> None:
    conflicting = b != aligned[y].unsqueeze(1)
    for bias, rows in enumerate(conflicting.T):
        if not rows.any():
            pairs = torch.stack([y, b[:, bias]], dim=1).unique(dim=0).tolist()
            groups = ", ".join(f"({target}, {label})" for target, label in pairs)
            raise ValueError(
                f"no sample of train conflicts with bias {bias}: its only groups (target, bias) are {groups}; BISE "
                "learns from conflicting samples"
            )
        if every_class and (missing := sorted(set(y.tolist()) - set(y[rows].tolist()))):
            named = ", ".join(f"{target} (only with bias label {aligned[target].item()})" for target in missing)
            raise ValueError(
                f"train has no sample that conflicts with bias {bias} of target {named}, so that importance weights "
                "counted from it would be infinite; give correlations, or data with such samples"
            )
