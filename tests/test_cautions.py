"""What a run should make one doubt is said in plain words, and only where it holds."""

import warnings

import pytest
import torch
from torch import nn

from ffw_fast import cautions, heads
from ffw_fast.extract import extract
from ffw_fast.extraction import Extraction
from ffw_fast.measure import Measurement
from tests import small_images
from tests.six_features import CLASSES, arguments, network, samples


def measured(task: float, *bias: float) -> Measurement:
    return Measurement(task, list(bias), [0.0] * len(bias), 0.0)


BALANCED = torch.arange(1000) % 10
SKEWED = torch.where(torch.arange(1000) < 700, 0, 1)


@pytest.mark.parametrize(
    ("task", "bias", "said"),
    [
        (0.8, 0.9, []),
        (0.115, 0.9, ["at chance (0.115): the bias is all"]),
        (0.8, 0.72, ["bias 0 does not beat chance on the biased network (0.720)"]),
        (0.05, 0.3, ["at chance (0.050)", "bias 0 does not"]),
        (0.13, 0.74, []),
    ],
)
def test_chance_is_the_most_frequent_label(task, bias, said):
    """Ten targets of equal share, and a bias whose most frequent label has a share of 0.7."""
    found = list(cautions.of_vanilla(measured(task, bias), BALANCED, SKEWED[:, None]))
    assert len(found) == len(said)
    assert all(part in text for part, text in zip(said, found, strict=True))


class TwoWays(nn.Module):
    """Logits from two branches, of which the bottleneck is one."""

    def __init__(self, used: bool = True) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, CLASSES)
        self.used = used

    def forward(self, x):
        left, right = self.left(x), self.right(x)
        return self.last(torch.relu(left * self.used + right))


def test_a_bottleneck_beside_the_way():
    x, _, _ = samples(8)
    assert list(cautions.of_bottleneck(network(), "relu", x)) == []
    assert list(cautions.of_bottleneck(network(), "classifier", x)) == []
    assert list(cautions.of_bottleneck(small_images.network(), "pool", small_images.biased_set(8)[0])) == []
    (partly,) = cautions.of_bottleneck(TwoWays(), "left", x)
    assert "'left' feeds only a part of the network" in partly
    beside = list(cautions.of_bottleneck(TwoWays(used=False), "left", x))
    assert "feeds only a part" in beside[0]
    assert "the logits do not depend on bottleneck 'left'" in beside[1]


