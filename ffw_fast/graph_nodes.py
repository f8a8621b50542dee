"""What a node of a network's graph does to channels: non-linearities, additions, pools, and what leaves them alone."""

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules import activation as activations
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from ffw_fast.parts import DENSE_LAYERS, module_of

NOT_ELEMENTWISE = ("MultiheadAttention", "Softmax", "Softmax2d", "Softmin", "LogSoftmax", "GLU")
ACTIVATIONS = tuple(getattr(activations, name) for name in activations.__all__ if name not in NOT_ELEMENTWISE)
FUNCTIONS = frozenset(  # as functions and, where tensors have them, as methods
    (
        *("celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid", "mish"),
        *("relu", "relu6", "selu", "sigmoid", "silu", "softplus", "softsign", "tanh"),
    )
)
ADDITIONS = (operator.add, operator.iadd, torch.add)
POOL_KINDS = ("Max", "Avg", "AdaptiveAvg", "AdaptiveMax")
POOLS = {d: tuple(getattr(nn, f"{kind}Pool{d}d") for kind in POOL_KINDS) for d in (1, 2, 3)}  # by their dimensions
POOL_FUNCTIONS = {f"{kind}_pool{d}d": d for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for d in (1, 2, 3)}
PASSING_FUNCTIONS = POOL_FUNCTIONS.keys() | {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"}
STATELESS = (nn.Identity, _DropoutNd, *POOLS[1], *POOLS[2], *POOLS[3])
PASSING = (_BatchNorm, *STATELESS)  # between a layer and its non-linearity; each channel for itself


def first_input(node: fx.Node) -> fx.Node | None:
    """The node that another reads first, given by its place or by its name."""
    return next(iter(node.all_input_nodes), None)


def node_name(node: fx.Node) -> str:
    """Name of the function or method that a node calls, without the underscore of one that works in place."""
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return target.removesuffix("_") if node.op in ("call_function", "call_method") else ""


def is_addition(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_function":
        return node.target in ADDITIONS
    return node.op == "call_method" and node_name(node) == "add"


def pooled_dimensions(model: nn.Module, node: Any) -> int:
    """The number of dimensions that a pool runs over; 0 where the model's node is none."""
    module = module_of(model, node)
    kinds = (dimensions for dimensions, pools in POOLS.items() if isinstance(module, pools))
    return next(kinds, POOL_FUNCTIONS.get(node_name(node), 0))


def is_activation(model: nn.Module, node: fx.Node) -> bool:
    """Whether a gate can multiply what the model's node gives, a non-linearity of one input."""
    if not node.users or first_input(node) is None:
        return False  # a statement that works in place has no output that a gate could multiply
    return isinstance(module_of(model, node), ACTIVATIONS) or node_name(node) in FUNCTIONS


def leaves_channels(model: nn.Module, node: Any) -> bool:
    """Whether the model's node may lie between a layer and its non-linearity: it treats each channel for itself."""
    return isinstance(module_of(model, node), PASSING) or node_name(node) in PASSING_FUNCTIONS


def is_layer(model: nn.Module, node: Any) -> bool:
    """Whether the model's node calls a Conv or Linear layer."""
    return type(module_of(model, node)) in DENSE_LAYERS
