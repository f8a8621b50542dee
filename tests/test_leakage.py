"""What is measured of any network, whoever made it."""

import torch

from ffw_fast.leakage import information_floor
from ffw_fast.ops import joint_distribution, joint_information


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