class FrozenBackbone(nn.Module):
    """Nobody follows gradients of its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        with torch.no_grad():
            x = self.first(x).relu()
        return self.second(x)


@pytest.mark.parametrize(
    ("model", "bottleneck"),
    [(nn.Sequential(nn.Tanh(), nn.Linear(6, CLASSES)), "0"), (FrozenBackbone(), "first")],
    ids=["nothing before it", "no gradients"],
)
def test_a_bottleneck_that_no_gate_acts_on(model, bottleneck, short):
    found, _ = run(model, samples(60), samples(60, seed=1), bottleneck=bottleneck)
    assert any(f"no gate acts on what bottleneck {bottleneck!r} gives" in text for text in found.warnings)


def test_the_hook_is_gone_afterwards():
    model, (x, _, _) = network(), samples(8)
    before = model(x)
    list(cautions.of_bottleneck(model, "relu", x))
    assert torch.equal(model(x), before)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(heads, "MAX_EPOCHS", 10)


def run(model, train, val, **changes):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = extract(model, train, val, **arguments(**changes))
    return found, [str(warning.message) for warning in seen]


def dead_unit_model():
    model = network()
    with torch.no_grad():
        model.fc1.bias.fill_(-1e3)  # no unit of the first layer ever answers
    return model


def test_gates_without_a_gradient(short, tmp_path):
    found, seen = run(dead_unit_model(), samples(60), samples(60, seed=1), run_dir=tmp_path)
    assert any("no gate of layer 'fc1' ever got a gradient" in text for text in found.warnings)
    assert found.warnings == seen
    assert not found.scores["fc1"].any()
    found.save(tmp_path)
    assert Extraction.load(tmp_path, dead_unit_model()).warnings == found.warnings


def test_a_resumed_run_says_the_same(short, tmp_path):
    expected, _ = run(dead_unit_model(), samples(60), samples(60, seed=1))
    run(dead_unit_model(), samples(60), samples(60, seed=1), run_dir=tmp_path, max_epochs=1)
    again, _ = run(dead_unit_model(), samples(60), samples(60, seed=1), run_dir=tmp_path, resume=True)
    assert again.warnings == expected.warnings


def test_mostly_dead_gates_are_counted():
    model = network()
    with torch.no_grad():
        model.fc1.bias[1:] = -1e3
    found, _ = run(model, samples(60), samples(60, seed=1))
    assert any("% of the gates never got a gradient" in text for text in found.warnings)


def test_labels_that_have_nothing_to_do_with_the_samples(short):
    """Nothing to remove, since the bias labels are noise."""
    (x, y, b), (vx, vy, _) = samples(200), samples(200, seed=1)
    source = torch.Generator().manual_seed(0)
    noise = [torch.randint(CLASSES, b.shape, generator=source) for _ in range(2)]
    found, _ = run(network(), (x, y, noise[0]), (vx, vy, noise[1]))
    assert any("bias 0 does not beat chance" in text for text in found.warnings)


def on_small_images(**changes):
    task = {"bottleneck": small_images.BOTTLENECK, "num_bias_classes": small_images.CLASSES}
    return run(small_images.network(), *(small_images.biased_set(200, seed=seed) for seed in (0, 1)), **task, **changes)


def test_a_sound_run_says_nothing(short):
    found, seen = on_small_images(schedule="adaptive", anneal_rate=1e-3, max_epochs=100)
    assert len(found.history) < 100
    assert found.warnings == seen == []


def test_a_rate_that_lets_t_collapse(short):
    """Every step falls by the most it may, so that T is below 0.1 after 6 epochs of 20 steps."""
    rushed = {"schedule": "adaptive", "anneal_rate": 1.0}
    found, seen = on_small_images(**rushed, max_epochs=200)
    assert found.warnings == seen
    (text,) = found.warnings
    assert text.startswith("anneal_rate=1 is so large that it hardly held T back, which collapsed to ")
    assert f"in {20 * len(found.history)} steps, by 2% in most" in text
    for epochs, collapsed in ((5, False), (6, True)):
        shorter, _ = on_small_images(**rushed, max_epochs=epochs)
        assert any("collapsed" in text for text in shorter.warnings) is collapsed


@pytest.mark.parametrize("changes", [{"schedule": "published"}, {"method": "bise"}])
def test_a_rate_of_a_schedule_without_one(changes, short):
    found, seen = on_small_images(**changes, anneal_rate=1e-3)
    assert found.warnings == seen
    schedule = found.settings.schedule
    assert f"anneal_rate=0.001 changes nothing: it is of schedule 'adaptive', and the schedule is {schedule!r}" in seen


def cut_short(found: Extraction) -> list[str]:
    return [text for text in found.warnings if "before its schedule did" in text]


@pytest.mark.parametrize(
    ("changes", "end", "remedy"),
    [
        ({"schedule": "published"}, "1e-08", "allow more epochs (max_epochs)"),
        ({"schedule": "adaptive"}, "1e-05", "allow more epochs (max_epochs) or take a larger anneal_rate"),
        ({"schedule": "halving", "gate": "bernoulli"}, "0.001", "allow more epochs (max_epochs)"),
    ],
)
def test_a_run_that_ends_before_its_schedule(changes, end, remedy, short):
    found, seen = on_small_images(**changes)
    (text,) = found.warnings
    assert found.warnings == seen
    assert text.startswith("the run ended after 2 epochs, before its schedule did: T is ")
    assert f"was to fall to {end}; gates are still partly open that pruning shuts" in text
    assert text.endswith(f"the pruned network is not yet the one that was trained: {remedy}")


@pytest.mark.parametrize("val", [True, False])
def test_gates_of_bise_are_shut_before_its_schedule_ends(val):
    """Its own gates are open or shut at any T."""
    train, other = samples(60), samples(60, seed=1)
    found, seen = run(network(), train, other if val else None, method="bise")
    assert found.warnings == seen
    (text,) = cut_short(found)
    assert "T is 1 and was to fall to 0.001; the gates are open or shut, but the scores" in text
    assert "anneal_rate" not in text


def test_a_checkpoint_that_is_continued_does_not_keep_it(short, tmp_path):
    given = {"schedule": "adaptive", "anneal_rate": 1e-3, "run_dir": tmp_path}
    first, _ = on_small_images(**given, max_epochs=2)
    assert len(cut_short(first)) == 1
    assert len(cut_short(on_small_images(**given, max_epochs=3, resume=True)[0])) == 1, "that of its own end"
    found, seen = on_small_images(**given, max_epochs=100, resume=True)
    assert found.warnings == seen == []
