"""The frozen network made cheap without changing what it computes, found by its graph and checked on a sample.

Batch norm in eval mode is an affine map per channel; where it alone reads the output of a layer, it folds into that
layer's frozen weight and bias (``w' = w a``): the gate multiplies ``w'``, the bias is not gated, and the scores'
gradient is the same. A ReLU or tanh that alone reads a layer's output, or a sum, may overwrite it.
"""

import copy
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ffw_fast.parts import DENSE_LAYERS, module_of, replace_module
from ffw_fast.precision import full_float32
from ffw_fast.tanh import FastTanh, use_fast_tanh

Classes: TypeAlias = type[nn.Module] | tuple[type[nn.Module], ...]
Outputs: TypeAlias = Callable[[nn.Module], list[Tensor]]

IN_PLACE = ("setitem", *(f"i{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")))
OVERWRITING = (nn.ReLU, FastTanh)  # whose gradient needs the output alone
TOLERANCE = 1e-3  # of the largest output; folding rounds differently, but is far nearer than this


def simplified(model: nn.Module, bottleneck: str, outputs: Outputs) -> nn.Module:
    """A copy of the model, simplified where that can be shown to be exact, else as it is.

    Args:
        model: in eval mode.
        bottleneck: name of the module whose output is read, so that nothing may overwrite it or fold into it.
        outputs: runs a model on a sample and gives all the outputs that matter.
    """
    plain, cheap = copy.deepcopy(model), copy.deepcopy(model)
    use_fast_tanh(plain)
    try:
        graph = fx.Tracer().trace(cheap)
    except Exception:  # a forward that cannot be traced: whatever its code raises under symbolic inputs
        return plain
    fold_batch_norms(cheap, graph, bottleneck)
    use_fast_tanh(cheap)  # into which the tracer would have looked
    overwrite_in_activations(cheap, graph, bottleneck)
    with full_float32():
        return cheap if still_gives(cheap, outputs(plain), outputs) else plain


