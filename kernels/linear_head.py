"""Softmax regression by minibatch SGD on cached features, without reading anything back.

The plain-PyTorch version is ``fit_linear_head_default_`` of ``ffw_fast.ops``. Minibatches depend on each
other, so one program trains one head, a launch for each epoch, and a second, tiny launch applies the plateau
rule to the epoch's loss and stops the epochs after it. One program a head is the natural limit here: it uses
as many multiprocessors as there are heads. The CUDA C++ kernel, which keeps weights and momentum in shared
memory across epochs, is the first choice; this one needs no compiler and takes any number of features and any
batch size.

Within a minibatch the softmax's error (B, K) goes through a scratch buffer, so that the gradient of each
block of features is one sum over the rows. Weights are read from memory, where they stay in the cache; a
barrier separates their readers from their writer.
"""

import torch
import triton
import triton.language as tl
from ffw_fast.kernels.gate import DTYPES, decay, logarithm
from ffw_fast.kernels.matmul import check_shape, dot
from ffw_fast.kernels.mutual_information import MAX_CLASSES
from torch import Tensor

_SMALLEST_SIDE = 16  # of a matrix that ``tl.dot`` takes


@triton.jit
def _two_sum(total, remainder, value):
    """``total + remainder + value`` as a pair again, in which nothing is lost: Knuth's sum."""
    new = total + value
    back = new - total
    return new, remainder + ((total - (new - back)) + (value - back))


