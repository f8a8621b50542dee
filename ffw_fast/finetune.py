"""Fine-tuning of what survives: masks fixed, the surviving weights and the biases of the masked layers trained."""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ffw_fast.bise import BiasedObjective
from ffw_fast.bottleneck import AtBottleneck, bottleneck_module
from ffw_fast.checks import check_integer, check_number
from ffw_fast.convolutions import cheapest_convolutions
from ffw_fast.copies import copy_of
from ffw_fast.data.samples import EVALUATION_BATCH, Inputs, Samples, batches_of
from ffw_fast.heads import PrivateHeads
from ffw_fast.inputs import Problem, prepare
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
    network = copy_of(model).eval().requires_grad_(False)
    with ExitStack() as hooks:
        opened = _open(network, masks, hooks)
        if from_scratch:
            opened = list(network.requires_grad_(True).parameters())
        reader = _Reader(network, settings.bottleneck, hooks)
        training = _Training(problem, reader, torch.optim.Adam(opened, lr), gamma)
        hooks.enter_context(cheapest_convolutions(network, problem.train.x[:2]))
        best, best_accuracy = copy.deepcopy(network.state_dict()), reader.accuracy(problem.val)
        for epoch in range(epochs):
            training.epoch(epoch, from_scratch)
            if (epoch + 1) % validate_every and epoch + 1 < epochs:
                continue
            reached = reader.accuracy(problem.val)
            if reached > best_accuracy or not val_is_given:
                best, best_accuracy = copy.deepcopy(network.state_dict()), reached
    network.load_state_dict(best)
    for ours, theirs in zip(network.parameters(), model.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)
    return network


class _Training:
    """Trains what the optimizer holds, and private heads beside it where gamma is above 0."""

    def __init__(self, problem: Problem, reader: "_Reader", optimizer: torch.optim.Optimizer, gamma: float) -> None:
        self._samples, self._settings, self._gamma = problem.train, problem.settings, gamma
        self._reader, self._optimizer = reader, optimizer
        self._heads = PrivateHeads.of(problem.settings, problem.train, problem.width)
        self._loss = _loss(problem.settings, gamma, problem.train, reader)

    def epoch(self, number: int, in_training_mode: bool) -> None:
        """One pass over the samples; the network is in eval mode before and after it."""
        settings, network = self._settings, self._reader.network
        if self._gamma > 0:
            self._heads.fit_on(self._samples, self._reader.features, settings.cache_augmented)
        network.train(in_training_mode)
        rows = epoch_order(len(self._samples.y), settings.seed, FINETUNE_ORDERS, number)
        for x, y, b in self._samples.batches(rows, settings.batch_size):
            if len(y) > 1 or not in_training_mode:
                self._step(x, y, b)
        network.eval()

    def _step(self, x: Tensor, y: Tensor, b: Tensor) -> None:
        self._optimizer.zero_grad()
        features, logits = self._reader(x)
        losses = self._loss(logits, y, self._heads.logits(features.detach()), b)
        losses.backward(logits, features, self._heads)
        self._optimizer.step()
        if self._gamma > 0:  # after the backward pass, which reads the heads as they were
            self._heads.step(features, b)


def _loss(
    settings: Settings, gamma: float, train: Samples, reader: "_Reader"
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Objective]:
    """J of a minibatch with this gamma: of logits (n, C), y (n,), head logits (n, heads, K) and b (n, heads)."""
    if settings.method == "bise":
        _features, logits = reader(train.x[:1].clone())
        return replace(BiasedObjective.from_settings(settings, train, logits.shape[1]), gamma=gamma)
    return lambda logits, y, head_logits, b: objective(logits, y, head_logits, b, settings.alpha, gamma)


def _open(network: nn.Module, masks: dict[str, Tensor], hooks: ExitStack) -> list[nn.Parameter]:
    """Let the masked layers' weights and biases be trained; the opened parameters. The hooks keep pruned ones at 0."""
    opened: list[nn.Parameter] = []
    for name, mask in masks.items():
        layer: Any = network.get_submodule(name)
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(True)
            opened.append(parameter)
        kept = mask.to(layer.weight.device)
        if kept.dim() == 1:
            if layer.bias is not None:
                hooks.enter_context(layer.bias.register_hook(lambda grad, kept=kept: grad * kept))
            kept = kept.view(-1, *[1] * (layer.weight.dim() - 1))
        hooks.enter_context(layer.weight.register_hook(lambda grad, kept=kept: grad * kept))
    return opened


class _Reader:
    """Runs a network and keeps what its bottleneck gives."""

    def __init__(self, network: nn.Module, bottleneck: str, hooks: ExitStack) -> None:
        self.network = network
        self._at_bottleneck = AtBottleneck()
        hooks.enter_context(bottleneck_module(network, bottleneck).register_forward_hook(self._at_bottleneck))

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
