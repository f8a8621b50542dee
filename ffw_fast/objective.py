"""The objective ``J = alpha CE(logits, y) + gamma mean_i MI_i``, its gradient, and its mutual information term."""

from typing import NamedTuple

import torch
from torch import Tensor

from ffw_fast import ops
from ffw_fast.autograd import MutualInformation
from ffw_fast.heads import PrivateHeads


def mutual_information(logits: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mutual information between labels and the predictions of a head, over one batch, in units of ``log K``.

    With ``p = softmax(logits)`` and the joint ``Q = onehot(b)^T p / n`` (entries of the product clamped at 1e-15):
    ``MI = sum Q log(Q / max(Q_b Q_p, 1e-15)) / log K``, with ``Q_b`` and ``Q_p`` the joint's marginals.

    Args:
        logits: (n, K), floating point; the result is differentiable by them.
        labels: (n,), int64, each in [0, K).
        num_classes: K, at least 2.

    Returns:
        A scalar, about 0 (independent) to 1. Small batches bias it upward.

    Raises:
        ValueError: an empty batch, wrong shapes or dtype, or a label outside [0, K).
        TypeError: logits or labels are no tensors.
    """
    for name, value in (("logits", logits), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    if logits.dim() != 2 or logits.shape[1] != num_classes or not logits.is_floating_point():
        raise ValueError(
            f"logits must be floating point of shape (n, {num_classes}), got {logits.dtype} {tuple(logits.shape)}"
        )
    if labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 of shape ({len(logits)},), got {labels.dtype} {tuple(labels.shape)}")
    if len(labels) == 0:
        raise ValueError("the mutual information of an empty batch is not defined")
    if not torch.compiler.is_compiling():
        low, high = (bound.item() for bound in labels.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(f"labels must be in [0, {num_classes}), got {low} to {high}")
    information, _joint = MutualInformation.apply(logits.unsqueeze(1), labels.unsqueeze(1))
    return information[0]


class Objective(NamedTuple):
    """The losses of one minibatch, and the gradient of J.

    Attributes:
        losses: (3,), ``(J, CE, MI)``, without a graph behind them.
        by_logits: (n, C), dJ/dlogits.
        by_head_logits: (n, heads, K), dJ/dhead logits.
    """

    losses: Tensor
    by_logits: Tensor
    by_head_logits: Tensor

    def backward(self, logits: Tensor, features: Tensor, heads: PrivateHeads) -> None:
        """Add dJ/dw to the gradient of everything behind the logits and the features that the heads read.

        Raises:
            ValueError: nothing behind them has a gradient.
        """
        roots = ((logits, self.by_logits), (features, heads.by_features(self.by_head_logits)))
        followed = [(root, grad) for root, grad in roots if root.requires_grad]
        if not followed:
            raise ValueError(
                "neither logits nor features depend on what is trained: the model may compute them under torch.no_grad "
                "or in a reentrant checkpoint"
            )
        tensors, gradients = zip(*followed, strict=True)
        torch.autograd.backward(tensors, gradients)


def objective(
    logits: Tensor, labels: Tensor, head_logits: Tensor, bias_labels: Tensor, alpha: float, gamma: float
) -> Objective:
    """J of one minibatch: task logits (n, C), labels (n,), head logits (n, heads, K), b (n, heads)."""
    tensors = (logits.detach(), labels, head_logits.detach(), bias_labels)
    return Objective(*ops.objective(*tensors, None, None, alpha, gamma, 1 / bias_labels.shape[1]))
