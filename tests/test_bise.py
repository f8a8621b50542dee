"""BISE: the fast loop against the reference, its objective by definition, and what bad data are told."""

import copy
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ffw_fast import bise, reference
from ffw_fast.bise import BiasedObjective, counted_importance
from ffw_fast.extract import extract
from ffw_fast.extraction import Extraction
from ffw_fast.flat_gates import FlatGates
from ffw_fast.gated_network import GatedNetwork
from ffw_fast.gates import GATES, GateKind, gate_kind
from ffw_fast.optim import GatedSGD
from tests import six_features, small_images
from tests.held_together import assert_scores_agree, by_both
from tests.six_features import CLASSES, arguments, network, samples
from tests.small_gates import PlainScores, backward, loss_of, make_gates


def biased(count: int = 90, biases: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The six features with bias labels that agree with the target seven times of ten."""
    x, y, b = samples(count, biases, seed)
    source = torch.Generator().manual_seed(seed + 100)
    agrees = torch.rand(b.shape, generator=source) < 0.6
    x[:, 3:] -= nn.functional.one_hot(b, CLASSES).sum(1)
    b = torch.where(agrees, y.unsqueeze(1), b)
    x[:, 3:] += nn.functional.one_hot(b, CLASSES).sum(1)
    return x, y, b


@pytest.fixture
def few_head_epochs(monkeypatch):
    monkeypatch.setattr(bise, "HEAD_EPOCHS", 4)


def settings(**changes):
    return arguments(**{"method": "bise", "max_epochs": 12, **changes})


# fast and reference --------------------------------------------------------------------------------------------------


def assert_held_together(fast: Extraction, plain: Extraction) -> None:
    assert_scores_agree(fast.scores, plain.scores)
    assert_scores_agree(fast.best_scores, plain.best_scores)
    assert [row.keys() for row in fast.history] == [row.keys() for row in plain.history]
    for name in ("vanilla", "pruned", "best"):
        for key, value in plain.metrics[name].items():
            assert fast.metrics[name][key] == pytest.approx(value, rel=1e-3, abs=1e-4)
    assert fast.metrics["selection"] == plain.metrics["selection"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gate": "ffw"},
        {"gate": "bernoulli", "granularity": "weight"},
        {"correlations": [0.7, 0.8]},
        {"aligned": [1, 2, 0], "gamma": 3.0},
    ],
)
@pytest.mark.parametrize("with_val", [True, False])
def test_fast_and_reference_find_the_same_scores(few_head_epochs, changes, with_val):
    train, val = biased(80, 2), samples(40, 2, 7) if with_val else None
    found = [function(network(), train, val, **settings(**changes)) for function in (extract, reference.extract)]
    assert_held_together(*found)
    assert found[0].metrics["measured_on"] == ("val" if with_val else "train")


def test_the_part_before_the_first_gate_runs_once(few_head_epochs, monkeypatch):
    """What is taken out changes nothing, and what is kept in its place is smaller than the inputs."""
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES)).eval()
    train, val = biased(), samples(30, seed=7)
    given = settings(bottleneck="3", granularity="channel", gate="ffw")
    seen = []
    original = GatedNetwork.take_out_frozen_part

    def watched(network, *inputs):
        parts = original(network, *inputs)
        seen.append((inputs[0].shape, parts[0].shape, [name for name, _ in network.module.named_modules() if name]))
        return parts

    monkeypatch.setattr(GatedNetwork, "take_out_frozen_part", watched)
    with_it = extract(model, train, val, **given)
    assert seen == [((90, 6), (90, 4), ["1", "1.activation", "2", "3", "3.activation", "4"])]
    monkeypatch.setattr(GatedNetwork, "take_out_frozen_part", lambda _network, *inputs: inputs)
    without = extract(model, train, val, **given)
    for name, scores in without.scores.items():
        torch.testing.assert_close(with_it.scores[name], scores, rtol=1e-4, atol=1e-6)


def test_convolutions_are_held_to_the_reference(few_head_epochs):
    x, y, b = small_images.biased_set(120, 1, 1)
    b = torch.where(torch.rand(b.shape, generator=torch.Generator().manual_seed(0)) < 0.6, y.unsqueeze(1), b)
    val = small_images.biased_set(60, 1, 2)
    fast, plain = by_both(small_images.network(), (x, y, b), val, **small_images.SETTINGS, method="bise", max_epochs=11)
    assert_held_together(fast, plain)
    assert {name: tuple(scores.shape) for name, scores in fast.scores.items()} == {"conv1": (8,), "conv2": (12,)}


def test_the_schedule_is_the_published_one(few_head_epochs):
    found = extract(network(), biased(), samples(30, seed=7), **settings(max_epochs=200))
    temperatures = [row["temperature"] for row in found.history]
    assert temperatures == [2.0 ** -(epoch // 10) for epoch in range(100)]
    refits = [row["epoch"] for row in found.history if "head_epochs" in row]
    assert refits == list(range(10, 101, 10))
    assert all(row["head_epochs"] == 4 for row in found.history if "head_epochs" in row)


def test_defaults_of_the_method(few_head_epochs):
    found = extract(network(), biased(), None, **settings(max_epochs=1)).settings
    assert (found.gamma, found.gate, found.granularity, found.schedule) == (1.0, "hard", "channel", "halving")
    assert bise.SCORES_LR == 1e-2
    assert (bise.MOMENTUM, bise.WEIGHT_DECAY) == (0.9, 1e-4)


def test_the_best_scores_are_those_of_the_highest_accuracy(few_head_epochs):
    found = extract(network(), biased(200), samples(100, seed=7), **settings(max_epochs=40))
    reached = [row["val_task_accuracy"] for row in found.history]
    assert max(reached) == found.metrics["best"]["task_accuracy"]
    x, y, _b = samples(100, seed=7)
    assert (found.model(best=True)(x).argmax(1) == y).double().mean() == pytest.approx(max(reached))
    without = extract(network(), biased(200), None, **settings(max_epochs=3))
    assert all(torch.equal(without.scores[name], without.best_scores[name]) for name in without.scores)
    assert without.metrics["selection"] == "last epoch"


@pytest.mark.parametrize("with_val", [True, False])
def test_resumes_with_the_same_bits(few_head_epochs, tmp_path, with_val):
    train, val = biased(), samples(30, seed=7) if with_val else None
    given = settings(gate="concrete")
    whole = extract(network(), train, val, **given)
    extract(network(), train, val, **{**given, "max_epochs": 7}, run_dir=tmp_path)
    resumed = extract(network(), train, val, **given, run_dir=tmp_path, resume=True)
    for name in whole.scores:
        assert torch.equal(resumed.scores[name], whole.scores[name])
        assert torch.equal(resumed.best_scores[name], whole.best_scores[name])
    assert resumed.metrics["best"] == whole.metrics["best"]


def test_saved_and_loaded(few_head_epochs, tmp_path):
    found = extract(network(), biased(80, 2), None, **settings(correlations=[0.5, 0.9], aligned=[0, 1, 2]))
    found.save(tmp_path)
    loaded = Extraction.load(tmp_path, network())
    assert loaded.settings == found.settings
    assert loaded.metrics == found.metrics
    assert torch.equal(loaded.model()(samples()[0]), found.model()(samples()[0]))


@pytest.mark.parametrize("with_val", [True, False])
def test_fine_tuning_reweights_and_keeps_the_pruned_channels(few_head_epochs, with_val):
    train, val = biased(200), samples(60, seed=7) if with_val else None
    found = extract(network(), train, val, **settings(max_epochs=40))
    found.scores["fc1"][:3] = -1
    tuned = found.finetune(train, val, epochs=2)
    assert not tuned.fc1.weight[:3].any() and not tuned.fc1.bias[:3].any()
    if not with_val:  # one step by hand: the classifier follows the weighted loss
        assert not torch.equal(tuned.classifier.weight, found.model().classifier.weight)
        model = found.model()
        objective = BiasedObjective.of(train[1], train[2], CLASSES, CLASSES, alpha=1.0, gamma=0.0)
        x, y, b = train
        unread = torch.zeros(len(y), 1, CLASSES)  # head logits, whose gamma is 0
        before, after = (objective(each(x), y, unread, b).losses[1].item() for each in (model, tuned))
        assert after < before


# the objective -------------------------------------------------------------------------------------------------------


@given(rho=st.floats(0.05, 0.99), seed=st.integers(0, 9))
def test_weights_of_one_bias(rho, seed):
    """``1 / (C rho)`` where aligned, ``(C - 1) / (C (1 - rho))`` where conflicting."""
    _x, y, b = biased(90, 1, seed)
    objective = BiasedObjective.of(y, b, CLASSES, CLASSES, alpha=1.0, gamma=1.0, correlations=[rho])
    expected = torch.where(b[:, 0] == y, 1 / (CLASSES * rho), (CLASSES - 1) / (CLASSES * (1 - rho)))
    torch.testing.assert_close(objective.weights(y, b), expected)


def test_weights_of_several_biases_are_products():
    _x, y, b = biased(60, 2)
    objective = BiasedObjective.of(y, b, CLASSES, CLASSES, alpha=1.0, gamma=1.0, correlations=[0.99, 0.95])
    same = b == y.unsqueeze(1)
    expected = torch.where(same[:, 0], 1 / 0.99, 1 / 0.01) * torch.where(same[:, 1], 1 / 0.95, 1 / 0.05)
    torch.testing.assert_close(objective.weights(y, b), expected, rtol=1e-5, atol=0)


@given(seed=st.integers(0, 20))
def test_counted_weights_make_bias_and_target_independent(seed):
    """Weighted, every pair of target and bias that occurs has the same mass, 1 / (C K): ``r = p_target / p_train``."""
    _x, y, b = biased(90, 1, seed)
    weights = counted_importance(y, b, CLASSES, CLASSES)[0, y, b[:, 0]]
    for target, label in itertools.product(range(CLASSES), repeat=2):
        chosen = (y == target) & (b[:, 0] == label)
        if chosen.any():
            assert weights[chosen].sum().item() / len(y) == pytest.approx(1 / CLASSES**2, rel=1e-5)


def test_several_counted_biases_are_independent_given_the_target():
    _x, y, b = biased(500, 2)
    table = counted_importance(y, b, CLASSES, CLASSES)
    target, left, right = 1, 1, 2
    p_target = (y == target).double().mean()
    of_left = (b[y == target, 0] == left).double().mean()
    of_right = (b[y == target, 1] == right).double().mean()
    expected = 1 / CLASSES**3 / (p_target * of_left * of_right)
    assert (table[0, target, left] * table[1, target, right]).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_information_is_that_of_conflicting_samples():
    from ffw_fast import mutual_information

    _x, y, b = biased(80, 2)
    logits, head_logits = (torch.randn(80, *shape, requires_grad=True) for shape in ((CLASSES,), (2, CLASSES)))
    objective = BiasedObjective.of(y, b, CLASSES, CLASSES, alpha=0.5, gamma=2.0, correlations=[0.7, 0.6])
    (total, weighted, information), by_logits, by_head_logits = objective(logits, y, head_logits, b)
    expected = sum(
        mutual_information(head_logits[rows, bias], b[rows, bias], CLASSES)
        for bias, rows in enumerate((b != y.unsqueeze(1)).T)
    )
    torch.testing.assert_close(information, expected.detach())
    torch.testing.assert_close(total, 0.5 * weighted + 2.0 * information)
    plain = (objective.weights(y, b) * torch.nn.functional.cross_entropy(logits, y, reduction="none")).mean()
    torch.testing.assert_close(weighted, plain.detach())
    exact = torch.autograd.grad(0.5 * plain + 2.0 * expected, (logits, head_logits))
    torch.testing.assert_close((by_logits, by_head_logits), exact, rtol=1e-4, atol=1e-6)
    aligned = b == y.unsqueeze(1)
    assert not by_head_logits[aligned].any() and by_head_logits[~aligned].any()
    only = aligned.all(1)
    nothing = objective(logits[only], y[only], head_logits[only], b[only])
    assert nothing.losses[2] == 0 and not nothing.by_head_logits.any()


def test_a_bias_with_more_classes_than_the_target():
    y, b = torch.tensor([0, 0, 1, 1, 0, 1]), torch.tensor([3, 0, 1, 2, 3, 1]).unsqueeze(1)
    objective = BiasedObjective.of(y, b, 2, 4, alpha=1.0, gamma=1.0, aligned=[3, 1])
    by_head_logits = objective(torch.randn(6, 2), y, torch.randn(6, 1, 4), b).by_head_logits
    assert by_head_logits.flatten(1).any(1).tolist() == [False, True, False, True, False, False]


# the optimizer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
def test_gated_sgd_is_sgd_on_straight_through_scores(gate):
    gates: FlatGates = make_gates(gate_kind(gate))
    plain = PlainScores(gates)
    given = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}
    ours, theirs = GatedSGD(gates, **given), torch.optim.SGD(plain.scores.values(), **given)
    for step in range(8):
        ours.zero_grad()
        theirs.zero_grad()
        backward(gates, step)
        loss_of(plain.gated(draws=step), step).backward()
        ours.step()
        theirs.step()
        for name, scores in gates.views(gates.scores).items():
            torch.testing.assert_close(scores, plain.scores[name].detach(), rtol=1e-6, atol=1e-8)
    assert not gates.gated[15:16].any()


@pytest.mark.parametrize("changes", [{"lr": 0}, {"lr": 1.0, "momentum": 1.0}, {"lr": 1.0, "weight_decay": -1}])
def test_bad_settings_of_gated_sgd(changes):
    with pytest.raises(ValueError, match=r"expected lr > 0, momentum in \[0, 1\) .* got lr="):
        GatedSGD(make_gates(GateKind.HARD), **changes)


# bad input -----------------------------------------------------------------------------------------------------------

X, Y, B = biased()


@pytest.mark.parametrize("function", [extract, reference.extract])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": (X, Y, Y)}, r"no sample of train conflicts with bias 0: .* are \(0, 0\), \(1, 1\), \(2, 2\)"),
        (
            {"train": (X, Y, torch.where(Y == 1, 1, B[:, 0]))},
            r"no sample that conflicts with bias 0 of target 1 \(only with bias label 1\), .* infinite",
        ),
        ({"correlations": [1.0]}, "correlations must lie between 0 and 1, both excluded, got 1.0"),
        ({"correlations": [0]}, "correlations must lie between 0 and 1, both excluded, got 0"),
        ({"correlations": [0.5, 0.5]}, "got 2 correlations for 1 biases"),
        ({"correlations": 0.5}, "correlations must be a list of numbers, got float"),
        ({"num_bias_classes": 4}, "the target has 3 classes and the bias 4: say .* aligned"),
        ({"aligned": [0, 1]}, "aligned must hold 3 bias labels from 0 to 2"),
        ({"aligned": [0, 1, 3]}, "aligned must hold 3 bias labels from 0 to 2"),
        ({"schedule": "published"}, "method 'bise' goes with schedule 'halving', got 'published'"),
        ({"method": "ffw", "aligned": [0, 1, 2], "schedule": None}, "aligned goes with method 'bise'"),
        ({"method": "ffw", "val": None}, "val must be tensors"),
        ({"method": "other"}, "unknown method 'other'; known methods: ffw, bise"),
    ],
)
def test_bad_input(function, changes, message):
    data = {"train": (X, Y, B), "val": samples(), **changes}
    train, val = data.pop("train"), data.pop("val")
    with pytest.raises((ValueError, TypeError), match=message):
        function(six_features.network(), train, val, **settings(**data))


def test_the_model_is_left_as_it_was(few_head_epochs):
    model = network()
    before = copy.deepcopy(model.state_dict())
    extract(model, biased(), None, **settings(max_epochs=2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
