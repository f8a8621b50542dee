"""What users hand in, turned into checked tensors in memory, before any work is done."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import DataLoader

from ffw_fast.data.samples import Samples
from ffw_fast.gated_network import bottleneck_module
from ffw_fast.modules import maskable_layers
from ffw_fast.settings import Settings

READING_BATCH = 256
LAYOUTS = "(x, (y, b...)), (x, y, b) or (index, x, y, attributes)"


def prepare(model: nn.Module, train: Any, val: Any, settings: Settings) -> tuple[Samples, Samples, int]:
    """Training and validation set as checked tensors, and the number of features at the bottleneck.

    Raises:
        TypeError, ValueError: bad data, or data, model and settings that do not fit each other.
    """
    train_set = as_samples(train, "train", settings.num_bias_classes)
    val_set = as_samples(val, "val", settings.num_bias_classes)
    if train_set.b.shape[1] != val_set.b.shape[1]:
        raise ValueError(f"train has {train_set.b.shape[1]} biases and val has {val_set.b.shape[1]}")
    shapes = [tuple(samples.x.shape[1:]) for samples in (train_set, val_set)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"samples of train and val differ in shape: {shapes[0]} and {shapes[1]}")
    width = check_model(model, settings.bottleneck, (train_set, val_set))
    if any(part.training and isinstance(part, _DropoutNd) for part in model.modules()):
        warnings.warn(
            "the model is in training mode and has dropout: extraction runs a copy in eval mode, without dropout",
            stacklevel=3,
        )
    return train_set, val_set, width


def as_samples(data: Any, name: str, num_bias_classes: int) -> Samples:
    """Samples of float inputs x (n, ...), targets y (n,) and biases b (n, heads), checked.

    Args:
        data: tensors ``(x, y, b)``, b of shape (n,) or (n, heads), or a Dataset or DataLoader that yields
            ``(x, (y, b...))``, ``(x, y, b)`` or ``(index, x, y, attributes)``, which is read once.
        name: "train" or "val", for messages.
        num_bias_classes: K; every bias label is in [0, K).

    Raises:
        TypeError, ValueError: what was given, what was expected and where.
    """
    if isinstance(data, tuple | list) and len(data) == 3 and all(isinstance(part, Tensor) for part in data):
        x, y, b = data
    elif isinstance(data, DataLoader) or (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        x, y, b = _read(data, name)
    else:
        raise TypeError(
            f"{name} must be tensors (x, y, b), a Dataset or a DataLoader that yields {LAYOUTS}, "
            f"got {type(data).__name__}"
        )
    return _checked(x, y, b, name, num_bias_classes)


def _read(data: Any, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """All samples of a Dataset or DataLoader, in its order."""
    if len(data) == 0:
        raise ValueError(f"{name} is empty")
    dataset = data.dataset if isinstance(data, DataLoader) else data
    _refuse_augmentation(dataset, name)
    loader = data if isinstance(data, DataLoader) else DataLoader(dataset, batch_size=READING_BATCH)
    parts = [_parse(item, name) for item in loader]
    x, y, b = (torch.cat(column) for column in zip(*parts, strict=True))
    return x, y, b


def _refuse_augmentation(dataset: Any, name: str) -> None:
    """Cached features need inputs that stay: read one sample twice."""
    if not hasattr(dataset, "__getitem__"):
        return
    once, again = (_parse(dataset[0], name, batched=False)[0] for _ in range(2))
    if once.shape != again.shape or not torch.equal(once, again):
        raise ValueError(
            f"{name} gives a different input each time its first sample is read: it augments at random. "
            "Extraction caches the bottleneck's features of fixed inputs; hand in the data without augmentation."
        )


def _parse(item: Any, name: str, batched: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(item, Sequence) or not 2 <= len(item) <= 4:
        raise TypeError(f"{name} must yield {LAYOUTS}, got {type(item).__name__}")
    if len(item) == 2:
        x, (y, *biases) = item
    elif len(item) == 3:
        x, y, *biases = item
    else:
        _index, x, y, *biases = item
    if not biases:
        raise ValueError(f"{name} yields no bias label: expected {LAYOUTS}")
    columns = [torch.as_tensor(bias) for bias in biases]
    width = 1 if batched else 0
    columns = [column.unsqueeze(-1) if column.dim() == width else column for column in columns]
    return torch.as_tensor(x), torch.as_tensor(y), torch.cat(columns, dim=-1)


def _checked(x: Tensor, y: Tensor, b: Tensor, name: str, num_bias_classes: int) -> Samples:
    if len(x) == 0:
        raise ValueError(f"{name} is empty: x has shape {tuple(x.shape)}")
    if b.dim() == 1:
        b = b.unsqueeze(1)
    if b.dim() != 2 or b.shape[1] == 0:
        raise ValueError(f"{name}: b must have shape (n,) or (n, number of biases), got {tuple(b.shape)}")
    if y.dim() != 1:
        raise ValueError(f"{name}: y must have shape (n,), got {tuple(y.shape)}")
    if not len(x) == len(y) == len(b):
        raise ValueError(f"{name}: x, y and b differ in length: {len(x)}, {len(y)} and {len(b)}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: x must be floating point, got {x.dtype}; convert and normalise it first")
    for label, values in (("y", y), ("b", b)):
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise TypeError(f"{name}: {label} must hold integers, got {values.dtype}")
        if values.min() < 0:
            raise ValueError(f"{name}: {label} holds negative labels, the lowest is {values.min().item()}")
    if b.max() >= num_bias_classes:
        raise ValueError(f"{name}: b holds label {b.max().item()}, but num_bias_classes is {num_bias_classes}")
    if not x.isfinite().all():
        where = (~x.flatten(1).isfinite().all(dim=1)).nonzero()[0].item()
        raise ValueError(f"{name}: x holds NaN or inf, first in sample {where}")
    return Samples(x, y.long(), b.long())


def check_model(model: nn.Module, bottleneck: str, samples: Sequence[Samples]) -> int:
    """Run one sample through the model as the loop will; returns the number of features at the bottleneck.

    Raises:
        ValueError, TypeError: nothing to mask, unknown or unreached bottleneck, an output that is no tensor, logits of
            the wrong shape, target labels outside of the logits' classes.
    """
    device = next(iter(maskable_layers(model).values())).weight.device
    module = bottleneck_module(model, bottleneck)
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    modes = {part: part.training for part in model.modules()}
    try:
        with torch.no_grad():
            logits = model.eval()(samples[0].x[:2].to(device))
    finally:
        handle.remove()
        for part, training in modes.items():
            part.training = training
    if len(seen) != 1:
        times = "never reached" if not seen else f"reached {len(seen)} times"
        raise ValueError(f"bottleneck {bottleneck!r} is {times} in a forward pass; it must be reached exactly once")
    if not isinstance(seen[0], Tensor) or seen[0].dim() < 2:
        raise TypeError(f"bottleneck {bottleneck!r} must give a tensor (n, ...), got {_describe(seen[0])}")
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise TypeError(f"the model must give logits (n, classes), got {_describe(logits)}")
    highest = max(int(part.y.max()) for part in samples)
    if highest >= logits.shape[1]:
        raise ValueError(f"y holds label {highest}, but the model has {logits.shape[1]} classes")
    return seen[0].flatten(1).shape[1]


def _describe(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
