"""The fast loop against the reference, and what ``extract`` promises."""

import copy
import gc
import itertools
import weakref

import pytest
import torch

from ffw_fast import heads, reference, schedule
from ffw_fast.convolutions.fft import FftConv2d, has_compiled_kernel
from ffw_fast.evaluation import evaluate
from ffw_fast.extract import extract
from ffw_fast.extraction import Extraction
from ffw_fast.gated_network import GatedNetwork
from ffw_fast.gates import GateKind
from ffw_fast.loop import Loop
from tests import six_features
from tests.held_together import assert_held_together, by_both
from tests.small_images import BOTTLENECK, CLASSES, SETTINGS, Block, biased_set, network


@pytest.fixture
def few_head_epochs(monkeypatch):
    """Refits that end early, in both loops: the head epochs of the reference are what takes long."""
    monkeypatch.setattr(heads, "MAX_EPOCHS", 8)


def both(biases: int, norm: bool, **settings) -> tuple[Extraction, Extraction]:
    return by_both(network(norm), biased_set(130, biases, 1), biased_set(70, biases, 2), **SETTINGS, **settings)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("biases", [1, 2])
@pytest.mark.parametrize("schedule", ["published", "adaptive"])
def test_fast_and_reference_find_the_same_scores(biases, norm, schedule):
    assert_held_together(*both(biases, norm, schedule=schedule, anneal_rate=1e-3, max_epochs=4))


@pytest.mark.parametrize(
    "how",
    [{"schedule": "published"}, {"schedule": "adaptive", "anneal_rate": 5e-3, "batch_size": 4}],
    ids=lambda how: how["schedule"],
)
def test_all_that_is_logged_is_the_references_across_falls_of_the_temperature(few_head_epochs, monkeypatch, how):
    """With two biases, alpha and gamma that are nobody's default, and a last minibatch that is short."""
    monkeypatch.setattr(schedule, "MI_PATIENCE", 0)
    arguments = six_features.arguments(alpha=0.5, gamma=3.0, max_epochs=8, **how)
    train, val = six_features.samples(65, 2, seed=1), six_features.samples(45, 2, seed=2)
    fast, plain = (run(six_features.network(), train, val, **arguments) for run in (extract, reference.extract))
    temperatures = [row["temperature"] for row in plain.history]
    judged = ["pruned_task_accuracy" in row for row in plain.history]
    assert temperatures[-1] < 0.2 and any(judged)
    for ours, theirs in zip(fast.history, plain.history, strict=True):
        assert ours.keys() == theirs.keys()
        for name in theirs.keys() - {"seconds"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), (theirs["epoch"], name)
    for network_name in ("vanilla", "pruned", "best"):
        ours, theirs = (found.metrics[network_name] for found in (fast, plain))
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), (network_name, name)
    for name in plain.scores:
        torch.testing.assert_close(fast.scores[name], plain.scores[name], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(fast.best_scores[name], plain.best_scores[name], rtol=1e-3, atol=1e-4)


def test_bf16_rounds_the_passes_and_hardly_changes_the_loss(few_head_epochs):
    sets = six_features.samples(64, seed=1), six_features.samples(45, seed=2)
    exact, rounded = (
        extract(six_features.network(), *sets, **six_features.arguments(max_epochs=1, precision=precision)).history[0]
        for precision in ("fp32", "bf16")
    )
    assert rounded["loss"] != exact["loss"]
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.02)


@pytest.mark.parametrize("gate", ["hard", "bernoulli", "concrete"])
def test_every_gate_kind_is_held_to_the_reference(gate):
    assert_held_together(*both(1, True, gate=gate, max_epochs=3))


@pytest.mark.parametrize("gate", ["ffw", "hard", "bernoulli", "concrete"])
def test_channel_gates_are_held_to_the_reference(few_head_epochs, gate):
    assert_held_together(*both(2, True, gate=gate, granularity="channel", max_epochs=3))


def test_adaptive_channel_gates_are_held_to_the_reference(few_head_epochs):
    assert_held_together(*both(1, True, granularity="channel", schedule="adaptive", anneal_rate=1e-3, max_epochs=3))


