"""A pruned network made physically smaller: channels that are zero, or feed only zeros, are cut out.

First, inputs of a layer that are constant go into its bias, and the weights that read them become zero. Then every
channel that only zero weights read is removed, with all that is coupled to it (batch norm, residual sum,
concatenation), which torch-pruning's dependency graph tells. All arithmetic is in double precision, and every single
step is kept only if the network's outputs stay the same.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_leaves

from ffw_fast.channels import ChannelMask
from ffw_fast.constant_inputs import constant_inputs
from ffw_fast.copies import copy_of
from ffw_fast.parts import DENSE_LAYERS

SAMPLES = 2  # of the example; as many of noise stand beside them
TOLERANCE = 1e-9  # of the largest output, in double precision
COMPUTED = "the weight is computed: make it permanent first (prune.remove, remove_parametrizations)"
READS_ALL_CHANNELS = (nn.LayerNorm, nn.GroupNorm, nn.MultiheadAttention, nn.RNNBase)
Snapshot = list[tuple[nn.Module, dict[str, Any]]]


def compact(model: nn.Module, example: Tensor) -> nn.Module:
    """A smaller copy of a network with zeros in it that computes the same, up to rounding.

    Removed are output channels of Conv and Linear layers that are zero, constant, or read by zero weights alone. The
    constant that a removed channel carried goes into the bias of what read it. Before a convolution that pads with
    zeros a constant other than 0 is no bias at the borders; of all such channels that a convolution reads one stays,
    and carries the others' constants, too. Layers keep their names and classes, so the state dict has the same names
    (and a bias where one became necessary); ``load_compacted`` reads it.

    Channels stay where something reads all of them together (layer norm, attention), at grouped convolutions that are
    not depthwise, and where an output would change without them; a warning names each such layer and says why.

    Args:
        model: any module, such as ``Extraction.model()``, or what magnitude pruning gives. It stays as it is.
        example: a float batch (n, ...) that it can be called with, on the model's device. What is proved on it and on
            noise of its shape is taken to hold for all inputs of that shape.

    Returns:
        The copy, in eval mode, with the model's dtypes.

    Raises:
        ImportError: torch-pruning is missing.
        TypeError: the example is no floating-point tensor.
        ValueError: the example is empty, or in double precision the model fails on it or gives no finite outputs.
    """
    _dependency_graph()  # before any work
    small = copy_of(model).eval()
    dtypes = {name: value.dtype for name, value in _tensors(small)}
    frozen = {name for name, parameter in small.named_parameters() if not parameter.requires_grad}
    work = _Work(small.double().requires_grad_(True), _samples(example))
    work.fold_constants()
    work.remove_unread()
    if all(small.get_parameter(name).shape == before.shape for name, before in model.named_parameters()):
        return copy_of(model).eval()  # with constants in biases, and nothing cut, it would only be larger
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(name not in frozen)
    _cast(small, dtypes)
    return small


def load_compacted(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Give a network the shapes and weights that ``compact`` left of it; returns the network, changed in place.

    Args:
        model: built as the one that was compacted; its own weights do not matter.
        state: state dict of what ``compact`` gave.

    Raises:
        ValueError: a name that the network has not, or that is missing, or another number of dimensions.
    """
    own = model.state_dict()
    added = {name for name in state.keys() - own.keys() if name.endswith("bias")}
    if unknown := sorted((state.keys() ^ own.keys()) - added):
        raise ValueError(f"the state dict and {type(model).__name__} differ in {', '.join(unknown)}")
    for name, value in state.items():
        if name in own and value.dim() != own[name].dim():
            raise ValueError(f"{name!r} has shape {tuple(value.shape)}, expected {own[name].dim()} dimensions")
    for name, value in state.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf in module._buffers:
            module._buffers[leaf] = value.clone()
        else:
            setattr(module, leaf, nn.Parameter(value.clone()))
    for module in model.modules():
        _describe(module)
    return model.eval()


def _describe(module: Any) -> None:
    """Make a layer's attributes agree with the shape of its weight."""
    if type(module) is nn.Linear:
        module.out_features, module.in_features = module.weight.shape
    elif type(module) in DENSE_LAYERS:
        if _is_depthwise(module):
            module.groups = len(module.weight)
        module.out_channels, module.in_channels = len(module.weight), module.weight.shape[1] * module.groups
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        statistics = next((value for value in (module.running_mean, module.weight) if value is not None), None)
        module.num_features = module.num_features if statistics is None else len(statistics)


def _dependency_graph() -> Any:
    """torch-pruning's class, imported where it is needed."""
    try:
        from torch_pruning import DependencyGraph
    except ImportError as error:
        raise ImportError("a compact network needs torch-pruning: pip install 'ffw_fast[compact]'") from error
    return DependencyGraph()


def _channel_mask_pruner() -> Any:
    """How torch-pruning removes channels of a ``ChannelMask``."""
    from torch_pruning.pruner.function import BasePruningFunc

    class ChannelMaskPruner(BasePruningFunc):
        def prune_out_channels(self, layer: Any, idxs: list[int]) -> nn.Module:
            kept = torch.ones(len(layer.mask), dtype=torch.bool, device=layer.mask.device)
            kept[idxs] = False
            layer.mask = layer.mask[kept]
            return layer

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer: Any) -> int:
            return len(layer.mask)

        get_in_channels = get_out_channels

    return ChannelMaskPruner()


