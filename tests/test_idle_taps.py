"""An extraction where images of a few pixels leave taps idle: trained without them, and as if they had been there."""

from pathlib import Path

import pytest
import torch
from torch import nn

from ffw_fast import cautions
from ffw_fast.convolutions.tap_major import TapMajorConv2d
from ffw_fast.extract import extract
from ffw_fast.flat_layout import FlatLayout
from ffw_fast.gated_network import GatedNetwork
from ffw_fast.gates import GateKind
from ffw_fast.models import ResNet18
from tests.held_together import assert_held_together, by_both
from tests.processes import on_processes
from tests.short_runs import assert_same_bits
from tests.small_images import BOTTLENECK, CLASSES, SETTINGS, biased_set

IDLE = {"on_one": 8 * 8 * 8, "to_one": 6 * 8 * 5}  # taps of 3 x 3 that meet nothing


def network() -> nn.Module:
    """Convolutions of images of 2 x 2 pixels, from these to one, and of one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential()
        model.large, model.relu1, model.pool = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2)
        model.on_four, model.norm, model.relu2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()
        model.to_one, model.relu3 = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), nn.ReLU()
        model.on_one, model.tanh, model.flatten = nn.Conv2d(8, 8, 3, padding=1), nn.Tanh(), nn.Flatten()
        model.classifier = nn.Linear(8, CLASSES)
    return model.eval()


def idle_scores(scores: dict[str, torch.Tensor]) -> torch.Tensor:
    """Those of the taps that meet nothing but padding."""
    to_one, on_one = scores["to_one"].flatten(2), scores["on_one"].flatten(2)
    return torch.cat([to_one[:, :, [0, 1, 2, 3, 6]].flatten(), on_one[:, :, [0, 1, 2, 3, 5, 6, 7, 8]].flatten()])


@pytest.mark.parametrize(
    "settings",
    [{}, {"schedule": "adaptive", "anneal_rate": 1e-3}, {"gate": "hard"}, {"gate": "concrete"}],
    ids=["published", "adaptive", "hard", "concrete"],
)
def test_it_is_held_to_the_reference(settings):
    train, val = biased_set(130, 1, 1), biased_set(70, 1, 2)
    fast, plain = by_both(network(), train, val, **SETTINGS, **settings, max_epochs=4)
    assert_held_together(fast, plain)
    assert {name: scores.shape for name, scores in fast.scores.items()} == {
        name: layer.weight.shape
        for name, layer in network().named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    }
    for ours, theirs in ((fast.scores, plain.scores), (fast.best_scores, plain.best_scores)):
        assert idle_scores(ours).numel() == sum(IDLE.values())
        torch.testing.assert_close(idle_scores(ours), idle_scores(theirs))
    assert fast.metrics["pruned"]["sparsity"] == pytest.approx(plain.metrics["pruned"]["sparsity"], abs=0.005)


def test_bise_is_held_to_the_reference():
    train, val = biased_set(130, 1, 1), biased_set(70, 1, 2)
    fast, plain = by_both(network(), train, val, **SETTINGS, method="bise", max_epochs=12)
    for name, scores in plain.best_scores.items():
        torch.testing.assert_close(fast.best_scores[name], scores, rtol=1e-3, atol=1e-5)
    for measured in ("weight_sparsity", "sparsity"):
        assert fast.metrics["best"][measured] == pytest.approx(plain.metrics["best"][measured], abs=0.005)


@pytest.mark.parametrize("kind", GateKind)
def test_idle_taps_are_left_out_where_gates_are_not_random(kind):
    trained = GatedNetwork(network(), BOTTLENECK, kind, 0, biased_set(8, 1, 1)[0])
    by_taps = [name for name, layer in trained.module.named_modules() if isinstance(layer, TapMajorConv2d)]
    assert by_taps == ([] if kind.is_random else ["on_four", "to_one", "on_one"])
    numbers = sum(score.numel() for score in trained.gates.views(trained.gates.scores).values())
    assert trained.gates.count == numbers + (0 if kind.is_random else sum(IDLE.values()))
    weights = {name: layer.weight for name, layer in network().named_modules() if hasattr(layer, "weight")}
    assert trained.layout.length == FlatLayout({name: weights[name].shape for name in trained.gates.shapes}).length


def test_most_of_a_resnet18_is_idle_on_images_of_32_pixels():
    trained = GatedNetwork(ResNet18(10).eval(), BOTTLENECK, GateKind.FFW, 0, torch.randn(2, 3, 32, 32))
    numbers = sum(score.numel() for score in trained.gates.views(trained.gates.scores).values())
    assert round(numbers / 1e6, 1) == 4.2
    assert round(1 - numbers / trained.gates.count, 2) == 0.62


def test_buffers_over_all_gates_and_over_those_that_are_trained():
    trained = GatedNetwork(network(), BOTTLENECK, GateKind.FFW, 0, biased_set(8, 1, 1)[0])
    buffer = torch.randn(trained.gates.length)
    whole = trained.over_all(buffer)
    back = trained.over_trained(whole)
    for name in trained.gates.shapes:
        assert torch.equal(trained.gates.view(back, name), trained.gates.view(buffer, name))
    assert not idle_scores(trained.layout.views(whole)).any()
    frozen = trained.layout.views(trained.over_all(trained.gates.weight))
    for name in ("to_one", "on_one", "classifier"):
        expected = network().get_submodule(name).weight.detach()
        live = frozen[name] != 0
        assert torch.equal(frozen[name][live], expected[live])
        assert live.sum() == expected.numel() - IDLE.get(name, 0)


@pytest.mark.parametrize("settings", [{}, {"schedule": "adaptive", "anneal_rate": 1e-3}, {"method": "bise"}])
def test_it_resumes_with_the_same_bits(settings, tmp_path):
    train, val = biased_set(130, 1, 1), biased_set(70, 1, 2)
    arguments = {**SETTINGS, **settings}
    whole = extract(network(), train, val, **arguments, max_epochs=4)
    extract(network(), train, val, **arguments, max_epochs=2, run_dir=tmp_path)
    resumed = extract(network(), train, val, **arguments, max_epochs=4, run_dir=tmp_path, resume=True)
    assert_same_bits(resumed, whole)
    again = extract(network(), train, val, **arguments, max_epochs=4, run_dir=tmp_path, resume=True)
    assert all(torch.equal(again.best_scores[name], scores) for name, scores in whole.best_scores.items())


def _go_on(rank: int, folder: Path, epochs: int) -> None:
    train, val = biased_set(130, 1, 1), biased_set(70, 1, 2)
    extract(network(), train, val, **SETTINGS, max_epochs=epochs, run_dir=folder, resume=True, shard=True)


def test_it_goes_on_with_another_number_of_processes(tmp_path):
    """Several processes train all gates, one leaves idle ones out; checkpoints hold all."""
    train, val = biased_set(130, 1, 1), biased_set(70, 1, 2)
    whole = extract(network(), train, val, **SETTINGS, max_epochs=4)
    _go_on(0, tmp_path, 2)
    on_processes(2, _go_on, tmp_path, 3)
    found = extract(network(), train, val, **SETTINGS, max_epochs=4, run_dir=tmp_path, resume=True)
    assert len(found.history) == 4
    assert found.history[1]["loss"] == whole.history[1]["loss"], "the first two epochs are those of one process"
    for name, scores in whole.scores.items():
        torch.testing.assert_close(found.scores[name], scores, rtol=1e-3, atol=1e-5)


def test_idle_gates_count_among_those_that_never_got_a_gradient():
    trained = GatedNetwork(network(), BOTTLENECK, GateKind.FFW, 0, biased_set(8, 1, 1)[0])
    moments = torch.ones_like(trained.gates.scores)
    silent = trained.gates.view(moments, "on_four")[:8]
    silent.zero_()
    share = (silent.numel() + sum(IDLE.values())) / trained.gates.count
    (text,) = cautions.of_gates(trained.gates, moments)
    assert f"{share:.0%} of the gates never got a gradient" in text
    trained.gates.view(moments, "on_one")[:] = 0
    assert any(
        "no gate of layer 'on_one' ever got a gradient" in text for text in cautions.of_gates(trained.gates, moments)
    )
