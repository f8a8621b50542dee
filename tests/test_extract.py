"""The fast loop against the reference, and what ``extract`` promises."""

import pytest
import torch
from torch import Tensor, nn

from ffw_fast import reference
from ffw_fast.extract import extract
from ffw_fast.extraction import Extraction

CLASSES = 4


def biased_set(count: int, biases: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Small images whose shape tells the target and whose colour tells the biases; target and bias independent."""
    source = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (count,), generator=source)
    b = torch.randint(CLASSES, (count, biases), generator=source)
    x = 0.3 * torch.randn(count, 3, 8, 8, generator=source)
    patterns = torch.randn(CLASSES, 1, 8, 8, generator=torch.Generator().manual_seed(99))
    colors = torch.randn(CLASSES, 3, 1, 1, generator=torch.Generator().manual_seed(98))
    x += patterns[y]
    for index in range(biases):
        columns = slice(None) if biases == 1 else slice(4 * index, 4 * index + 4)
        x[..., columns] += colors[b[:, index]]
    return x, y, b


def network(norm: bool, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Conv2d(8, 12, 3, stride=2, bias=False),
            nn.BatchNorm2d(12) if norm else nn.Identity(),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Linear(2, 2),
            nn.Flatten(),
            nn.Linear(48, CLASSES),
        )
        x, y, _b = biased_set(400, 1, seed)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(20):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def both(biases: int, norm: bool, **settings) -> tuple[Extraction, Extraction]:
    model = network(norm)
    train, val = biased_set(130, biases, 1), biased_set(70, biases, 2)
    arguments = {"bottleneck": "8", "num_bias_classes": CLASSES, "batch_size": 50, "progress": False, **settings}
    return extract(model, train, val, **arguments), reference.extract(model, train, val, **arguments)


def assert_held_together(fast: Extraction, plain: Extraction) -> None:
    """Relative 1e-3 on the scores and at least 99.5% of the mask bits."""
    assert fast.scores.keys() == plain.scores.keys()
    ours, theirs = (torch.cat([score.flatten() for score in found.scores.values()]) for found in (fast, plain))
    assert theirs.norm() > 0
    assert not (ours - theirs).norm() > 1e-3 * theirs.norm()
    assert ((ours >= 0) == (theirs >= 0)).double().mean() >= 0.995
    assert [row["head_epochs"] for row in fast.history] == [row["head_epochs"] for row in plain.history]
    assert fast.history[-1]["val_mi"] == pytest.approx(plain.history[-1]["val_mi"], rel=1e-2, abs=1e-4)
    assert fast.metrics["best"]["task_accuracy"] == pytest.approx(plain.metrics["best"]["task_accuracy"], abs=0.02)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("biases", [1, 2])
@pytest.mark.parametrize("schedule", ["published", "adaptive"])
def test_fast_and_reference_find_the_same_scores(biases, norm, schedule):
    assert_held_together(*both(biases, norm, schedule=schedule, anneal_rate=1e-3, max_epochs=4))


@pytest.mark.parametrize("gate", ["hard", "bernoulli", "concrete"])
def test_every_gate_kind_is_held_to_the_reference(gate):
    assert_held_together(*both(1, True, gate=gate, max_epochs=3))
