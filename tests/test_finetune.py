"""Fine-tuning of what survives; ``test_extract`` and ``test_bise`` hold that masks stay and accuracy is not lost."""

import copy
import dataclasses
import itertools

import pytest
import torch
from torch import nn

from ffw_fast import finetune, heads, mutual_information
from ffw_fast.extract import extract
from ffw_fast.heads import PrivateHeads
from ffw_fast.seeding import epoch_order
from ffw_fast.settings import Settings
from tests.six_features import BOTTLENECK, CLASSES, arguments, network, samples


@pytest.fixture
def found(monkeypatch):
    monkeypatch.setattr(heads, "MAX_EPOCHS", 5)
    return extract(network(), samples(40), samples(30, seed=1), **arguments())


def tuned_plainly(model, masks, train, val, settings, *, epochs, gamma, lr):
    """The network of the best epoch, by a loop that shares nothing with the package but heads, MI and orders."""
    (x, y, b), tuned = train, copy.deepcopy(model)
    biases = range(b.shape[1])
    private = PrivateHeads.create(
        len(biases), CLASSES, 8, seed=settings.seed, batch_size=settings.batch_size, device=x.device
    )
    optimizer = torch.optim.Adam(tuned.parameters(), lr)

    def accuracy():
        return (tuned(val[0]).argmax(1) == val[1]).double().mean().item()

    best, best_accuracy = copy.deepcopy(tuned.state_dict()), accuracy()
    for epoch in range(epochs):
        private.fit(tuned.relu(tuned.fc1(x)).detach(), b)
        for rows in epoch_order(len(y), settings.seed, "finetune epoch", epoch).split(settings.batch_size):
            features = tuned.relu(tuned.fc1(x[rows]))
            head_logits = private.logits(features)
            information = sum(mutual_information(head_logits[:, i], b[rows, i], CLASSES) for i in biases) / len(biases)
            task_loss = nn.functional.cross_entropy(tuned.classifier(features), y[rows])
            optimizer.zero_grad()
            (settings.alpha * task_loss + gamma * information).backward()
            for name, mask in masks.items():
                tuned.get_submodule(name).weight.grad *= mask
            optimizer.step()
            private.step(features.detach(), b[rows])
        if accuracy() > best_accuracy:
            best, best_accuracy = copy.deepcopy(tuned.state_dict()), accuracy()
    return best


def test_the_weights_are_those_of_a_plain_loops_best_epoch(monkeypatch):
    monkeypatch.setattr(heads, "MAX_EPOCHS", 4)
    source = torch.Generator().manual_seed(0)
    model, train, val = network(), samples(43, 2, seed=1), samples(60, 2, seed=2)
    masks = {
        name: torch.rand(model.get_submodule(name).weight.shape, generator=source) > 0.3
        for name in ("fc1", "classifier")
    }
    for name, mask in masks.items():
        model.get_submodule(name).weight.data *= mask
    settings = Settings(BOTTLENECK, CLASSES, alpha=0.5, batch_size=10)
    how = {"epochs": 12, "gamma": 2.0, "lr": 0.01}
    tuned = finetune.finetune(model, masks, train, val, settings, **how).state_dict()
    expected = tuned_plainly(model, masks, train, val, settings, **how)
    assert not torch.equal(expected["fc1.weight"], model.fc1.weight)
    for name, value in expected.items():
        torch.testing.assert_close(tuned[name], value, rtol=1e-4, atol=1e-5)