def _samples(example: Tensor) -> Tensor:
    """Some of the example's samples and noise of their shape, in double precision."""
    if not isinstance(example, Tensor) or not example.is_floating_point():
        kind = example.dtype if isinstance(example, Tensor) else type(example).__name__
        raise TypeError(f"the example must be a floating-point tensor, got {kind}")
    if not example.numel():
        raise ValueError(f"the example must hold at least one sample, got shape {tuple(example.shape)}")
    given = example[:SAMPLES].double()
    source = torch.Generator().manual_seed(0)
    noise = torch.randn(given.shape, generator=source, dtype=given.dtype, device="cpu").to(given.device)
    return torch.cat([given, noise])


class _Work:
    """The network under work, in double precision, and the outputs that it must keep."""

    def __init__(self, model: nn.Module, samples: Tensor) -> None:
        self.model, self.samples = model, samples
        self.names = {module: name for name, module in model.named_modules()}
        try:
            self.outputs = self.run()
        except Exception as error:  # whatever the model's own code raises
            problem = f"the model fails on the example in double precision: {error}"
            raise ValueError(problem) from error
        if not all(output.isfinite().all() for output in self.outputs):
            raise ValueError("the model's outputs on the example are not finite")

    @torch.no_grad()
    def run(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(self.model(self.samples.clone())) if isinstance(leaf, Tensor)]

    def is_unchanged(self) -> bool:
        """Whether the network still runs and its outputs are what they were."""
        try:
            now = self.run()
        except Exception:  # shapes that no longer fit: in the model's own code or in a layer
            return False
        return len(now) == len(self.outputs) and all(
            ours.shape == theirs.shape
            and torch.allclose(ours, theirs, rtol=0, atol=TOLERANCE * float(theirs.abs().max()))
            for ours, theirs in zip(now, self.outputs, strict=True)
        )

    def fold_constants(self) -> None:
        """Move constant inputs into the biases of what reads them, so that the weights on them are zero."""
        try:
            constants = constant_inputs(self.model, self.samples)
        except Exception as error:  # a forward that refuses NaN, or swallows it
            warnings.warn(f"compact: no constants go into biases, as they cannot be told: {error}", stacklevel=3)
            return
        for name, values in constants.items():
            layer: Any = self.model.get_submodule(name)
            if _is_computed(layer):
                _warn(f"layer {name!r}", COMPUTED)
                continue
            before = _snapshot(self.model)
            _fold(layer, values)
            if not self.is_unchanged():
                _restore(before)
                _warn(f"layer {name!r}", "its weight is read elsewhere, too")

    def remove_unread(self) -> None:
        """Cut out all channels that zero weights alone read, until there are none."""
        refused: set[nn.Module] = set()
        changed = True
        while changed:
            changed = False
            graph = _dependency_graph()
            graph.register_customized_layer(ChannelMask, _channel_mask_pruner())
            try:
                with torch.enable_grad():
                    graph.build_dependency(self.model, self.samples, verbose=False)
            except Exception as error:  # what the graph's code makes of operations that it does not know
                _warn("all layers", f"torch-pruning cannot read the network's graph: {error}")
                return
            for root in [module for module in graph.module2node if type(module) in DENSE_LAYERS]:
                if root in refused:
                    continue
                before = _snapshot(self.model)
                try:
                    removed = self._remove(graph, root)
                except _KeptDenseError as error:
                    problem = str(error)
                except Exception as error:  # likewise
                    problem = f"torch-pruning cannot tell what is coupled to it: {type(error).__name__}: {error}"
                else:
                    changed |= removed
                    if not removed or self.is_unchanged():
                        continue
                    problem = "without its unread channels the network's outputs would change"
                _restore(before)
                refused.add(root)
                _warn(f"layer {self.names[root]!r}", problem)
                changed = True
                break  # the graph no longer describes the network

    def _remove(self, graph: Any, root: nn.Module) -> bool:
        """Remove the root layer's unread output channels and what is coupled to them; whether there were any."""
        prune = graph.get_pruner_of_module(root).prune_out_channels
        unread = _unread(graph.get_pruning_group(root, prune, range(graph.get_out_channels(root))))
        kept: list[int] = []  # unread, but no layer may lose all its channels
        while unread and not graph.check_pruning_group(graph.get_pruning_group(root, prune, unread)):
            kept.append(unread.pop(0))
        changed = bool(kept) and _silence(graph.get_pruning_group(root, prune, kept))
        if not unread:
            return changed
        group = graph.get_pruning_group(root, prune, unread)
        if _unread(group) != unread:  # some are coupled to channels that are read
            return changed
        for dependency, _ in group:
            self._check_removable(dependency.target.module)
        group.prune(record_history=False)
        return True

    def _check_removable(self, module: nn.Module) -> None:
        """Refuse where fewer channels give this module another meaning."""
        title = f"{self.names.get(module)!r} ({type(module).__name__})"
        if _is_computed(module):
            raise _KeptDenseError(f"of {title} {COMPUTED}")
        if isinstance(module, READS_ALL_CHANNELS):
            raise _KeptDenseError(f"{title} reads all its channels together")
        if getattr(module, "groups", 1) > 1 and not _is_depthwise(module):
            raise _KeptDenseError(f"{title} is a grouped convolution")


