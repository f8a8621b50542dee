"""Biased-MNIST: sizes, pixels, correlations and digits of its four sets."""

import pytest
import torch

from ffw_fast.data import Samples, Splits, biased_mnist
from ffw_fast.data.colors import PALETTE
from tests.data.digit_sets import SETS, assert_no_digit_is_in_two_sets, digits
from tests.data.mnist_folder import write_mnist


@pytest.fixture(scope="module")
def splits() -> Splits:
    return biased_mnist(seed=3)


def own_color(samples: Samples) -> float:
    return (samples.b[:, 0] == samples.y).float().mean().item()


def test_sizes_and_types(splits):
    sizes = [len(getattr(splits, name).y) for name in SETS]
    assert sizes == [12000, 3000, 1000, 1000]
    for samples in (splits.vanilla, splits.test):
        n = len(samples.y)
        assert samples.x.shape == (n, 3, 28, 28)
        assert samples.x.dtype == torch.float32
        assert samples.y.dtype == samples.b.dtype == torch.int64
        assert samples.b.shape == (n, 1)


def test_pixels(splits):
    samples = splits.vanilla
    corner = samples.x[:, :, 0, 0]  # never part of a digit
    assert torch.equal(((corner + 1) * 127.5).round().to(torch.uint8), PALETTE[samples.b[:, 0]])
    assert samples.x.amin() == -1
    assert samples.x.amax() == 1
    background = (samples.x == corner[:, :, None, None]).all(dim=1)
    white = (samples.x == 1).all(dim=1)
    assert (background ^ white).all()


def test_correlations(splits):
    assert own_color(splits.vanilla) == pytest.approx(0.95, abs=0.01)
    for samples in (splits.train, splits.val, splits.test):
        assert own_color(samples) == pytest.approx(0.1, abs=0.04)
        assert torch.bincount(samples.b[:, 0], minlength=10).min() > 0.06 * len(samples.y)


def test_no_digit_is_in_two_sets(splits):
    assert_no_digit_is_in_two_sets(splits)


def test_deterministic_and_the_global_generator_untouched():
    before = torch.get_rng_state()
    first, again, other = (biased_mnist(seed=seed, train_size=50, unbiased_size=50) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for name in SETS:
        pair = zip(getattr(first, name), getattr(again, name), strict=True)
        assert all(torch.equal(a, b) for a, b in pair)
    assert not torch.equal(first.test.b, other.test.b)


def test_options(splits):
    chosen = biased_mnist(seed=3, rho=0.5, image_size=14, train_size=5000, unbiased_size=90, unbiased_digits=30)
    assert chosen.vanilla.x.shape == (5000, 3, 14, 14)
    assert own_color(chosen.vanilla) == pytest.approx(0.5, abs=0.04)
    assert len(chosen.train.y) == 90
    assert len(digits(chosen.train)) == 30
    assert torch.equal(chosen.test.b, splits.test.b), "the sizes of other sets must not change the test set"
    assert torch.equal(chosen.test.y, splits.test.y)
    assert len(biased_mnist(unbiased_digits=40, train_size=1).train.y) == 200


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"rho": 1.5}, "rho must be a probability from 0 to 1, got 1.5"),
        ({"image_size": 6}, "image_size must be a whole number from 7 to 28, got 6"),
        ({"image_size": 29}, "from 7 to 28"),
        ({"train_size": 0}, "train_size must be a whole number of at least 1, got 0"),
        ({"train_size": 10**11}, "100000000000 samples of 28 x 28 pixels take 940800.0 GB, and there is room for "),
        ({"unbiased_size": -1}, "unbiased_size"),
        ({"unbiased_digits": 601}, "unbiased_digits must be a whole number from 1 to 600, got 601"),
    ],
)
def test_bad_options(option, message):
    with pytest.raises(ValueError, match=message):
        biased_mnist(**option)


def test_full_mnist(tmp_path):
    write_mnist(tmp_path, train=1000, test=50)
    full = biased_mnist(tmp_path)
    assert [len(getattr(full, name).y) for name in SETS] == [1000, 600, 200, 50]
    assert own_color(full.vanilla) == pytest.approx(0.99, abs=0.02)
    assert own_color(full.train) == pytest.approx(0.1, abs=0.08)
    vanilla, train, val, test = (digits(getattr(full, name)) for name in SETS)
    assert train | val < vanilla
    assert not train & val
    assert not vanilla & test


def test_a_tiny_folder_is_refused(tmp_path):
    write_mnist(tmp_path, train=4, test=4)
    with pytest.raises(ValueError, match="4 samples cannot be split"):
        biased_mnist(tmp_path)
