"""What is measured of features and logits that are already there."""

import pytest
import torch

from ffw_fast.measure import Measurement, minibatch_information
from ffw_fast.ops import joint_distribution, joint_information


@pytest.mark.parametrize("count", [7, 20, 23, 60])
@pytest.mark.parametrize("heads", [1, 3])
def test_the_information_of_minibatches_is_that_of_each_alone(count, heads):
    source = torch.Generator().manual_seed(count)
    logits = torch.randn(count, heads, 5, generator=source)
    labels = torch.randint(5, (count, heads), generator=source)
    each = [
        joint_information(joint_distribution(some, b)).mean()
        for some, b in zip(logits.split(20), labels.split(20), strict=True)
    ]
    found = minibatch_information(logits, labels, 20)
    assert found == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)


def test_the_bias_accuracy_by_which_networks_are_chosen_is_the_mean_of_all_heads():
    measured = Measurement(task_accuracy=0.0, bias_accuracy=[0.2, 0.4, 0.9], bias_mi=[0.0, 0.0, 0.0], sparsity=0.0)
    assert measured.mean_bias_accuracy == pytest.approx(0.5)