@triton.jit(do_not_specialize=["epoch"])
def head_epoch_kernel(
    weight_ptr, bias_ptr, weight_momentum_ptr, bias_momentum_ptr, features_ptr, labels_ptr, order_ptr,
    error_ptr, losses_ptr, stopped_ptr, epoch, count, heads, classes, width, features_stride, batch_size,
    lr, momentum, weight_decay,
    BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One epoch of head ``program_id(0)``; nothing where the plateau was reached before."""
    if tl.load(stopped_ptr) == 0:
        head = tl.program_id(0)
        k = tl.arange(0, BLOCK_K)
        weight_ptr += head * classes * width
        weight_momentum_ptr += head * classes * width
        bias_ptr += head * classes
        bias_momentum_ptr += head * classes
        error_ptr += head.to(tl.int64) * batch_size * classes
        order_ptr += epoch.to(tl.int64) * count
        loss = 0.0
        loss_remainder = 0.0
        for batch in range(0, count, batch_size):
            size = tl.minimum(batch_size, count - batch)
            inverse_size = 1.0 / size.to(tl.float32)
            bias = tl.load(bias_ptr + k, mask=k < classes, other=0.0)
            bias_grad = tl.zeros([BLOCK_K], dtype=tl.float32)
            for start in range(0, size, BLOCK_ROWS):
                row = start + tl.arange(0, BLOCK_ROWS)
                sample = tl.load(order_ptr + batch + row, mask=row < size, other=0)  # int64
                logits = tl.zeros([BLOCK_ROWS, BLOCK_K], dtype=tl.float32)
                for first in range(0, width, BLOCK_D):
                    d = first + tl.arange(0, BLOCK_D)
                    inside = (row < size)[:, None] & (d < width)[None, :]
                    places = sample[:, None] * features_stride + d[None, :]
                    x = tl.load(features_ptr + places, mask=inside, other=0.0).to(tl.float32)  # [B, D]
                    inside = (d < width)[:, None] & (k < classes)[None, :]
                    w = tl.load(weight_ptr + k[None, :] * width + d[:, None], mask=inside, other=0.0)  # [D, K]
                    logits = dot(x, w, logits, "ieee")
                logits += bias[None, :]
                label = tl.load(labels_ptr + sample * heads + head, mask=row < size, other=-1)
                one_hot = tl.where(label[:, None] == k[None, :], 1.0, 0.0)  # [B, K]
                top = tl.max(tl.where((k < classes)[None, :], logits, float("-inf")), axis=1)
                exponential = tl.where((k < classes)[None, :], decay(logits - top[:, None]), 0.0)
                total = tl.sum(exponential, axis=1)
                losses = logarithm(total) - tl.sum(one_hot * (logits - top[:, None]), axis=1)
                loss, loss_remainder = _two_sum(loss, loss_remainder, tl.sum(tl.where(row < size, losses, 0.0), axis=0))
                error = (exponential / total[:, None] - one_hot) * inverse_size
                error = tl.where((row < size)[:, None], error, 0.0)
                bias_grad += tl.sum(error, axis=0)
                inside = (row < size)[:, None] & (k < classes)[None, :]
                tl.store(error_ptr + row[:, None] * classes + k[None, :], error, mask=inside)
            tl.debug_barrier()  # all errors are written, and all weights read
            for first in range(0, width, BLOCK_D):
                d = first + tl.arange(0, BLOCK_D)
                gradient = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
                for start in range(0, size, BLOCK_ROWS):
                    row = start + tl.arange(0, BLOCK_ROWS)
                    sample = tl.load(order_ptr + batch + row, mask=row < size, other=0)
                    inside = (k < classes)[:, None] & (row < size)[None, :]
                    error = tl.load(error_ptr + row[None, :] * classes + k[:, None], mask=inside, other=0.0)  # [K, B]
                    inside = (row < size)[:, None] & (d < width)[None, :]
                    places = sample[:, None] * features_stride + d[None, :]
                    x = tl.load(features_ptr + places, mask=inside, other=0.0).to(tl.float32)  # [B, D]
                    gradient = dot(error, x, gradient, "ieee")
                inside = (k < classes)[:, None] & (d < width)[None, :]
                places = k[:, None] * width + d[None, :]
                w = tl.load(weight_ptr + places, mask=inside, other=0.0)
                buffer = tl.load(weight_momentum_ptr + places, mask=inside, other=0.0)
                buffer = buffer * momentum + gradient + weight_decay * w
                tl.store(weight_momentum_ptr + places, buffer, mask=inside)
                tl.store(weight_ptr + places, w - lr * buffer, mask=inside)
            buffer = tl.load(bias_momentum_ptr + k, mask=k < classes, other=0.0)
            buffer = buffer * momentum + bias_grad + weight_decay * bias
            tl.store(bias_momentum_ptr + k, buffer, mask=k < classes)
            tl.store(bias_ptr + k, bias - lr * buffer, mask=k < classes)
            tl.debug_barrier()  # all weights are written, and all errors read
        tl.store(losses_ptr + 2 * head, loss)
        tl.store(losses_ptr + 2 * head + 1, loss_remainder)


@triton.jit(do_not_specialize=["epoch"])
def head_plateau_kernel(
    plateau_ptr, stopped_ptr, sums_ptr, inverse_labels_ptr, losses_ptr, epoch, terms,
    KEEP: tl.constexpr, PATIENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The rule of ``ffw_fast.plateau`` after an epoch, in double precision as there; one program."""
    if tl.load(stopped_ptr) == 0:
        lane = tl.arange(0, BLOCK)
        total = tl.sum(tl.load(sums_ptr + lane, mask=lane < terms, other=0.0).to(tl.float64), axis=0)
        loss = total * tl.load(inverse_labels_ptr)
        tl.store(losses_ptr + epoch, loss)
        best = tl.load(plateau_ptr)
        improved = loss <= best * tl.full([], KEEP, tl.float64)
        failures = tl.where(improved, 0.0, tl.load(plateau_ptr + 1) + 1.0)
        tl.store(plateau_ptr, tl.where(improved, loss, best))
        tl.store(plateau_ptr + 1, failures)
        if failures > PATIENCE:
            tl.store(plateau_ptr + 2, 1.0)
            tl.store(stopped_ptr, 1)


def fit_linear_head_(
    weight: Tensor,
    bias: Tensor,
    weight_momentum: Tensor,
    bias_momentum: Tensor,
    plateau: Tensor,
    features: Tensor,
    labels: Tensor,
    order: Tensor,
    batch_size: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    threshold: float,
    patience: int,
) -> Tensor:
    """Train heads (heads, K, D) on features (n, D) and labels (n, heads); loss of each epoch, then NaN.

    ``order`` (epochs, samples) says which samples each epoch visits. Heads are float32, features may have 16
    bits.

    Raises:
        TypeError, ValueError: heads that are not contiguous float32, more than ``MAX_CLASSES`` classes, or
            shapes that do not fit.
    """
    heads, classes, width = weight.shape
    state = {
        "weight": weight,
        "bias": bias,
        "weight_momentum": weight_momentum,
        "bias_momentum": bias_momentum,
    }
    for name, tensor in state.items():
        check_shape(name, tensor, weight.shape if name.startswith("weight") else weight.shape[:2])
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise TypeError(f"{name} must be contiguous float32, got {tensor.dtype} with strides {tensor.stride()}")
    check_shape("features", features, (len(features), width))
    check_shape("labels", labels, (len(features), heads))
    if features.dtype not in DTYPES or labels.dtype != torch.int64 or order.dtype != torch.int64:
        raise TypeError(
            f"expected float32 or 16-bit features, int64 labels and int64 order, "
            f"got {features.dtype}, {labels.dtype} and {order.dtype}"
        )
    if classes > MAX_CLASSES or batch_size < 1:
        raise ValueError(f"expected at most {MAX_CLASSES} classes and a batch size, got {classes} and {batch_size}")
    epochs, count = order.shape
    losses = features.new_full((epochs,), torch.nan, dtype=torch.float64)
    if not (epochs and count and heads):
        return losses
    features = features if features.stride(1) == 1 else features.contiguous()
    labels, order = labels.contiguous(), order.contiguous()
    if not plateau.is_contiguous():
        raise ValueError(f"plateau must be contiguous, got strides {plateau.stride()}")
    batch_size = min(batch_size, count)
    error = weight.new_empty(heads, batch_size, classes)
    sums = weight.new_empty(heads, 2)  # of an epoch's losses, and what was lost in rounding them
    stopped = torch.zeros(1, dtype=torch.int32, device=weight.device)
    inverse_labels = losses.new_full((1,), 1 / labels.numel())
    side = max(_SMALLEST_SIDE, triton.next_power_of_2(classes))
    with torch.cuda.device_of(weight):
        for epoch in range(epochs):
            head_epoch_kernel[(heads,)](
                weight, bias, weight_momentum, bias_momentum, features, labels, order, error, sums,
                stopped, epoch, count, heads, classes, width, features.stride(0), batch_size, lr,
                momentum, weight_decay,
                **_options(side),
            )  # fmt: skip
            head_plateau_kernel[(1,)](
                plateau, stopped, sums, inverse_labels, losses, epoch, 2 * heads, KEEP=1 - threshold,
                PATIENCE=patience, BLOCK=triton.next_power_of_2(2 * heads), num_warps=1,
                enable_fp_fusion=False,
            )  # fmt: skip
    return losses


def _options(side: int) -> dict:
    """Blocks that keep what a thread holds in registers; ``side`` is the number of classes, padded."""
    return {
        "BLOCK_ROWS": 64 if side <= 32 else 32,
        "BLOCK_K": side,
        "BLOCK_D": 32,
        "num_warps": 8,
        "num_stages": 2,
        "enable_fp_fusion": False,
    }
