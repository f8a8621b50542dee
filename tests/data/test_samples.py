"""Small helpers of the data sets."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ffw_fast.data.samples import (
    Samples,
    check_count,
    split_60_20_20,
)


@given(st.integers(5, 10**6))
def test_split_covers_everything_once(count):
    train, val, test = split_60_20_20(count)
    assert (train.start, train.stop, val.stop, test.stop) == (0, val.start, test.start, count)
    for part, share in ((train, 0.6), (val, 0.2), (test, 0.2)):
        assert part.stop > part.start
        assert abs((part.stop - part.start) - share * count) <= 1


def test_split_as_published():
    assert split_60_20_20(60000) == (slice(0, 36000), slice(36000, 48000), slice(48000, 60000))
    assert split_60_20_20(10000) == (slice(0, 6000), slice(6000, 8000), slice(8000, 10000))
    with pytest.raises(ValueError, match="4 samples"):
        split_60_20_20(4)


@pytest.mark.parametrize("value", [0, -1, 11, 1.5, 2.0, "3", True])
def test_count_out_of_range(value):
    with pytest.raises(ValueError, match=f"size must be a whole number from 1 to 10, got {value!r}"):
        check_count("size", value, default=5, most=10)


def test_counts_in_range():
    assert check_count("size", None, default=5) == 5
    assert check_count("size", 10**9, default=5) == 10**9


def test_samples_move_to_a_device():
    samples = Samples(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64))
    assert samples.to("cpu").x is samples.x
    assert all(tensor.is_meta for tensor in samples.to("meta"))
