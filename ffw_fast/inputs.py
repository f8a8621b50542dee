"""What users hand in, turned into checked samples, before any work is done."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ffw_fast.bottleneck import bottleneck_module
from ffw_fast.copies import copy_of
from ffw_fast.data.datasets import LAYOUTS, is_dataset, read_dataset
from ffw_fast.data.pixels import Pixels
from ffw_fast.data.samples import Inputs, Samples
from ffw_fast.data.stream import Stream, drawing_from
from ffw_fast.masking import maskable_layers
from ffw_fast.modes import evaluation_mode
from ffw_fast.modules import masked_layers
from ffw_fast.settings import Settings

PIECE = 1 << 24  # bytes of inputs that are checked at a time, since a check makes copies
LOOP_DTYPES = (torch.float32, torch.float64)  # of weights and scores; 16 bits are too few for Adam's steps


@dataclass(frozen=True)
class Problem:
    """What is to be extracted: a model, and the sets and settings that fit it.

    Attributes:
        train, val: on the device where all is to be done.
        width: D, the number of features at the bottleneck.
    """

    settings: Settings
    model: nn.Module
    train: Samples
    val: Samples
    width: int

    @property
    def device(self) -> torch.device:
        return self.train.y.device

    def to(self, device: torch.device) -> "Problem":
        """The same, with the sets on ``device``."""
        return replace(self, train=self.train.to(device), val=self.val.to(device))


def check_device(device: torch.device | str | None) -> None:
    """``ValueError`` for a device that PyTorch does not know or cannot compute on; None, for no other one, is none."""
    if device is None:
        return
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # without PyTorch's advice to developers
        raise ValueError(f"cannot run on device {str(device)!r}: {str(error).splitlines()[0]}") from error


def prepare(model: nn.Module, train: Any, val: Any, settings: Settings) -> Problem:
    """The sets as checked samples, which fit the model and the settings.

    Inputs in a narrower floating-point format than the model's weights are widened to it. For BISE ``val`` may be None:
    the training set then stands in for it.

    Raises:
        TypeError, ValueError: bad data, or data, model and settings that do not fit each other.
    """
    train_set = as_samples(train, "train", settings.num_bias_classes)
    if val is None and settings.method == "bise":  # it needs none
        val_set = train_set
    else:
        val_set = as_samples(val, "val", settings.num_bias_classes)
    _check_alike(train_set, val_set, "val")
    dtype = check_layers(model)
    train_set, val_set = (widened(part, dtype, name) for part, name in ((train_set, "train"), (val_set, "val")))
    width = check_model(model, settings.bottleneck, (train_set, val_set))
    if any(part.training and isinstance(part, _DropoutNd) for part in model.modules()):
        warnings.warn(
            "the model is in training mode and has dropout: extraction runs a copy in eval mode, without dropout",
            stacklevel=3,
        )
    return Problem(settings, model, train_set, val_set, width)


def check_test(problem: Problem, test: Samples) -> None:
    """``TypeError`` or ``ValueError`` where what is found could not be measured on this set."""
    _check_alike(problem.train, test, "test")
    check_model(problem.model, problem.settings.bottleneck, [widened(test, problem.train.x.dtype, "test")])


def _check_alike(train: Samples, other: Samples, name: str) -> None:
    if train.b.shape[1] != other.b.shape[1]:
        raise ValueError(f"train has {train.b.shape[1]} biases and {name} has {other.b.shape[1]}")
    shapes = [tuple(samples.x.shape[1:]) for samples in (train, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"samples of train and {name} differ in shape: {shapes[0]} and {shapes[1]}")


def as_samples(data: Any, name: str, num_bias_classes: int | None) -> Samples:
    """Samples of float inputs x (n, ...), targets y (n,) and biases b (n, heads), checked.

    Args:
        data: tensors ``(x, y, b)``, b of shape (n,) or (n, heads), or a Dataset or DataLoader that yields
            ``(x, (y, b...))``, ``(x, y, b)`` or ``(index, x, y, attributes)``. That is read once and kept, or streamed
            where it does not fit into memory or augments at random (``ffw_fast.data.datasets``).
        name: "train" or "val", for messages.
        num_bias_classes: K; every bias label is in [0, K). None: unknown, not checked.

    Raises:
        TypeError, ValueError: what was given, what was expected and where.
    """
    if isinstance(data, tuple) or (isinstance(data, list) and any(isinstance(part, Tensor) for part in data)):
        known = len(data) == 3 and isinstance(data[0], Tensor | Pixels | Stream)
        if not known or not all(isinstance(part, Tensor) for part in data[1:]):
            parts = ", ".join(type(part).__name__ for part in data)
            raise TypeError(f"{name} must be three tensors (x, y, b), got ({parts})")
        x, y, b = data
        if any(isinstance(part, Tensor) and (part.layout != torch.strided or part.is_meta) for part in data):
            raise TypeError(
                f"{name}: x, y and b must be dense tensors with data, neither sparse nor on the meta device"
            )
    elif is_dataset(data):
        # A DataLoader draws from the global generator: let it give the same order in every run. And PyTorch's default
        # device is where labels would be collated, beside inputs that come from the CPU.
        with drawing_from(0), torch.device("cpu"):
            x, y, b = read_dataset(data, name)
    else:
        raise TypeError(
            f"{name} must be tensors (x, y, b), a Dataset or a DataLoader that yields {LAYOUTS}, "
            f"got {type(data).__name__}"
        )
    return _checked(x, y, b, name, num_bias_classes)


def _checked(x: Inputs, y: Tensor, b: Tensor, name: str, num_bias_classes: int | None) -> Samples:
    if len(x.shape) < 2:
        raise ValueError(f"{name}: x must have shape (n, ...), got {tuple(x.shape)}")
    if x.shape.numel() == 0:
        raise ValueError(f"{name} is empty: x has shape {tuple(x.shape)}")
    if b.dim() == 1:
        b = b.unsqueeze(1)
    if b.dim() != 2 or b.shape[1] == 0:
        raise ValueError(f"{name}: b must have shape (n,) or (n, number of biases), got {tuple(b.shape)}")
    if y.dim() != 1:
        raise ValueError(f"{name}: y must have shape (n,), got {tuple(y.shape)}")
    if not len(x) == len(y) == len(b):
        raise ValueError(f"{name}: x, y and b differ in length: {len(x)}, {len(y)} and {len(b)}")
    if not x.dtype.is_floating_point or x.dtype.itemsize < 2:  # PyTorch computes nothing in 8 bits
        raise TypeError(f"{name}: x must be floating point, got {x.dtype}; convert and normalise it first")
    for label, values in (("y", y), ("b", b)):
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise TypeError(f"{name}: {label} must hold integers, got {values.dtype}")
    y, b = y.long(), b.long()  # PyTorch cannot compare all unsigned formats
    for label, values in (("y", y), ("b", b)):
        if values.min() < 0:
            raise ValueError(f"{name}: {label} holds negative labels, the lowest is {values.min().item()}")
    if num_bias_classes is not None and b.max() >= num_bias_classes:
        raise ValueError(f"{name}: b holds label {b.max().item()}, but num_bias_classes is {num_bias_classes}")
    if isinstance(x, Tensor):  # bytes are finite, and streams are checked as they are read
        x = x.detach()
        _check_finite(x, name)
    return Samples(x, y, b)


def _check_finite(x: Tensor, name: str) -> None:
    rows = max(1, PIECE // x[0].nbytes)
    for start, part in zip(range(0, len(x), rows), x.split(rows), strict=True):
        finite = part.isfinite().flatten(1).all(dim=1)
        if not finite.all():
            raise ValueError(f"{name}: x holds NaN or inf, first in sample {start + int(finite.int().argmin())}")


def widened(samples: Samples, dtype: torch.dtype, name: str) -> Samples:
    """The samples with x in the model's dtype, if no digit is lost."""
    given = samples.x.dtype
    if torch.promote_types(given, dtype) != dtype:
        raise TypeError(f"{name}: x is {given} and the model's weights are {dtype}; convert one of them first")
    return samples._replace(x=samples.x.to(dtype))


