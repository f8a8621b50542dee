"""Parts of a model: which one a graph calls, another one in its place, and those reached past the model's tree."""

import fnmatch
from collections.abc import Collection, Iterator, Sequence
from types import MethodType
from typing import Any

from torch import fx, nn

DENSE_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)  # whose weights can be gated
OF_EVERY_MODULE = frozenset(vars(nn.Module()))  # its own attributes, ``_modules`` and hooks among them


def module_of(model: nn.Module, node: Any) -> nn.Module | None:
    """The module that the node of a graph calls, if that is what it does."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    return model.get_submodule(str(node.target))


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Let the model's part of that name be another module, in the mode in which the old one was."""
    parent, _, child = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), child, module)


def matching(names: Sequence[str], patterns: Sequence[str], option: str, kind: str) -> list[str]:
    """The names that match one of the shell-style patterns, in their order. ``ValueError`` where one matches none."""
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"{option}: {pattern!r} matches none of the {kind}: {', '.join(names)}")
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def held_elsewhere(model: nn.Module, parts: Collection[nn.Module]) -> dict[nn.Module, str]:
    """Those of the parts that a plain attribute holds too (a list, a dict, a bound method), and which attribute.

    Code that reaches them there would not see what takes their place in the model.
    """
    return {
        part: f"{type(owner).__name__}.{name}"
        for owner in model.modules()
        for name, value in vars(owner).items()
        if name not in OF_EVERY_MODULE
        for part in _modules_in(value, set())
        if part in parts
    }


def _modules_in(value: Any, seen: set[int]) -> Iterator[nn.Module]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, MethodType):
        yield from _modules_in(value.__self__, seen)
    elif isinstance(value, dict | list | tuple | set | frozenset):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _modules_in(part, seen)
