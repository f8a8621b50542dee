"""A user's own model and data as a workload: functions named ``module:function``, and a file of options."""

import importlib
import importlib.util
import os
import sys
import tomllib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ffw_fast.data.samples import Splits
from ffw_fast.inputs import as_samples
from ffw_fast.workloads import Option, Workload

NAME = "own"
TITLE = "your own trained model on your own unbiased data"
SETS = ("train", "val", "test")
SHOWN = 3  # names of a state dict in a message


def own_workload(
    model: str,
    data: str,
    *,
    bottleneck: str,
    num_bias_classes: int,
    weights: str | None = None,
    bias_names: tuple[str, ...] = (),
) -> Workload:
    """The workload of a trained model and unbiased sets that a user's functions give.

    Args:
        model: ``module:function``; called without arguments, it gives the biased network, an ``nn.Module``.
        data: likewise; it gives ``(train, val)`` or ``(train, val, test)``, each as for ``ffw_fast.extract``. Without
            a test set the validation set is the test set.
        weights: a ``state_dict`` for the model: ``.safetensors``, or ``.pt``, ``.pth`` or ``.bin`` of tensors alone.
        bias_names: of the biases, for tables.

    Raises:
        ValueError, ImportError: a module or function is not there; before either function is called.
        FileNotFoundError: the file of weights is not there.
    """
    make_model, make_data = find_function(model), find_function(data)
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(f"{weights}: no such file of weights")

    def load(_data_dir: Any, _seed: int, **_named: Any) -> Splits:
        return _splits(_called(make_data, data), data, num_bias_classes)

    return Workload(
        name=NAME,
        title=TITLE,
        bias_names=bias_names,
        bottleneck=bottleneck,
        network=lambda: _network(_called(make_model, model), model, weights),
        data=load,
        full_recipe=None,
        shipped_recipe=None,
        options=tuple(Option(name, str, "") for name in ("model", "data", "weights")),
        num_bias_classes=num_bias_classes,
    )


def find_function(name: str) -> Callable[[], Any]:
    """The function ``module:function``, of a module in the current folder or an installed one.

    Raises:
        ValueError, ImportError: it is not named so, or not there.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name.isidentifier():
        raise ValueError(f"expected module:function, such as mine:model, got {name!r}")
    if module_name.endswith(".py") or "/" in module_name:
        raise ValueError(f"expected the module's name, without .py and folders, such as mine:model, got {name!r}")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ImportError(f"module {module_name!r} cannot be imported: {error}") from error
        raise ImportError(f"there is no module {module_name!r} in {here}, and none is installed") from error
    except Exception as error:  # whatever the user's own code raises
        raise ImportError(f"module {module_name!r} cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        functions = [known for known, value in vars(module).items() if callable(value) and not known.startswith("_")]
        found = "is no function" if hasattr(module, function_name) else "is not there"
        raise ValueError(f"{name}: {function_name} {found}; {module.__file__} has {', '.join(functions) or 'none'}")
    return function


def make_network(model: str) -> nn.Module:
    """The network that the function ``module:function`` gives.

    Raises:
        ValueError, ImportError, TypeError: it is not there, fails or gives something else.
    """
    return _network(_called(find_function(model), model), model, None)


def _called(function: Callable[[], Any], name: str) -> Any:
    try:
        return function()
    except Exception as error:  # whatever the user's own code raises
        raise ValueError(f"{name} fails: {type(error).__name__}: {error}") from error


def _network(made: Any, name: str, weights: str | None) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise TypeError(f"{name} must return a torch.nn.Module, got {type(made).__name__}")
    if weights is not None:
        load_weights(made, Path(weights))
    return made


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a ``state_dict`` into the model, if it is all of it and fits.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is damaged, would have to be unpickled, or does not fit: which names and shapes.
    """
    given = _read_state_dict(path)
    expected = model.state_dict()
    problems = [
        f"{title} {_some(names)}"
        for title, names in (
            ("it lacks", sorted(expected.keys() - given.keys())),
            ("the model lacks", sorted(given.keys() - expected.keys())),
            (
                "other shapes of",
                [
                    f"{name} {tuple(given[name].shape)} for {tuple(value.shape)}"
                    for name, value in expected.items()
                    if name in given and given[name].shape != value.shape
                ],
            ),
        )
        if names
    ]
    if problems:
        raise ValueError(f"the state dict in {path} does not fit {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(given)


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _load_tensors(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file of weights") from error
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):  # as many trainers save it
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} must hold a state dict, names and tensors, got {type(content).__name__}")
    return dict(content)


def _load_tensors(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # PyTorch raises several classes; its advice to unpickle all the same is left out
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and would have to be unpickled, which is not done: "
            f"save model.state_dict() ({type(error).__name__})"
        ) from error


def _some(names: list[str]) -> str:
    more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return ", ".join(names[:SHOWN] + more)


def _splits(made: Any, name: str, num_bias_classes: int) -> Splits:
    is_one_set = isinstance(made, tuple | list) and any(isinstance(part, Tensor) for part in made)
    if not isinstance(made, tuple | list) or not 2 <= len(made) <= len(SETS) or is_one_set:
        got = "a single set" if is_one_set else type(made).__name__
        if isinstance(made, tuple | list) and not is_one_set:
            got = f"{len(made)} parts"
        raise TypeError(
            f"{name} must return (train, val) or (train, val, test), each three tensors (x, y, b), a Dataset or a "
            f"DataLoader, got {got}"
        )
    train, val, *test = (as_samples(part, label, num_bias_classes) for part, label in zip(made, SETS, strict=False))
    return Splits(None, train, val, test[0] if test else val)


def options_in_file(path: Path, flags_of: Callable[[str], Collection[str]]) -> list[str]:
    """The command line that a TOML file stands for: the workload, by default ``own``, and its options.

    ``gamma = 3`` is ``--gamma 3``, ``bias-names = ["left", "right"]`` is ``--bias-names left right``, and ``true`` is
    ``--name``; ``false`` is ``--no-name`` where there is such an option, and elsewhere as if it were left out.

    Args:
        flags_of: the options of a workload, as ``--gamma``.

    Raises:
        FileNotFoundError, ValueError: the file is missing or damaged, or holds tables, empty texts or unknown options.
    """
    try:
        content = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file of options") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML: {error}") from error
    workload = str(content.pop("workload", NAME))
    known, arguments = flags_of(workload), [workload]
    for key, value in content.items():
        flag = key.replace("_", "-")
        if isinstance(value, Mapping):
            raise ValueError(f"{path}: expected options such as gamma = 3, got a table [{key}]")
        if known and f"--{flag}" not in known:
            raise ValueError(f"{path}: {workload} has no option {key!r}; it has {', '.join(sorted(known))}")
        if value == "":
            raise ValueError(f"{path}: {key} is empty")
        if isinstance(value, bool):
            chosen = f"--{flag}" if value else f"--no-{flag}"
            arguments += [chosen] if chosen in known or not known else []
        elif isinstance(value, list):
            arguments += [f"--{flag}", *map(str, value)]
        else:
            arguments.append(f"--{flag}={value}")
    return arguments
