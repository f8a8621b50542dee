"""Which digits are in the sets of a workload."""

from ffw_fast.data import Samples, Splits

SETS = ("vanilla", "train", "val", "test")


def digits(samples: Samples) -> set[bytes]:
    """The shapes of the digits: white, whatever their background."""
    return {shape.numpy().tobytes() for shape in (samples.x == samples.x.amax()).all(dim=1)}


def assert_no_digit_is_in_two_sets(splits: Splits) -> None:
    """Of the shipped digits."""
    sets = [digits(getattr(splits, name)) for name in SETS]
    assert sum(map(len, sets)) == len(set().union(*sets))
    assert [len(members) for members in sets[1:]] == [600, 200, 200]
