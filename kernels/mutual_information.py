"""Mutual information of labels and predictions, and its gradient by the logits.

The plain-PyTorch versions are ``mutual_information_default`` and ``mutual_information_backward_default`` of
``ffw_fast.ops``. Each head's batch is read by one program, which keeps the joint (K, K) in registers: a
training batch is a few hundred rows of a few classes, which is less than what several programs would spend on
meeting. The backward has a program for each block of rows. All sums are float32 and in a fixed order.
"""

import math

import torch
import triton
import triton.language as tl
from ffw_fast.kernels.gate import DTYPES, decay, logarithm
from ffw_fast.kernels.matmul import dot
from torch import Tensor

JOINT_FLOOR = tl.constexpr(1e-15)
MAX_CLASSES = 64  # the joint of more would not fit into a program's registers
_SMALLEST_SIDE = 16  # of a matrix that ``tl.dot`` takes


@triton.jit
def softmax_rows(logits, inside):
    """Softmax over the last dimension, 0 where not inside; [rows, K]."""
    logits = tl.where(inside, logits, float("-inf"))
    exponential = decay(logits - tl.max(logits, axis=1)[:, None])
    exponential = tl.where(inside, exponential, 0.0)
    return exponential / tl.sum(exponential, axis=1)[:, None]


@triton.jit
def ratio_of_joint(joint, inside):
    """Marginals, their product before its clamp, and ``log(Q / max(Q_b Q_p, 1e-15))``."""
    rows = tl.sum(joint, axis=1)[:, None]  # [K, 1] of labels
    columns = tl.sum(joint, axis=0)[None, :]  # [1, K] of predictions
    independent = rows * columns
    floored = tl.where(independent < JOINT_FLOOR, JOINT_FLOOR, independent)  # keeps NaN
    return rows, columns, independent, logarithm(tl.where(inside, joint / floored, 1.0))