def test_channel_gates_of_a_residual_network_are_held_to_the_reference(few_head_epochs):
    """Gates behind one ReLU that runs twice, and a shortcut that enters the sum before it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torch.nn.Sequential()
        model.block1, model.block2 = Block(3, 6, True), Block(6, 6, False)
        model.pool, model.flatten = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        model.classifier = torch.nn.Linear(6, CLASSES)
    model.eval()
    train, val = biased_set(130, 1, 1), biased_set(70, 1, 2)
    chosen = {"granularity": "channel", "where": "block1.conv1, block2.*"}
    fast, plain = by_both(model, train, val, **SETTINGS, **chosen, max_epochs=3)
    assert_held_together(fast, plain)
    assert list(fast.scores) == ["block1.conv1", "block2.conv1", "block2.conv2"]
    assert_whole(fast, val)


def assert_whole(found: Extraction, val) -> None:
    """The plain network measures as it did in the loop."""
    for best, name in ((False, "pruned"), (True, "best")):
        model, measured = found.model(best), found.metrics[name]
        assert (model(val[0]).argmax(1) == val[1]).double().mean() == pytest.approx(measured["task_accuracy"])
        assert 0 < measured["sparsity"] < 1 and 0 < measured["weight_sparsity"] < 1


def test_pruned_channels_are_zeros_in_a_plain_network_and_stay_so_in_fine_tuning(few_head_epochs, tmp_path):
    train, val = biased_set(300, seed=1), biased_set(200, seed=2)
    arguments = {**SETTINGS, "granularity": "channel", "gamma": 1.0, "max_epochs": 60}
    found = extract(network(), train, val, **arguments, schedule="adaptive", anneal_rate=5e-3)
    assert {name: tuple(scores.shape) for name, scores in found.scores.items()} == {"conv1": (8,), "conv2": (12,)}
    assert_whole(found, val)
    tuned = found.finetune(train, val, epochs=2)
    for model in (found.model(), tuned):
        assert type(model) is torch.nn.Sequential
        for layer, norm in ((model.conv1, model.norm1), (model.conv2, model.norm2)):
            dropped = ~found.masks["conv1" if layer is model.conv1 else "conv2"]
            for tensor in (layer.weight, layer.bias, norm.weight, norm.bias):
                assert tensor is None or not tensor[dropped].any()
    assert not torch.equal(tuned.classifier.weight, found.model().classifier.weight)
    found.save(tmp_path)
    loaded = Extraction.load(tmp_path, network())
    assert torch.equal(loaded.model()(val[0]), found.model()(val[0]))


@pytest.mark.parametrize("schedule", ["published", "adaptive"])
def test_channel_gates_resume_with_the_same_bits(few_head_epochs, tmp_path, schedule):
    train, val = biased_set(130, seed=1), biased_set(70, seed=2)
    arguments = {**SETTINGS, "granularity": "channel", "gate": "bernoulli", "schedule": schedule, "anneal_rate": 1e-3}
    whole = extract(network(), train, val, **arguments, max_epochs=4)
    extract(network(), train, val, **arguments, max_epochs=2, run_dir=tmp_path)
    resumed = extract(network(), train, val, **arguments, max_epochs=4, run_dir=tmp_path, resume=True)
    assert all(torch.equal(resumed.scores[name], whole.scores[name]) for name in whole.scores)
    assert resumed.metrics["best"] == whole.metrics["best"]


def test_fft_convolutions_are_held_to_the_reference():
    """Large kernels go through FFTs in the fast loop, and through direct convolutions in the reference."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torch.nn.Sequential()
        model.conv1 = torch.nn.Conv2d(3, 8, 7, padding=3)
        model.norm1, model.relu1 = torch.nn.BatchNorm2d(8), torch.nn.ReLU()
        model.conv2 = torch.nn.Conv2d(8, 64, 7, padding=3)
        model.norm2, model.relu2 = torch.nn.BatchNorm2d(64), torch.nn.ReLU()
        model.conv3 = torch.nn.Conv2d(64, 64, 7, padding=3)
        model.norm3, model.tanh = torch.nn.BatchNorm2d(64), torch.nn.Tanh()
        model.pool, model.flatten = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        model.classifier = torch.nn.Linear(64, CLASSES)
    model.eval()
    train, val = biased_set(70, 1, 1), biased_set(40, 1, 2)
    if has_compiled_kernel():
        fast = GatedNetwork(model, BOTTLENECK, GateKind.FFW, 0, train[0][:4])
        assert any(isinstance(layer, FftConv2d) for layer in fast.module.modules())
    assert_held_together(*by_both(model, train, val, **SETTINGS, max_epochs=2))


@pytest.mark.parametrize("gate", ["bernoulli", "concrete"])
@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_adaptive_random_gates_are_held_to_the_reference(few_head_epochs, gate, granularity):
    settings = {"gate": gate, "granularity": granularity, "schedule": "adaptive", "anneal_rate": 1e-3}
    fast, plain = both(1, True, **settings, max_epochs=3)
    assert_held_together(fast, plain)
    falls = [[row["temperature"] for row in found.history] for found in (fast, plain)]
    assert falls[0] == pytest.approx(falls[1], rel=1e-5)


