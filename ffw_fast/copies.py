"""Copies of users' models, and the tensors that such a model keeps."""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Model = TypeVar("Model", bound=nn.Module)


def copy_of(model: Model) -> Model:
    """A deep copy, also of a model that has kept outputs of its last forward pass, which PyTorch refuses to copy."""
    kept = [value for module in model.modules() for value in tree_leaves(list(vars(module).values()))]
    outputs = [value for value in kept if isinstance(value, Tensor) and not value.is_leaf]
    with torch.no_grad():  # or parts compiled by torch.jit would copy their parameters into outputs
        return copy.deepcopy(model, {id(output): output.detach().clone() for output in outputs})


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, dense; what modules keep beside them (``get_extra_state``) is left out."""
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    return {name: value if value.layout == torch.strided else value.to_dense() for name, value in state.items()}
