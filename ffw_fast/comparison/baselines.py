"""What FFW is up against: pruning by magnitude, and training on the same unbiased data in the ordinary ways."""

import copy
import math
from collections import OrderedDict
from dataclasses import replace

import torch
from torch import Tensor, nn

from ffw_fast.data.samples import EVALUATION_BATCH, Samples, batches_of
from ffw_fast.extraction import apply_masks
from ffw_fast.finetune import finetune
from ffw_fast.masking import maskable_layers
from ffw_fast.settings import Settings

VALIDATION_STEPS = 20  # from one validation to the next at least
MAGNITUDE_SPARSITIES = (0.5, 0.75, 0.9, 0.95, 0.975)  # Table 7 of the FFW paper


def magnitude_masks(model: nn.Module, sparsity: float) -> dict[str, Tensor]:
    """Masks that prune the smallest weights of all Conv and Linear layers together, that share of them.

    Raises:
        ValueError: the sparsity is not in [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"the sparsity must be in [0, 1), got {sparsity}")
    weights = {name: layer.weight.detach().abs() for name, layer in maskable_layers(model).items()}
    flat = torch.cat([weight.flatten() for weight in weights.values()])
    pruned = round(sparsity * len(flat))
    kept = torch.ones_like(flat, dtype=torch.bool)
    kept[flat.argsort(stable=True)[:pruned]] = False  # of equal ones the first
    parts = kept.split([weight.numel() for weight in weights.values()])
    return {name: part.view_as(weight) for (name, weight), part in zip(weights.items(), parts, strict=True)}


def prune_by_magnitude(model: nn.Module, sparsity: float) -> nn.Module:
    """A copy of the model without its smallest weights (global magnitude pruning)."""
    return apply_masks(copy.deepcopy(model), magnitude_masks(model, sparsity)).eval()


def all_weights(model: nn.Module) -> dict[str, Tensor]:
    """Masks that keep every weight of every Conv and Linear layer."""
    return {name: torch.ones_like(layer.weight, dtype=torch.bool) for name, layer in maskable_layers(model).items()}


def refit_last_layer(model: nn.Module, train: Samples, val: Samples, settings: Settings, epochs: int) -> nn.Module:
    """DFR (Kirichenko et al., ICLR 2023): the last layer alone trained on the unbiased set, best epoch by ``val``.

    What it reads is computed once, unless samples are augmented at random or its output is not yet the answer.
    """
    name, mask = list(all_weights(model).items())[-1]
    read = None if train.augments or val.augments else _read_by(model, name, [train, val])
    if read is None:
        return _trained(model, {name: mask}, train, val, settings, epochs)
    alone = nn.Sequential(OrderedDict(last=model.get_submodule(name)))
    train, val = read
    fitted = _trained(alone, {"last": mask}, train, val, replace(settings, bottleneck="last"), epochs)
    network = copy.deepcopy(model).eval().requires_grad_(True)
    network.get_submodule(name).load_state_dict(fitted.get_submodule("last").state_dict())
    return network


@torch.no_grad()
def _read_by(model: nn.Module, name: str, sets: list[Samples]) -> list[Samples] | None:
    """What the layer reads (n, D) as samples of their own; None if it is not one linear layer that gives the answer."""
    network = copy.deepcopy(model).eval()
    layer = network.get_submodule(name)
    if type(layer) is not nn.Linear:
        return None
    seen: list[tuple[Tensor, Tensor]] = []
    layer.register_forward_hook(lambda _layer, inputs, output: seen.append((inputs[0], output)))
    device = next(network.parameters()).device
    found = []
    for samples in sets:
        read = []
        for batch in batches_of(samples.x, EVALUATION_BATCH):
            seen.clear()
            logits = network(batch.to(device))
            if len(seen) != 1 or seen[0][1] is not logits or logits.dim() != 2:
                return None
            read.append(seen[0][0])
        found.append(samples.to(device)._replace(x=torch.cat(read)))
    return found


def train_on_unbiased(model: nn.Module, train: Samples, val: Samples, settings: Settings, epochs: int) -> nn.Module:
    """All Conv and Linear weights of the biased network trained on the unbiased set, best epoch by ``val``."""
    return _trained(model, all_weights(model), train, val, settings, epochs)


def train_from_scratch(model: nn.Module, train: Samples, val: Samples, settings: Settings, epochs: int) -> nn.Module:
    """A fresh network trained on the unbiased set, batch norm included, best epoch by ``val``."""
    return _trained(model, all_weights(model), train, val, settings, epochs, from_scratch=True)


def _trained(
    model: nn.Module,
    masks: dict[str, Tensor],
    train: Samples,
    val: Samples,
    settings: Settings,
    epochs: int,
    from_scratch: bool = False,
) -> nn.Module:
    """Those weights trained on the unbiased set; epochs of a few steps are not each worth a validation."""
    every = math.ceil(VALIDATION_STEPS / settings.steps_of(len(train.y)))
    return finetune(model, masks, train, val, settings, epochs=epochs, validate_every=every, from_scratch=from_scratch)
