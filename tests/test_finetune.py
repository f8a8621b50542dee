"""Fine-tuning of what survives; ``test_extract`` and ``test_bise`` hold that masks stay and accuracy is not lost."""

import pytest
import torch

from ffw_fast import finetune, heads
from ffw_fast.extract import extract
from tests.six_features import arguments, network, samples


@pytest.fixture
def found(monkeypatch):
    monkeypatch.setattr(heads, "MAX_EPOCHS", 5)
    return extract(network(), samples(40), samples(30, seed=1), **arguments())


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
