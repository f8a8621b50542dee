"""How much a classifier's output tells of a bias: the model in the appendix of the FFW paper, equations 11 to 17.

There are N classes, each as frequent as the others, and as many classes of the bias. A sample has a target and a bias
label, equal with probability rho (1 / N where the set is unbiased); it is then called aligned, else conflicting. The
network answers with an output Y:

- on an aligned sample the right class with probability ``1 - epsilon``, else one of the others;
- on a conflicting sample the class of its bias with probability phi, the *biasedness*: 0 for a network that does not
  follow the bias, 1 for one that knows nothing else.

Information is in bits; normalised information is in units of ``log2 N``, as ``ffw_fast.mutual_information`` is. Joint
distributions are float64 tensors, a dimension for each variable in the order of their names.
"""

import math

import torch
from torch import Tensor

from ffw_fast.checks import check_integer, check_probability


def information(joint: Tensor) -> float:
    """Mutual information in bits of the two variables of a joint distribution (rows, columns), by its definition.

    Raises:
        ValueError: it is no distribution: negative, or its sum is not 1.
    """
    if joint.dim() != 2 or bool((joint < 0).any()) or not math.isclose(joint.sum().item(), 1, abs_tol=1e-9):
        raise ValueError(f"a joint distribution (rows, columns) must be non-negative and sum to 1, got {joint}")
    joint = joint.double()
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    ratio = torch.where(joint > 0, joint / independent, 1)
    return (joint * ratio.log2()).sum().item()


def bias_target_information(rho: float, classes: int) -> float:
    """Equation 11: I(bias; target) in bits of a data set, ``log2 N + rho log2 rho + (1 - rho) log2((1-rho)/(N-1))``."""
    _check(classes, rho=rho)
    return _agreement_information(rho, classes)


def bias_target_joint(rho: float, classes: int) -> Tensor:
    """P(bias, target), (N, N): what equation 11 is the information of."""
    _check(classes, rho=rho)
    return _agreement_joint(rho, classes)


def joint(rho: float, phi: float, classes: int, epsilon: float = 0.0, task_bias: float | None = None) -> Tensor:
    """Equation 12: P(bias, target, output), (N, N, N).

    With ``task_bias=None`` it is the distribution of the model at the head of this file, where a conflicting sample
    that is not answered by its bias is answered rightly. The printed equation weighs the two answers to a conflicting
    sample by the task bias K besides: ``phi K`` and ``(1 - phi)(1 - K)``. Given a K, these are the weights here too,
    and the sum is ``rho + (1 - rho) ((1 - phi)(1 - K) + phi K)``: no distribution, except where the last bracket is 1.
    """
    _check(classes, rho=rho, phi=phi, epsilon=epsilon, task_bias=0.0 if task_bias is None else task_bias)
    biased, right = (phi, 1 - phi) if task_bias is None else (phi * task_bias, (1 - phi) * (1 - task_bias))
    same = torch.eye(classes, dtype=torch.float64)
    bias_is_target = same[:, :, None]
    output_is_bias, output_is_target = same[:, None, :], same[None, :, :]
    aligned = rho * (output_is_target * (1 - epsilon) + (1 - output_is_target) * epsilon / (classes - 1))
    conflicting = (1 - rho) / (classes - 1) * (output_is_bias * biased + output_is_target * right)
    return (bias_is_target * aligned + (1 - bias_is_target) * conflicting) / classes


def bias_output_joint(rho: float, phi: float, classes: int, epsilon: float = 0.0) -> Tensor:
    """Equation 13: P(bias, output), (N, N); on the diagonal ``(rho (1 - epsilon) + phi (1 - rho)) / N``.

    It is the marginal of ``joint`` as normalised here. The marginal of the printed joint has ``phi (1 - rho) K`` in
    place of the printed ``phi (1 - rho)``; equations 14 and 15 follow from what is printed in equation 13.
    """
    _check(classes, rho=rho, phi=phi, epsilon=epsilon)
    return _agreement_joint(rho * (1 - epsilon) + phi * (1 - rho), classes)


