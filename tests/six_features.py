"""The smallest task that can be extracted: six features, three classes, a network of two layers."""

from typing import Any

import torch
from torch import Tensor, nn

CLASSES = 3
BOTTLENECK = "relu"


def samples(count: int = 24, biases: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x (count, 6), y (count,), b (count, biases); both can be read off x, and they are independent."""
    source = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (count,), generator=source)
    b = torch.randint(CLASSES, (count, biases), generator=source)
    x = 0.3 * torch.randn(count, 6, generator=source)
    x[:, :3] += nn.functional.one_hot(y, CLASSES)
    x[:, 3:] += nn.functional.one_hot(b, CLASSES).sum(1)
    return x, y, b


def network(seed: int = 0) -> nn.Sequential:
    """Linear, ReLU, Linear; untrained, in eval mode."""
    model = nn.Sequential()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.fc1 = nn.Linear(6, 8)
        model.relu = nn.ReLU()
        model.classifier = nn.Linear(8, CLASSES)
    return model.eval()


def arguments(**changes: Any) -> dict[str, Any]:
    """Keyword arguments of a short extraction."""
    basis = {"bottleneck": BOTTLENECK, "num_bias_classes": CLASSES, "batch_size": 10, "max_epochs": 2}
    return {**basis, "progress": False, **changes}