def check_layers(model: nn.Module) -> torch.dtype:
    """The dtype of the weights that will be gated.

    Raises:
        ValueError, TypeError: nothing to mask, layers that cannot be masked or are masked already, weights without
            numbers or that are not all float32 or all float64, batch norm without running statistics.
    """
    if isinstance(model, nn.Module) and (masked := masked_layers(model)):
        raise ValueError(f"layers {', '.join(map(repr, masked))} are masked already; hand in the dense model")
    layers = maskable_layers(model)
    dtypes = {name: layer.weight.dtype for name, layer in layers.items()}
    first, dtype = next(iter(dtypes.items()))
    if layers[first].weight.is_meta:
        raise ValueError(f"the weight of layer {first!r} is on the device 'meta', which holds no numbers")
    for name, other in dtypes.items():
        if other not in LOOP_DTYPES:
            raise TypeError(
                f"the weight of layer {name!r} is {other}, but scores are learned in float32 or float64: convert the "
                "model first, and use precision='bf16' for a forward and backward pass in 16 bits"
            )
        if other != dtype:
            raise TypeError(f"the weights of layers {first!r} and {name!r} differ in dtype: {dtype} and {other}")
    for name, part in model.named_modules():
        if isinstance(part, _BatchNorm) and part.running_mean is None:
            raise ValueError(
                f"batch norm {name!r} keeps no running statistics, so that a sample's features depend on the batch "
                "that it is in; extraction needs features of each sample for itself"
            )
    return dtype


