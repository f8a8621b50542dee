"""The bottleneck: the module whose output, flattened from its second dimension on, gives the features of samples."""

import torch
from torch import Tensor, nn


def bottleneck_module(model: nn.Module, name: str) -> nn.Module:
    """The module of that name. ``ValueError`` with the known names otherwise."""
    modules = {known: module for known, module in model.named_modules() if known}
    if name not in modules:
        raise ValueError(f"unknown bottleneck {name!r}; the modules of {type(model).__name__}: {', '.join(modules)}")
    return modules[name]


@torch.no_grad()
def outputs_of(model: nn.Module, bottleneck: str, x: Tensor) -> list[Tensor]:
    """Output of the bottleneck, as it is once the forward pass has ended, and of the model."""
    kept: list[Tensor] = []
    with bottleneck_module(model, bottleneck).register_forward_hook(lambda _module, _x, output: kept.append(output)):
        return [model(x.clone()), *kept]


class PastBottleneck(Exception):
    """Ends a forward pass whose remainder nobody reads."""


class AtBottleneck:
    """A hook that keeps the features of a forward pass until they are taken.

    Not a method of the network: the two would hold each other, and with them all memory, until they are collected.
    """

    def __init__(self) -> None:
        self.stops = False  # the forward pass, once it has the features
        self._features: Tensor | None = None

    def __call__(self, _module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        self._features = output.flatten(1)
        if self.stops:
            raise PastBottleneck

    def taken(self) -> Tensor:
        """The features (n, D) of the last forward pass."""
        features, self._features = self._features, None
        assert features is not None
        return features