@pytest.mark.parametrize("gate", ["bernoulli", "concrete"])
@pytest.mark.parametrize("method", ["ffw", "bise"])
def test_the_biased_network_is_measured_without_the_random_gates(few_head_epochs, gate, method):
    for found in both(1, True, gate=gate, method=method, max_epochs=1):
        reached = evaluate(network(), biased_set(70, 1, 2)).average
        assert found.metrics["vanilla"]["task_accuracy"] == pytest.approx(reached)


def test_whole_published_schedule_ends_by_temperature_and_debiases():
    train, val = biased_set(300, seed=1), biased_set(200, seed=2)
    found = extract(network(), train, val, **SETTINGS, seed=3)
    temperatures = [row["temperature"] for row in found.history]
    assert temperatures[0] == 1 and temperatures[-1] == pytest.approx(1e-8) and len(temperatures) < 200
    assert all(after in (before, pytest.approx(before / 10)) for before, after in itertools.pairwise(temperatures))
    assert found.metrics["vanilla"]["bias_accuracy"][0] > 0.8
    assert found.metrics["best"]["bias_accuracy"][0] < found.metrics["vanilla"]["bias_accuracy"][0]
    judged = [row for row in found.history if "pruned_bias_accuracy" in row]
    assert min(row["pruned_bias_accuracy"] for row in judged) == found.metrics["best"]["bias_accuracy"]


def test_the_adaptive_schedule_ends_near_binary_gates():
    train, val = biased_set(300, seed=1), biased_set(200, seed=2)
    found = extract(network(), train, val, **SETTINGS, schedule="adaptive", anneal_rate=5e-3, gamma=1.0)
    temperatures = [row["temperature"] for row in found.history]
    assert len(temperatures) < 200 and temperatures == sorted(temperatures, reverse=True)
    last = found.history[-1]
    assert found.metrics["pruned"]["task_accuracy"] == pytest.approx(last["val_task_accuracy"], abs=0.02)


def test_same_seed_same_result_and_the_global_generator_is_left_alone():
    train, val = biased_set(100, seed=1), biased_set(60, seed=2)
    model = network()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    once, again, other = (extract(model, train, val, **SETTINGS, max_epochs=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(once.scores[name], again.scores[name]) for name in once.scores)
    assert any(not torch.equal(once.scores[name], other.scores[name]) for name in once.scores)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_published_quirk_measures_the_target_instead_of_the_bias(few_head_epochs):
    """The published evaluation pairs a head with the wrong label, which is as if validation had no other."""
    train, (x, y, b) = biased_set(130, seed=1), biased_set(100, seed=2)

    def val_mi(b: torch.Tensor, quirks: bool) -> float:
        found = reference.extract(network(), train, (x, y, b), **SETTINGS, max_epochs=1, quirks=quirks)
        return found.history[0]["val_mi"]

    assert val_mi(b, quirks=True) == val_mi(y, quirks=False) != val_mi(b, quirks=False)


def test_finetuning_keeps_the_mask_and_does_not_lose_accuracy():
    train, val = biased_set(300, seed=1), biased_set(200, seed=2)
    found = extract(network(), train, val, **SETTINGS, max_epochs=3)
    for gamma in (0.0, 1.0):
        tuned = found.finetune(train, val, epochs=2, gamma=gamma)
        for name, mask in found.masks.items():
            weight = tuned.get_submodule(name).weight
            assert not weight[~mask].any()
        changed = (tuned.conv1.weight - found.model().conv1.weight).abs().max()
        reached = (tuned(val[0]).argmax(1) == val[1]).double().mean()
        assert reached >= found.metrics["pruned"]["task_accuracy"]
        assert changed > 0 or reached == found.metrics["pruned"]["task_accuracy"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"granularity": "channel"},
        {"method": "bise", "granularity": "channel", "gate": "concrete", "schedule": "halving"},
    ],
)
def test_memory_is_free_as_soon_as_an_extraction_is_over(monkeypatch, changes):
    """Nobody waits for the garbage collection, which does not look at how full a GPU is."""
    loops = []

    def noted(self, *arguments, **settings):
        begin(self, *arguments, **settings)
        loops.append(weakref.ref(self))

    begin = Loop.__init__
    monkeypatch.setattr(Loop, "__init__", noted)
    sets = biased_set(60, 1, 1), biased_set(40, 1, 2)
    extract(network(), *sets, **SETTINGS, max_epochs=1, **changes)  # what is imported and traced for the first time
    loops.clear()
    gc.collect()
    gc.disable()
    try:
        extract(network(), *sets, **SETTINGS, max_epochs=2, **changes)
        assert [loop() for loop in loops] == [None]
    finally:
        gc.enable()
