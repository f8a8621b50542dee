"""The modes of PyTorch and of a model that work is done in, whatever the caller's are, and back to these."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def training_modes() -> Iterator[None]:
    """Gradients are kept; inference mode and autocast are off."""
    no_autocast = [torch.autocast(device, enabled=False) for device in ("cpu", "cuda")]
    with torch.inference_mode(False), torch.enable_grad(), no_autocast[0], no_autocast[1]:
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model is in eval mode, then in that of before by its own ``train``, and each part in its own."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        model.train(modes[model])
        for part, training in modes.items():
            part.training = training