def test_biases_of_pruned_rows_stay_0_where_the_nonlinearity_would_move_them():
    """Where ReLU gives a pruned row no gradient at 0, Tanh does."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)).eval()
    kept = torch.arange(8) >= 3
    model[0].weight.data[~kept] = 0
    model[0].bias.data[~kept] = 0
    settings = Settings("1", CLASSES, batch_size=10)
    tuned = finetune.finetune(model, {"0": kept}, samples(40), samples(60, seed=1), settings, epochs=3, lr=0.05)
    assert not tuned[0].weight[~kept].any() and not tuned[0].bias[~kept].any()
    assert (tuned[0].bias != model[0].bias)[kept].all()


def test_the_best_network_is_tuned_with_its_own_masks(found, monkeypatch):
    reached = itertools.count()
    monkeypatch.setattr(finetune._Reader, "accuracy", lambda self, val: next(reached))  # the last epoch is the best
    found.best_scores["fc1"] = -found.scores["fc1"] - 1e-3
    tuned = found.finetune(samples(40), samples(30, seed=1), epochs=2, best=True)
    assert not torch.equal(tuned.fc1.weight, found.model(best=True).fc1.weight)
    for name, mask in found.best_masks.items():
        assert torch.equal(tuned.get_submodule(name).weight != 0, mask)
    assert not torch.equal(found.best_masks["fc1"], found.masks["fc1"])


def test_gamma_is_that_of_fine_tuning_and_not_the_extractions(monkeypatch):
    monkeypatch.setattr(heads, "MAX_EPOCHS", 5)
    extracted = Settings.of(bottleneck=BOTTLENECK, num_bias_classes=CLASSES, method="bise", batch_size=10)

    def tuned(settings: Settings, gamma: float) -> torch.Tensor:
        return finetune.finetune(
            network(), {"fc1": torch.ones(8, 6, dtype=torch.bool)}, samples(40), None, settings, epochs=1, gamma=gamma
        ).fc1.weight

    assert torch.equal(tuned(extracted, 2.0), tuned(dataclasses.replace(extracted, gamma=50.0), 2.0))
    assert not torch.equal(tuned(extracted, 2.0), tuned(extracted, 0.0))


def test_heads_are_fitted_on_a_network_in_eval_mode_behind_epochs_that_are_not_validated(monkeypatch):
    """From scratch, with batch norm: in training mode it has other features. The last sample is left out."""
    monkeypatch.setattr(heads, "MAX_EPOCHS", 3)
    features, is_training = finetune._Reader.features, []
    monkeypatch.setattr(
        finetune._Reader, "features", lambda self, x: is_training.append(self.network.training) or features(self, x)
    )
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES)).eval()
    settings = Settings("2", CLASSES, batch_size=10)
    tuned = finetune.finetune(
        model, {}, samples(41), samples(30, seed=1), settings, epochs=3, gamma=1.0, validate_every=3, from_scratch=True
    )
    assert is_training == [False, False, False]
    assert not tuned.training


@pytest.mark.parametrize("method", ["ffw", "bise"])
@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_a_network_of_double_precision_is_tuned_as_one_of_single(monkeypatch, method, gamma):
    monkeypatch.setattr(heads, "MAX_EPOCHS", 5)
    tuned = []
    for dtype in (torch.float32, torch.float64):
        train, val = ((x.to(dtype), y, b) for x, y, b in (samples(40), samples(30, seed=1)))
        found = extract(network().to(dtype), train, val, **arguments(method=method))
        tuned.append(found.finetune(train, val, epochs=2, gamma=gamma))
    single, double = tuned
    for name, value in double.state_dict().items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(value.float(), single.state_dict()[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be a whole number of at least 1, got 0"),
        ({"epochs": 1.5}, "epochs must be a whole number of at least 1, got 1.5"),
        ({"epochs": "3"}, "epochs must be a whole number of at least 1, got '3'"),
        ({"gamma": -1.0}, "gamma must be a non-negative finite number, got -1.0"),
        ({"gamma": float("nan")}, "gamma must be a non-negative finite number, got nan"),
    ],
)
def test_bad_settings(found, settings, message):
    with pytest.raises(ValueError, match=message):
        found.finetune(samples(40), samples(30, seed=1), **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y, b: (x[:, :5], y, b), r"samples of train and val differ in shape: \(5,\) and \(6,\)"),
        (lambda x, y, b: (x, y + CLASSES, b), "y holds label 5, but the model has 3 classes"),
        (lambda x, y, b: (x, y, b + CLASSES), "train: b holds label 5, but num_bias_classes is 3"),
        (lambda x, y, b: (x[:0], y[:0], b[:0]), "train is empty"),
    ],
)
def test_data_that_the_extraction_does_not_fit(found, change, message):
    with pytest.raises(ValueError, match=message):
        found.finetune(change(*samples(40)), samples(30, seed=1))


@pytest.mark.parametrize(("every", "validated"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4, 5]), (9, [0, 5])])
def test_epochs_between_validations_are_not_measured(found, monkeypatch, every, validated):
    """The start and the last epoch always are."""
    epochs_done, seen = [0], []
    order = finetune.epoch_order

    def counted_order(*arguments):
        epochs_done[0] += 1
        return order(*arguments)

    monkeypatch.setattr(finetune, "epoch_order", counted_order)
    accuracy = finetune._Reader.accuracy
    monkeypatch.setattr(
        finetune._Reader, "accuracy", lambda self, val: seen.append(epochs_done[0]) or accuracy(self, val)
    )
    finetune.finetune(
        network(), found.masks, samples(40), samples(30, seed=1), found.settings, epochs=5, validate_every=every
    )
    assert seen == validated