class _KeptDenseError(Exception):
    """Says why a layer stays as it is."""


def _is_computed(layer: nn.Module) -> bool:
    """Whether a layer computes its weight anew in every forward pass, so that no other can take its place."""
    return getattr(layer, "weight", None) is not None and layer._parameters.get("weight") is None


def _unread(group: Any) -> list[int]:
    """Channels of a group's root layer that nothing but zero weights reads; none where no layer reads them at all."""
    roots = set(group[0].root_idxs)
    read: set[int] = set()
    has_reader = False
    for item in group:
        module, prune = item.dep.target.module, item.dep.handler
        if (
            not isinstance(module, nn.Linear | _ConvNd)
            or _is_depthwise(module)
            or prune.__name__ != "prune_in_channels"
        ):
            continue
        has_reader = True
        used = _used_inputs(module)
        read.update(root for index, root in zip(item.idxs, item.root_idxs, strict=True) if used[index])
    return sorted(roots - read) if has_reader else []


def _used_inputs(layer: Any) -> list[bool]:
    """For each input channel of a Conv or Linear, whether a weight that is not 0 reads it."""
    used = layer.weight.detach() != 0
    if isinstance(layer, _ConvTransposeNd):
        return used.flatten(1).any(1).tolist()
    groups = getattr(layer, "groups", 1)
    return used.view(groups, len(used) // groups, used.shape[1], -1).any(-1).any(1).flatten().tolist()


def _silence(group: Any) -> bool:
    """Let the group's layers compute 0 in channels that nobody reads, so that they read nothing either."""
    changed = False
    for item in group:
        layer = item.dep.target.module
        if type(layer) not in DENSE_LAYERS or item.dep.handler.__name__ == "prune_in_channels":
            continue
        if layer.weight[item.idxs].any():
            layer.weight = _with_zeros(layer.weight, item.idxs)
            changed = True
        if layer.bias is not None:
            layer.bias = _with_zeros(layer.bias, item.idxs)
    return changed


def _with_zeros(parameter: Tensor, rows: list[int]) -> nn.Parameter:
    changed = parameter.detach().clone()
    changed[rows] = 0
    return nn.Parameter(changed)


def _is_depthwise(layer: Any) -> bool:
    """As torch-pruning sees it: one input channel for each output channel."""
    return getattr(layer, "groups", 1) == getattr(layer, "out_channels", 0) == getattr(layer, "in_channels", 0) > 1


@torch.no_grad()
def _fold(layer: Any, values: Tensor) -> None:
    """Move what constant inputs add to a Conv or Linear into its bias, and put zeros on their weights.

    Where the layer pads with zeros, inputs with a constant k other than 0 add less at the borders. In each group of
    the convolution the one with the largest |k| stands in for all of them: its weights become the sum of ``w k`` over
    them, divided by its own k.

    Args:
        values: (in_channels,), NaN where an input varies.
    """
    groups = getattr(layer, "groups", 1)
    weight = layer.weight.unflatten(0, (groups, -1))  # [groups, out, in, kernel...], out and in of one group
    constant = ~values.isnan().view(groups, 1, -1, *[1] * (weight.dim() - 3))
    added = weight * values.nan_to_num(0).view_as(constant)
    folded = weight.masked_fill(constant, 0)
    if _pads_with_zeros(layer):
        of_group = values.nan_to_num(0).view(groups, -1)
        for group, stays in enumerate(of_group.abs().argmax(1).tolist()):
            if (value := of_group[group, stays]) != 0:
                folded[group, :, stays] = added[group].sum(1) / value
    else:
        bias = added.flatten(2).sum(2).flatten()
        layer.bias = nn.Parameter(bias if layer.bias is None else layer.bias + bias)
    layer.weight = nn.Parameter(folded.flatten(0, 1))


def _pads_with_zeros(layer: Any) -> bool:
    return getattr(layer, "padding_mode", "") == "zeros" and any(layer._reversed_padding_repeated_twice)


def _snapshot(model: nn.Module) -> Snapshot:
    """What every module holds, so that replaced parameters and attributes can be put back."""
    return [
        (module, {name: dict(value) if type(value) is dict else value for name, value in vars(module).items()})
        for module in model.modules()
    ]


def _restore(snapshot: Snapshot) -> None:
    for module, own in snapshot:
        vars(module).clear()
        vars(module).update(own)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _cast(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Give every tensor its dtype back; a new bias takes its layer's."""
    for name, value in _tensors(model):
        value.data = value.data.to(dtypes.get(name, dtypes.get(f"{name.removesuffix('bias')}weight", value.dtype)))


def _warn(title: str, why: str) -> None:
    warnings.warn(f"compact: {title} kept dense: {why}", stacklevel=4)
