"""Bias labels for a biased training set that has none, as BISE's paper guesses them."""

from dataclasses import replace

import torch
from torch import nn

from ffw_fast.data.samples import EVALUATION_BATCH, Samples, batches_of
from ffw_fast.vanilla import Recipe, train_vanilla


def guessing_network(
    network: nn.Module, train: Samples, recipe: Recipe, *, seed: int, device: torch.device | str | None = None
) -> nn.Module:
    """A network whose answers stand in for unknown bias labels: one epoch of training teaches it little but the bias.

    Args:
        network: freshly initialised; it is trained in place.
        train: the biased training set; its bias labels are not looked at.
        recipe: of the vanilla network; of it all but the number of epochs is taken.
    """
    return train_vanilla(network, train, replace(recipe, epochs=1, milestones=()), seed=seed, device=device)


@torch.no_grad()
def with_guessed_bias(samples: Samples, guesser: nn.Module) -> Samples:
    """The samples with what the network answers as their one bias label, (n, 1)."""
    device = next(guesser.parameters()).device
    answers = [guesser(batch.to(device)).argmax(1) for batch in batches_of(samples.x, EVALUATION_BATCH)]
    return samples._replace(b=torch.cat(answers).unsqueeze(1).to(samples.b.device))