def bias_output_information(rho: float, phi: float, classes: int, epsilon: float = 0.0) -> float:
    """Equation 14: I(bias; output) in bits, the information of ``bias_output_joint``."""
    _check(classes, rho=rho, phi=phi, epsilon=epsilon)
    return _agreement_information(rho * (1 - epsilon) + phi * (1 - rho), classes)


def normalized_bias_output_information(rho: float, phi: float, classes: int) -> float:
    """Equation 15: I(bias; output) / log2 N of a network that is always right on aligned samples (epsilon = 0).

    From 0 at ``rho = 1 / N, phi = 0`` to 1 at ``phi = 1``. With an epsilon above 0 it does not hold: use equation 14.
    """
    return bias_output_information(rho, phi, classes) / math.log2(classes)


def target_output_joint(rho: float, phi: float, classes: int, epsilon: float = 0.0) -> Tensor:
    """Equation 16: P(target, output), (N, N), the marginal of ``joint`` without a task bias.

    On the diagonal stands the accuracy, ``rho (1 - epsilon) + (1 - phi)(1 - rho)``, over N.
    """
    _check(classes, rho=rho, phi=phi, epsilon=epsilon)
    return _agreement_joint(_accuracy(rho, phi, epsilon), classes)


def target_output_information(rho: float, phi: float, classes: int, epsilon: float = 0.0) -> float:
    """Equation 17: I(target; output) in bits, as ``f(p, 1, N) + f((1 - p) / (N - 1), N - 1, N)``, p the accuracy.

    ``f(x, y, z) = x y log2(x z)``: a conditional probability x that y classes share, over their frequency 1 / z.
    """
    _check(classes, rho=rho, phi=phi, epsilon=epsilon)
    return _agreement_information(_accuracy(rho, phi, epsilon), classes)


def biasedness(predictions: Tensor, y: Tensor, b: Tensor) -> float:
    """Estimate phi: the share of the conflicting samples that are answered with the class of their bias.

    Args:
        predictions: (n,) predicted classes.
        y, b: (n,) targets and labels of one bias, numbered so that equal numbers belong together.

    Returns:
        phi in [0, 1]; NaN where no sample conflicts.

    Raises:
        ValueError: shapes that differ.
    """
    if not predictions.shape == y.shape == b.shape or y.dim() != 1:
        shapes = ", ".join(str(tuple(labels.shape)) for labels in (predictions, y, b))
        raise ValueError(f"predictions, targets and biases must all be of shape (n,), got {shapes}")
    conflicting = y != b
    return (predictions == b)[conflicting].double().mean().item()


def label_information(b: Tensor, predictions: Tensor, classes: int) -> float:
    """Normalised I(bias; output) of samples: b (n,) and predictions (n,) in [0, N). Few samples bias it upward."""
    counts = torch.bincount(b * classes + predictions, minlength=classes**2).double().view(classes, classes)
    return information(counts / counts.sum()) / math.log2(classes)


def _accuracy(rho: float, phi: float, epsilon: float) -> float:
    return rho * (1 - epsilon) + (1 - phi) * (1 - rho)


def _agreement_joint(agree: float, classes: int) -> Tensor:
    """Two uniform variables (N, N) that agree with that probability, and else differ in any way."""
    same = torch.eye(classes, dtype=torch.float64)
    return (same * agree + (1 - same) * (1 - agree) / (classes - 1)) / classes


def _agreement_information(agree: float, classes: int) -> float:
    """Information in bits of ``_agreement_joint``."""
    return _f(agree, 1, classes) + _f((1 - agree) / (classes - 1), classes - 1, classes)


def _f(x: float, y: float, z: float) -> float:
    return x * y * math.log2(x * z) if x > 0 else 0.0


def _check(classes: int, **probabilities: float) -> None:
    check_integer("classes", classes, 2)
    for name, value in probabilities.items():
        check_probability(name, value)
