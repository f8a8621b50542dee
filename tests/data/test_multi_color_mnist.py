"""Multi-Color MNIST: sizes, pixels, correlations and digits of its four sets."""

import pytest
import torch

from ffw_fast.data import Samples, Splits, multi_color_mnist
from ffw_fast.data.colors import PALETTE
from tests.data.digit_sets import SETS, assert_no_digit_is_in_two_sets, digits
from tests.data.mnist_folder import write_mnist


@pytest.fixture(scope="module")
def splits() -> Splits:
    return multi_color_mnist(seed=4)


def conflicting(samples: Samples) -> list[float]:
    return (samples.b != samples.y[:, None]).float().mean(dim=0).tolist()


def test_sizes(splits):
    assert [len(getattr(splits, name).y) for name in SETS] == [32000, 6000, 2000, 2000]
    assert splits.vanilla.x.shape == (32000, 3, 28, 28)
    assert splits.vanilla.b.shape == (32000, 2)


def test_pixels(splits):
    samples = splits.test
    for column, bias in ((0, 0), (13, 0), (14, 1), (27, 1)):
        pixels = (samples.x[:, :, 0, column] * 255).round().to(torch.uint8)
        assert torch.equal(pixels, PALETTE[samples.b[:, bias]])
    assert samples.x.amin() == 0
    assert samples.x.amax() == 1


def test_conflicting_shares(splits):
    assert conflicting(splits.vanilla) == pytest.approx([0.01, 0.05], abs=0.005)
    for samples in (splits.train, splits.val, splits.test):
        assert conflicting(samples) == pytest.approx([0.9, 0.9], abs=0.03)


def test_the_two_biases_are_independent_of_each_other(splits):
    both = splits.train.b[:, 0] * 10 + splits.train.b[:, 1]
    counts = torch.bincount(both, minlength=100)
    assert counts.min() > 25
    assert counts.max() < 110


def test_no_digit_is_in_two_sets(splits):
    assert_no_digit_is_in_two_sets(splits)


def test_second_division(splits):
    divided = multi_color_mnist(seed=4, train_size=100, second_division=True)
    torch.testing.assert_close(divided.test.x * 255, splits.test.x)
    assert torch.equal(divided.test.b, splits.test.b)
    with pytest.raises(ValueError, match="second_division must be True, False or None, got 'yes'"):
        multi_color_mnist(second_division="yes")


def test_full_mnist_divides_twice_by_default(tmp_path):
    write_mnist(tmp_path, train=100, test=50, compressed=True)
    full = multi_color_mnist(tmp_path)
    assert [len(getattr(full, name).y) for name in SETS] == [100, 30, 10, 10]
    assert full.vanilla.x.amax() == pytest.approx(1 / 255)
    assert multi_color_mnist(tmp_path, second_division=False).vanilla.x.amax() == 1


def test_options(splits):
    chosen = multi_color_mnist(seed=4, train_size=100, unbiased_size=500, unbiased_digits=100)
    assert len(chosen.vanilla.y) == len(digits(chosen.vanilla)) == 100
    assert len(chosen.train.y) == 500
    assert len(digits(chosen.train)) == 100
    assert torch.equal(chosen.val.x, splits.val.x)
    assert digits(chosen.for_heads) == digits(splits.train), "leakage is measured with all digits of the pool"
    assert splits.pool is None and splits.for_heads is splits.train
    few = multi_color_mnist(seed=4, train_size=100, unbiased_size=60)
    assert len(few.train.y) == 60
    assert len(few.for_heads.y) == 6000
    assert digits(few.for_heads) == digits(splits.train)
    with pytest.raises(ValueError, match="unbiased_digits"):
        multi_color_mnist(unbiased_digits=0)
