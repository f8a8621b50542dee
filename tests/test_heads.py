"""Private heads against ``nn.Linear``, ``torch.optim.SGD`` and the plateau rule in a plain loop."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ffw_fast import heads as heads_module
from ffw_fast.heads import PrivateHeads, initial_parameters
from ffw_fast.seeding import epoch_order

CPU = torch.device("cpu")
WIDTH, CLASSES, SEED = 6, 4, 3


def features_and_labels(count=90, heads=1, seed=0, noise=1.0):
    source = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count, heads), generator=source)
    features = noise * torch.randn(count, WIDTH, generator=source)
    for head in range(heads):
        features += torch.randn(CLASSES, WIDTH, generator=source)[labels[:, head]]
    return features, labels


def make_heads(heads=1, batch_size=20):
    return PrivateHeads.create(heads, CLASSES, WIDTH, seed=SEED, batch_size=batch_size, device=CPU)


class PlainHeads:
    """One ``nn.Linear`` a head, SGD, and the rule: stop when the loss has failed more than 5 times to fall by 0.1%."""

    def __init__(self, heads: int, batch_size: int) -> None:
        weights, biases = initial_parameters(heads, CLASSES, WIDTH, SEED)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, CLASSES) for _ in range(heads))
        for layer, weight, bias in zip(self.layers, weights, biases, strict=True):
            layer.load_state_dict({"weight": weight, "bias": bias})
        self.optimizer = torch.optim.SGD(self.layers.parameters(), 0.1, 0.9, weight_decay=1e-4)
        self.batch_size = batch_size
        self.epochs = 0

    def step(self, features, labels) -> float:
        self.optimizer.zero_grad()
        losses = [cross_entropy(layer(features), labels[:, index]) for index, layer in enumerate(self.layers)]
        sum(losses).backward()
        self.optimizer.step()
        return sum(losses).item() / len(losses)

    def fit(self, features, labels) -> int:
        best, failures, start = float("inf"), 0, self.epochs
        while failures <= 5 and self.epochs - start < 200:
            order = epoch_order(len(features), SEED, "head epoch", self.epochs)
            total = sum(self.step(features[rows], labels[rows]) * len(rows) for rows in order.split(self.batch_size))
            self.epochs += 1
            if total / len(features) <= (1 - 1e-3) * best:
                best, failures = total / len(features), 0
            else:
                failures += 1
        return self.epochs - start

    def logits(self, features):
        return torch.stack([layer(features) for layer in self.layers], dim=1)


def assert_held_together(heads: PrivateHeads, plain: PlainHeads) -> None:
    weight = torch.stack([layer.weight.detach() for layer in plain.layers])
    bias = torch.stack([layer.bias.detach() for layer in plain.layers])
    torch.testing.assert_close(heads.weight, weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(heads.bias, bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("batch_size", [20, 90, 1000])
def test_fits_are_those_of_the_plain_loop_and_momentum_lives_on(heads, batch_size):
    ours, plain = make_heads(heads, batch_size), PlainHeads(heads, batch_size)
    for refit in range(3):
        features, labels = features_and_labels(heads=heads, seed=refit)
        assert ours.fit(features, labels) == plain.fit(features, labels)
        assert ours.epochs == plain.epochs
        assert_held_together(ours, plain)
    fresh = ours.with_fresh_optimizer()
    features, labels = features_and_labels(heads=heads, seed=9)
    ours.step(features, labels)
    fresh.step(features, labels)
    plain.step(features, labels)
    assert_held_together(ours, plain)
    assert not torch.allclose(fresh.weight, ours.weight, rtol=1e-4)  # it has no momentum


@pytest.mark.parametrize("most", [3, 7, 8, 200])
def test_orders_drawn_ahead_are_those_drawn_when_needed(monkeypatch, most):
    monkeypatch.setattr(heads_module, "EPOCHS_A_CALL", 4)
    monkeypatch.setattr(heads_module, "MAX_EPOCHS", most)
    fitted = []
    for ahead in (False, True):
        monkeypatch.setattr(heads_module, "works_meanwhile", lambda device, ahead=ahead: ahead)
        heads = make_heads()
        epochs = [heads.fit(*features_and_labels()) for _ in range(2)]
        fitted.append((epochs, heads.epochs, heads.weight))
    assert fitted[0][:2] == fitted[1][:2] and torch.equal(fitted[0][2], fitted[1][2])


def test_single_steps_and_logits():
    ours, plain = make_heads(2), PlainHeads(2, 20)
    for number in range(5):
        features, labels = features_and_labels(heads=2, count=7 + number, seed=number)
        features.requires_grad_()
        torch.testing.assert_close(ours.logits(features), plain.logits(features), rtol=1e-4, atol=1e-5)
        ours.step(features, labels)
        plain.step(features.detach(), labels)
        assert_held_together(ours, plain)
    assert features.grad is None
    assert ours.epochs == 0  # steps on minibatches are not epochs of a fit


def test_a_fresh_optimizer_is_a_copy_without_momentum():
    heads = make_heads()
    heads.fit(*features_and_labels())
    fresh = heads.with_fresh_optimizer()
    assert torch.equal(fresh.weight, heads.weight)
    assert torch.equal(fresh.bias, heads.bias)
    assert fresh.epochs == heads.epochs
    assert heads.weight_momentum.any()
    assert not fresh.weight_momentum.any()
    assert not fresh.bias_momentum.any()
    before = heads.weight.clone()
    fresh.fit(*features_and_labels(seed=5))
    assert torch.equal(heads.weight, before)


def test_a_fit_ends_after_200_epochs(monkeypatch):
    assert heads_module.MAX_EPOCHS == 200
    monkeypatch.setattr(heads_module, "MAX_EPOCHS", 21)  # neither a multiple of the epochs in one call nor below it
    heads = make_heads()
    heads.epochs = 5
    assert heads.fit(*features_and_labels(noise=0.01)) == 21  # separable: the loss falls on and on
    assert heads.epochs == 26


def test_a_fit_of_a_set_number_of_epochs_is_never_cut_short():
    heads = make_heads()
    heads.epochs_a_fit = 30
    assert [heads.fit(*features_and_labels()) for _ in range(3)] == [30, 30, 30]  # on a plateau since the first


def test_the_start_is_that_of_nn_linear_and_of_the_seed():
    weight, bias = initial_parameters(3, 10, 400, seed=1)
    assert weight.shape == (3, 10, 400)
    assert bias.shape == (3, 10)
    assert 0.049 < weight.abs().max() <= 0.05  # 1 / sqrt(400)
    assert weight.std().item() == pytest.approx(0.05 / 3**0.5, rel=0.02)
    assert torch.equal(weight, initial_parameters(3, 10, 400, seed=1)[0])
    assert not torch.equal(weight, initial_parameters(3, 10, 400, seed=2)[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_fit(value):
    features, labels = features_and_labels()
    features[17, 3] = value
    with pytest.raises(FloatingPointError, match="a private head's loss is no longer finite"):
        make_heads().fit(features, labels)
