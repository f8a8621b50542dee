"""What still leaks: task accuracy of any network, and what private heads, fitted afresh, read of the biases there."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ffw_fast.bottleneck import outputs_of
from ffw_fast.convolutions import cheapest_convolutions
from ffw_fast.data.samples import EVALUATION_BATCH, Inputs, Splits
from ffw_fast.evaluation import evaluate_predictions
from ffw_fast.heads import PrivateHeads
from ffw_fast.inputs import widened
from ffw_fast.measure import measure
from ffw_fast.ops import joint_distribution, joint_information
from ffw_fast.seeding import seeded_generator
from ffw_fast.settings import Settings
from ffw_fast.theory import biasedness, label_information

SHUFFLES = 10  # of the labels, for the floor of the MI


def leakage(network: nn.Module, settings: Settings, splits: Splits, sparsity: float = 0.0) -> dict[str, Any]:
    """Task accuracy of a network and what private heads, fitted afresh on its features, read of the biases.

    Heads are fitted on ``splits.for_heads`` and measured on ``splits.test``. ``bias_mi_floor`` is the MI of the same
    predictions with shuffled labels: what the formula gives where there is nothing to read. ``biasedness`` and
    ``output_mi`` are of the network's own answers: see ``ffw_fast.theory``.
    """
    weight = next(network.parameters())
    device, dtype = weight.device, weight.dtype
    sets = ((splits.for_heads, "train"), (splits.test, "test"))
    train, test = (widened(part, dtype, name).to(device) for part, name in sets)
    with cheapest_convolutions(network, test.x[:2]):
        logits, test_features = _outputs(network, settings.bottleneck, test.x)
        heads = PrivateHeads.create(
            train.b.shape[1],
            settings.num_bias_classes,
            test_features.shape[1],
            seed=settings.seed,
            batch_size=settings.batch_size,
            device=device,
        )
        heads.fit_on(train, lambda x: _outputs(network, settings.bottleneck, x)[1])
    head_logits = heads.logits(test_features)
    predictions, biases = logits.argmax(1).cpu(), test.b.cpu()
    groups = evaluate_predictions(predictions, test.y.cpu(), biases)
    classes = max(logits.shape[1], settings.num_bias_classes)
    return {
        **measure(logits, head_logits, test.y, test.b, sparsity).as_dict(),
        "bias_mi_floor": information_floor(head_logits, test.b, settings.seed),
        "biasedness": [_known(biasedness(predictions, test.y.cpu(), column)) for column in biases.T],
        "output_mi": [label_information(column, predictions, classes) for column in biases.T],
        "groups": groups.as_dict(),
    }


def _known(value: float) -> float | None:
    """As JSON has it: None for NaN."""
    return None if math.isnan(value) else value


def _outputs(network: nn.Module, bottleneck: str, x: Inputs) -> tuple[Tensor, Tensor]:
    """Logits (n, C) and features (n, D) of all samples, in float32, which heads learn in."""
    parts = [outputs_of(network, bottleneck, batch) for batch in x.split(EVALUATION_BATCH)]
    logits, features = zip(*parts, strict=True)
    return torch.cat(logits).float(), torch.cat(features).flatten(1).float()


def information_floor(head_logits: Tensor, b: Tensor, seed: int) -> list[float]:
    """Mean MI of each head's predictions with labels in random order: logits (n, heads, K), labels (n, heads)."""
    source = seeded_generator(seed, "shuffled labels")
    shuffled = [b[torch.randperm(len(b), generator=source, device="cpu").to(b.device)] for _ in range(SHUFFLES)]
    values = [joint_information(joint_distribution(head_logits, labels)) for labels in shuffled]
    return torch.stack(values).mean(0).tolist()
