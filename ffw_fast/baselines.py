"""What FFW is up against: pruning by magnitude, and training on the same unbiased data in the ordinary ways."""

import copy

import torch
from torch import Tensor, nn

from ffw_fast.data.samples import Samples
from ffw_fast.extraction import apply_masks
from ffw_fast.finetune import finetune
from ffw_fast.modules import maskable_layers
from ffw_fast.settings import Settings

MAGNITUDE_SPARSITIES = (0.5, 0.75, 0.9, 0.95, 0.975)  # Table 7 of the FFW paper


def magnitude_masks(model: nn.Module, sparsity: float) -> dict[str, Tensor]:
    """Masks that prune the smallest weights of all Conv and Linear layers together, up to that share of them.

    Raises:
        ValueError: the sparsity is not in [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"the sparsity must be in [0, 1), got {sparsity}")
    weights = {name: layer.weight.detach().abs() for name, layer in maskable_layers(model).items()}
    flat = torch.cat([weight.flatten() for weight in weights.values()])
    pruned = round(sparsity * len(flat))
    threshold = flat.kthvalue(pruned).values if pruned else flat.new_tensor(-1.0)
    return {name: weight > threshold for name, weight in weights.items()}


def prune_by_magnitude(model: nn.Module, sparsity: float) -> nn.Module:
    """A copy of the model without its smallest weights (global magnitude pruning)."""
    return apply_masks(copy.deepcopy(model), magnitude_masks(model, sparsity)).eval()


def all_weights(model: nn.Module) -> dict[str, Tensor]:
    """Masks that keep every weight of every Conv and Linear layer."""
    return {name: torch.ones_like(layer.weight, dtype=torch.bool) for name, layer in maskable_layers(model).items()}


def refit_last_layer(model: nn.Module, train: Samples, val: Samples, settings: Settings, epochs: int) -> nn.Module:
    """DFR (Kirichenko et al., ICLR 2023): the last layer alone trained on the unbiased set, best epoch by ``val``."""
    name, mask = list(all_weights(model).items())[-1]
    return finetune(model, {name: mask}, train, val, settings, epochs=epochs)


def train_on_unbiased(model: nn.Module, train: Samples, val: Samples, settings: Settings, epochs: int) -> nn.Module:
    """All weights trained on the unbiased set, best epoch by ``val``: of the biased network, or of a fresh one."""
    return finetune(model, all_weights(model), train, val, settings, epochs=epochs)
