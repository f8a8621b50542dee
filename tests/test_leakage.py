"""What is measured of any network, whoever made it."""

import torch

from ffw_fast.data.samples import Samples, Splits
from ffw_fast.leakage import information_floor, leakage
from ffw_fast.ops import joint_distribution, joint_information
from ffw_fast.settings import Settings
from ffw_fast.theory import biasedness, label_information
from tests.six_features import BOTTLENECK, CLASSES, network, samples


def test_the_floor_is_the_information_of_shuffled_labels():
    source = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (500, 1), generator=source)
    logits = 10 * torch.nn.functional.one_hot(labels, 4).float()  # a head that is always right
    information = joint_information(joint_distribution(logits, labels)).item()
    floor = information_floor(logits, labels, seed=0)
    assert information > 0.95
    assert len(floor) == 1
    assert 0 < floor[0] < 0.02
    assert floor == information_floor(logits, labels, seed=0)


def leakage_of(train: Samples, test: Samples) -> dict:
    return leakage(network(), Settings(BOTTLENECK, CLASSES, batch_size=50), Splits(None, train, train, test))


def test_heads_learn_from_the_training_set_and_are_measured_on_the_test_set():
    """Heads that have seen nothing but 0 answer 0, so that they are right where the test set has it."""
    x, y, b = samples(300, biases=2, seed=1)
    found = leakage_of(Samples(x, y, torch.zeros_like(b)), Samples(x, y, b))
    assert found["bias_accuracy"] == (b == 0).double().mean(0).tolist()


def test_every_bias_is_measured_by_its_own_labels():
    test = Samples(*samples(300, biases=2, seed=2))
    found = leakage_of(Samples(*samples(300, biases=2, seed=1)), test)
    predictions, columns = network()(test.x).argmax(1), test.b.T
    assert found["biasedness"] == [biasedness(predictions, test.y, column) for column in columns]
    assert found["output_mi"] == [label_information(column, predictions, CLASSES) for column in columns]
    assert found["biasedness"][0] != found["biasedness"][1]
    assert all(0 < floor < read / 2 for floor, read in zip(found["bias_mi_floor"], found["bias_mi"], strict=True))
