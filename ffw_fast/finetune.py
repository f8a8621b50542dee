"""Fine-tuning of what survives: masks fixed, the surviving weights and the biases of the masked layers trained."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ffw_fast.bise import BiasedObjective
from ffw_fast.bottleneck import AtBottleneck, bottleneck_module
from ffw_fast.checks import check_integer, check_number
from ffw_fast.convolutions import cheapest_convolutions
from ffw_fast.copies import copy_of
from ffw_fast.data.samples import EVALUATION_BATCH, Inputs, Samples, batches_of
from ffw_fast.heads import PrivateHeads
from ffw_fast.inputs import prepare
from ffw_fast.measure import accuracy
from ffw_fast.modes import training_modes
from ffw_fast.objective import Objective, objective
from ffw_fast.seeding import FINETUNE_ORDERS, epoch_order
from ffw_fast.settings import Settings

EPOCHS = 10
LR = 1e-3


@training_modes()
def finetune(
    model: nn.Module,
    masks: dict[str, Tensor],
    train: Any,
    val: Any,
    settings: Settings,
    *,
    epochs: int = EPOCHS,
    gamma: float = 0.0,
    lr: float = LR,
    validate_every: int = 1,
    from_scratch: bool = False,
) -> nn.Module:
    """Train the weights that the masks keep, and the same layers' biases, by Adam on ``alpha CE + gamma MI``.

    The network stays in eval mode, batch norm as it is. With ``gamma`` above 0 private heads are fitted before every
    epoch and learn in every step, as in the extraction.

    Args:
        model: the pruned network; it is copied.
        masks: layer name -> boolean mask of the weight, or of its rows and the bias, (out_channels,); what is false
            stays 0.
        train, val: as for ``ffw_fast.extract``.
        settings: of the extraction, for the bottleneck, alpha, batch size and seed; those of BISE reweight the
            cross-entropy of its biased training set (``ffw_fast.bise``).
        validate_every: epochs from one validation to the next, for few samples that make short epochs.
        from_scratch: the network has learned nothing yet: all its parameters are trained, in training mode, so that
            batch norm learns its statistics. A minibatch of one sample, which has none, is left out.

    Returns:
        The network of the epoch with the highest validation task accuracy (the earliest of equals), in eval mode; the
        pruned network itself if none that was validated is better. Without ``val``, which BISE does not need, that of
        the last epoch.

    Raises:
        ValueError, TypeError: bad data or settings, or data that does not fit the model.
    """
    check_integer("epochs", epochs, 1)
    check_number("gamma", gamma, positive=False)
    check_number("lr", lr, positive=True)
    check_integer("validate_every", validate_every, 1)
    val_is_given = val is not None
    problem = prepare(model, train, val, settings).to(next(model.parameters()).device)
    train, val = problem.train, problem.val
    network = copy_of(model).eval().requires_grad_(False)
    opened, hooks = _open(network, masks)
    if from_scratch:
        opened = list(network.requires_grad_(True).parameters())
    optimizer = torch.optim.Adam(opened, lr)
    heads = PrivateHeads.of(settings, train, problem.width)
    reader = _Reader(network, settings.bottleneck)
    loss = _loss(settings, gamma, train, reader)
    with cheapest_convolutions(network, train.x[:2]):
        best, best_accuracy = copy.deepcopy(network.state_dict()), reader.accuracy(val)
        for epoch in range(epochs):
            if gamma > 0:
                heads.fit_on(train, reader.features, settings.cache_augmented)
            rows = epoch_order(len(train.y), settings.seed, FINETUNE_ORDERS, epoch)
            network.train(from_scratch)
            for x, y, b in train.batches(rows, settings.batch_size):
                if from_scratch and len(y) == 1:
                    continue
                optimizer.zero_grad()
                features, logits = reader(x)
                loss(logits, y, heads.logits(features.detach()), b).backward(logits, features, heads)
                optimizer.step()
                if gamma > 0:  # after the backward pass, which reads the heads as they were
                    heads.step(features, b)
            network.eval()
            if (epoch + 1) % validate_every and epoch + 1 < epochs:
                continue
            reached = reader.accuracy(val)
            if reached > best_accuracy or not val_is_given:
                best, best_accuracy = copy.deepcopy(network.state_dict()), reached
    network.load_state_dict(best)
    for hook in (reader.hook, *hooks):
        hook.remove()
    for ours, theirs in zip(network.parameters(), model.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)
    return network


def _loss(
    settings: Settings, gamma: float, train: Samples, reader: "_Reader"
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Objective]:
    """J of a minibatch with this gamma: of logits (n, C), y (n,), head logits (n, heads, K) and b (n, heads)."""
    if settings.method == "bise":
        _features, logits = reader(train.x[:1].clone())
        return replace(BiasedObjective.from_settings(settings, train, logits.shape[1]), gamma=gamma)
    return lambda logits, y, head_logits, b: objective(logits, y, head_logits, b, settings.alpha, gamma)


def _open(network: nn.Module, masks: dict[str, Tensor]) -> tuple[list[nn.Parameter], list[RemovableHandle]]:
    """Let the masked layers' weights and biases be trained; the opened parameters, and hooks that keep pruned ones."""
    opened: list[nn.Parameter] = []
    hooks: list[RemovableHandle] = []
    for name, mask in masks.items():
        layer: Any = network.get_submodule(name)
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(True)
            opened.append(parameter)
        kept = mask.to(layer.weight.device)
        if kept.dim() == 1:
            if layer.bias is not None:
                hooks.append(layer.bias.register_hook(lambda grad, kept=kept: grad * kept))
            kept = kept.view(-1, *[1] * (layer.weight.dim() - 1))
        hooks.append(layer.weight.register_hook(lambda grad, kept=kept: grad * kept))
    return opened, hooks


class _Reader:
    """Runs a network and keeps what its bottleneck gives."""

    def __init__(self, network: nn.Module, bottleneck: str) -> None:
        self.network = network
        self._at_bottleneck = AtBottleneck()
        self.hook = bottleneck_module(network, bottleneck).register_forward_hook(self._at_bottleneck)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (n, D) and logits (n, C), in the heads' float32 whatever the network's dtype."""
        logits = self.network(x)
        return self._at_bottleneck.taken().float(), logits.float()

    @torch.no_grad()
    def features(self, x: Inputs) -> Tensor:
        return torch.cat([self(batch)[0] for batch in batches_of(x, EVALUATION_BATCH)])

    @torch.no_grad()
    def accuracy(self, samples: Samples) -> float:
        logits = torch.cat([self.network(batch) for batch in batches_of(samples.x, EVALUATION_BATCH)])
        return accuracy(logits, samples.y).item()