def check_model(model: nn.Module, bottleneck: str, samples: Sequence[Samples]) -> int:
    """Run two samples through the model as the loop will; returns the number of features at the bottleneck.

    Raises:
        ValueError, TypeError: unknown or unreached bottleneck, a model that fails on the samples or is not the same
            function each time, outputs that are not as expected, target labels outside of the logits' classes.
    """
    x = samples[0].x[:2].to(next(iter(maskable_layers(model).values())).weight.device)
    model = copy_of(model)  # whose buffers a forward pass may change
    seen: list[tuple[Any, int]] = []
    watched = bottleneck_module(model, bottleneck).register_forward_hook(
        lambda _module, _inputs, output: seen.append((output, _version(output)))
    )
    try:
        with watched, evaluation_mode(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits, again = (model(x.clone()) for _ in range(2))
    except Exception as error:  # whatever the model's own code raises
        raise ValueError(f"the model fails on samples x of shape {tuple(x.shape)}: {error}") from error
    if len(seen) != 2:
        times = "never reached" if not seen else f"reached {len(seen) // 2} times"
        raise ValueError(f"bottleneck {bottleneck!r} is {times} in a forward pass; it must be reached exactly once")
    (features, version), (features_again, _) = seen
    if not _is_float_rows(features, len(x)) or features.dim() < 2 or features.numel() == 0:
        raise TypeError(
            f"bottleneck {bottleneck!r} must give a floating-point tensor ({len(x)}, ...) for {len(x)} samples, "
            f"got {_describe(features)}"
        )
    if _version(features) != version:
        raise ValueError(
            f"the output of bottleneck {bottleneck!r} is overwritten by a later layer that works in place: name that "
            "layer as the bottleneck instead, or set its inplace=False"
        )
    if not _is_float_rows(logits, len(x)) or logits.dim() != 2:
        raise TypeError(f"the model must give logits ({len(x)}, classes) for {len(x)} samples, got {_describe(logits)}")
    if not (features.isfinite().all() and logits.isfinite().all()):
        raise ValueError(f"the model gives NaN or inf at bottleneck {bottleneck!r} or as logits")
    if not (_close(features, features_again) and _close(logits, again)):
        raise ValueError("the model gives other outputs for the same samples in eval mode: its forward pass is random")
    highest = max(int(part.y.max()) for part in samples)
    if highest >= logits.shape[1]:
        raise ValueError(f"y holds label {highest}, but the model has {logits.shape[1]} classes")
    return features.flatten(1).shape[1]


def _close(once: Tensor, again: Tensor) -> bool:
    """Equal but for the order of summation, which may vary on a GPU."""
    return torch.allclose(once, again, rtol=1e-3, atol=1e-3 * float(once.abs().max()))


def _version(value: Any) -> int:
    """How often a tensor was changed in place."""
    return value._version if isinstance(value, Tensor) else 0


def _is_float_rows(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0 and len(value) == count


def _describe(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