@triton.jit
def mutual_information_kernel(
    logits_ptr, labels_ptr, information_ptr, joint_ptr, count, heads, classes, inverse_count,
    inverse_log_classes,
    BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    joint = tl.zeros([BLOCK_K, BLOCK_K], dtype=tl.float32)  # of labels (rows) and predictions
    for start in range(0, count, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        place = row.to(tl.int64) * heads + head
        inside = (row < count)[:, None] & (k < classes)[None, :]
        logits = tl.load(logits_ptr + place[:, None] * classes + k[None, :], mask=inside, other=0.0).to(tl.float32)
        probabilities = tl.where(inside, softmax_rows(logits, (k < classes)[None, :]), 0.0)  # [rows, K]
        label = tl.load(labels_ptr + place, mask=row < count, other=-1)
        one_hot = tl.where(k[:, None] == label[None, :], 1.0, 0.0)  # [K, rows]
        joint = dot(one_hot, probabilities, joint, "ieee")
    inside = (k < classes)[:, None] & (k < classes)[None, :]
    joint = tl.where(joint < JOINT_FLOOR, JOINT_FLOOR, joint) * inverse_count  # the clamp keeps NaN
    joint = tl.where(inside, joint, 0.0)
    tl.store(joint_ptr + (head * classes + k[:, None]) * classes + k[None, :], joint, mask=inside)
    _, _, _, ratio = ratio_of_joint(joint, inside)
    information = tl.sum(tl.sum(tl.where(inside, joint * ratio, 0.0), axis=1), axis=0)
    tl.store(information_ptr + head, information * inverse_log_classes)


@triton.jit
def mutual_information_backward_kernel(
    grad_ptr, logits_ptr, labels_ptr, joint_ptr, logits_grad_ptr, count, heads, classes, inverse_count,
    inverse_log_classes, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    k = tl.arange(0, BLOCK_K)
    inside = (k < classes)[:, None] & (k < classes)[None, :]
    joint = tl.load(joint_ptr + (head * classes + k[:, None]) * classes + k[None, :], mask=inside, other=0.0)
    rows, columns, independent, ratio = ratio_of_joint(joint, inside)
    free = tl.where(independent >= JOINT_FLOOR, joint, 0.0)  # where the clamp of the product does not hold
    slope = ratio + 1.0
    slope -= tl.sum(tl.where(inside, free / rows, 0.0), axis=1)[:, None]
    slope -= tl.sum(tl.where(inside, free / columns, 0.0), axis=0)[None, :]
    unclamped = inside & (joint * count > JOINT_FLOOR)
    slope = tl.where(unclamped, slope * inverse_log_classes, 0.0)  # of the MI by the joint, [K, K]
    slope *= tl.load(grad_ptr + head).to(tl.float32) * inverse_count

    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    place = row.to(tl.int64) * heads + head
    inside = (row < count)[:, None] & (k < classes)[None, :]
    offsets = place[:, None] * classes + k[None, :]
    logits = tl.load(logits_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    probabilities = softmax_rows(logits, (k < classes)[None, :])  # [rows, K]
    label = tl.load(labels_ptr + place, mask=row < count, other=-1)
    one_hot = tl.where(label[:, None] == k[None, :], 1.0, 0.0)
    picked = dot(one_hot, slope, tl.zeros([BLOCK_ROWS, BLOCK_K], dtype=tl.float32), "ieee")  # exact: one term
    inner = tl.sum(picked * probabilities, axis=1)[:, None]
    tl.store(logits_grad_ptr + offsets, probabilities * (picked - inner), mask=inside)


def mutual_information(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """MI (heads) in units of log K and joint (heads, K, K) of logits (n, heads, K), labels (n, heads).

    Raises:
        ValueError: more than ``MAX_CLASSES`` classes, no samples, or shapes that do not fit.
    """
    count, heads, classes = _check(logits, labels)
    information = logits.new_empty(heads, dtype=torch.float32)
    joint = logits.new_empty(heads, classes, classes, dtype=torch.float32)
    if heads:
        with torch.cuda.device_of(logits):
            mutual_information_kernel[(heads,)](
                logits.contiguous(), labels.contiguous(), information, joint, count, heads, classes,
                1 / count, _inverse_log(classes), **_options(classes),
            )  # fmt: skip
    return information, joint


def mutual_information_backward(grad: Tensor, logits: Tensor, labels: Tensor, joint: Tensor) -> Tensor:
    """Gradient of the logits, of the gradient (heads) of the MI and the joint that the forward returned."""
    count, heads, classes = _check(logits, labels)
    out = torch.empty_like(logits)
    result = out if out.is_contiguous() else torch.empty_like(logits, memory_format=torch.contiguous_format)
    if out.numel():
        options = _options(classes)
        with torch.cuda.device_of(logits):
            mutual_information_backward_kernel[(triton.cdiv(count, options["BLOCK_ROWS"]), heads)](
                grad.contiguous(), logits.contiguous(), labels.contiguous(), joint.contiguous(), result,
                count, heads, classes, 1 / count, _inverse_log(classes), **options,
            )  # fmt: skip
    return out if result is out else out.copy_(result)


def _check(logits: Tensor, labels: Tensor) -> tuple[int, int, int]:
    if logits.dim() != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"expected logits (n, heads, K) and labels (n, heads), got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if logits.dtype not in DTYPES or labels.dtype != torch.int64:
        raise TypeError(f"expected float32 or 16-bit logits and int64 labels, got {logits.dtype} and {labels.dtype}")
    count, heads, classes = logits.shape
    if not count or not 1 <= classes <= MAX_CLASSES:
        raise ValueError(f"expected samples and at most {MAX_CLASSES} classes, got logits {tuple(logits.shape)}")
    return count, heads, classes


def _inverse_log(classes: int) -> float:
    return 1 / math.log(classes) if classes > 1 else math.inf


def _options(classes: int) -> dict:
    side = max(_SMALLEST_SIDE, triton.next_power_of_2(classes))
    return {
        "BLOCK_ROWS": 64 if side <= 32 else 32,
        "BLOCK_K": side,
        "num_warps": 4 if side <= 32 else 8,
        "num_stages": 1,
        "enable_fp_fusion": False,
    }