def still_gives(model: nn.Module, expected: list[Tensor], outputs: Outputs) -> bool:
    """Whether the outputs that matter are what they were, up to rounding; not where the model's code fails."""
    try:
        return all(
            bool((ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max())  # not where one is NaN
            for ours, theirs in zip(outputs(model), expected, strict=True)
        )
    except Exception:  # whatever that code raises
        return False


def fold_batch_norms(model: nn.Module, graph: fx.Graph, bottleneck: str = "") -> list[str]:
    """Fold every batch norm that alone reads a Conv's or Linear's output, in place; names of those folded."""
    folded = []
    for layer_name, norm_name in _pairs(model, graph, _BatchNorm, bottleneck):
        layer: Any = model.get_submodule(layer_name)
        norm: Any = model.get_submodule(norm_name)
        if norm.running_mean is None or norm.num_features != layer.weight.shape[0]:
            continue
        _fold(layer, norm)
        replace_module(model, norm_name, nn.Identity())
        folded.append(norm_name)
    return folded


def overwrite_in_activations(model: nn.Module, graph: fx.Graph, bottleneck: str = "") -> None:
    """Let every ``nn.ReLU`` and ``FastTanh`` overwrite what it alone reads.

    That is a sum, or the output of a Conv, a Linear or a folded batch norm.
    """
    pairs = _pairs(model, graph, OVERWRITING, bottleneck)
    names = [reader for layer, reader in pairs if not any(_is_watched(model.get_submodule(x)) for x in (layer, reader))]
    runs, kept = _runs(graph), _given_by(graph, bottleneck)
    for node in graph.nodes:
        if isinstance(module_of(model, node), OVERWRITING) and runs[node.target] == 1 and node.args:
            (source,) = node.args
            if _is_read_once(source, kept) and source.target is operator.add:  # which keeps nothing for later
                names.append(str(node.target))
    for name in names:
        activation: Any = model.get_submodule(name)
        activation.inplace = True


def _pairs(model: nn.Module, graph: fx.Graph, reader: Classes, bottleneck: str) -> Iterator[tuple[str, str]]:
    """(layer, reader) names: a module of the reader's class that alone reads a linear layer's output, both run once.

    What is read as the bottleneck has two readers.
    """
    runs, kept = _runs(graph), _given_by(graph, bottleneck)
    for node in graph.nodes:
        if not isinstance(module_of(model, node), reader):
            continue
        source: Any = node.args[0] if node.args else None
        read_once = _is_read_once(source, kept)
        while read_once and isinstance(module_of(model, source), nn.Identity):  # a folded batch norm
            source = source.args[0]
            read_once = _is_read_once(source, kept)
        if not read_once or type(module_of(model, source)) not in DENSE_LAYERS:
            continue
        if runs[source.target] == runs[node.target] == 1:
            yield source.target, str(node.target)


def _runs(graph: fx.Graph) -> Counter[Any]:
    """How often each module runs, by name."""
    return Counter(node.target for node in graph.nodes if node.op == "call_module")


def _given_by(graph: fx.Graph, bottleneck: str) -> set[fx.Node]:
    """The nodes whose value a module, which may be a container, gives to what lies outside of it."""

    def is_inside(node: fx.Node) -> bool:
        if node.op == "call_module":
            return f"{node.target}.".startswith(f"{bottleneck}.")
        return bottleneck in node.meta.get("nn_module_stack", {})

    outside = [node for node in graph.nodes if not is_inside(node)]
    return {source for node in outside for source in node.all_input_nodes if is_inside(source)}


def _is_read_once(node: Any, kept: set[fx.Node]) -> bool:
    return isinstance(node, fx.Node) and len(node.users) == 1 and node not in kept


def _is_watched(module: nn.Module) -> bool:
    """Whether hooks read the module's gradients, which makes its output a view that nothing may overwrite."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


@torch.no_grad()
def _fold(layer: Any, norm: Any) -> None:
    """``a (w x + c - mean) + beta`` with ``a = scale / sqrt(var + eps)`` as one layer, computed in double precision."""
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    start = 0 if layer.bias is None else layer.bias.double()
    shift = (start - norm.running_mean.double()) * factor
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    weight = layer.weight.double() * factor.view(-1, *[1] * (layer.weight.dim() - 1))
    layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)
    layer.bias = nn.Parameter(shift.to(layer.weight.dtype), requires_grad=False)


def split_before(model: nn.Module, first: type[nn.Module], bottleneck: str) -> tuple[nn.Module, nn.Module] | None:
    """The part of a model before its first module of a class, and the rest, as ``GraphModule`` of its own parts.

    None where there is nothing before it, where the rest reads more than that one output, where the bottleneck is not
    a module without parts in the rest, or where the forward pass cannot be traced or hooks stand about it.
    """
    if model._forward_hooks or model._forward_pre_hooks:
        return None
    try:
        graph = WholeModules(first).trace(model)
    except Exception:  # whatever the model's code raises under symbolic inputs
        return None
    node = next(node for node in graph.nodes if isinstance(module_of(model, node), first))
    (given,) = node.all_input_nodes
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if given.op == "placeholder" or len(inputs) != 1:
        return None
    front = _up_to(graph, given)
    _begin_with(graph, given)
    head, rest = (_without_dead_code(fx.GraphModule(model, part)) for part in (front, graph))
    left = [node for node in rest.graph.nodes if node.op == "placeholder"]
    if left[1].users or bottleneck not in {str(node.target) for node in rest.graph.nodes if node.op == "call_module"}:
        return None
    rest.graph.erase_node(left[1])
    rest.recompile()
    return head.eval(), rest.eval()


def _up_to(graph: fx.Graph, last: fx.Node) -> fx.Graph:
    """A copy of the graph that ends with a node and gives its value."""
    front, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        copies[node] = front.node_copy(node, copies.__getitem__)
        if node is last:
            break
    front.output(copies[last])
    return front


def _begin_with(graph: fx.Graph, given: fx.Node) -> None:
    """Let an input, the first, stand for a node's value; what comes before it and is not read otherwise goes."""
    nodes = list(graph.nodes)
    with graph.inserting_before(nodes[0]):
        given.replace_all_uses_with(graph.placeholder("frozen"))
    for before in reversed(nodes[: nodes.index(given) + 1]):
        if not before.users and before.op != "placeholder":
            graph.erase_node(before)  # also one that works in place: its part is done


def _without_dead_code(module: fx.GraphModule) -> fx.GraphModule:
    module.graph.eliminate_dead_code(_has_effects)
    module.recompile()
    module.delete_all_unused_submodules()
    return module


def _has_effects(node: fx.Node) -> bool:
    """Whether a node does more than give a value, so that it matters even where nothing reads that."""
    if node.op not in ("call_function", "call_method"):
        owner: Any = node.graph.owning_module
        return node.is_impure() or bool(getattr(module_of(owner, node), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") or name in IN_PLACE or bool(node.kwargs.get("inplace"))
    return in_place or node.is_impure()


class WholeModules(fx.Tracer):
    """Does not look into modules of a class, nor into those without parts."""

    def __init__(self, whole: type[nn.Module]) -> None:
        super().__init__()
        self.whole = whole

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self.whole) or not m._modules or super().is_leaf_module(m, module_qualified_name)
