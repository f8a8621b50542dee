"""Images as bytes stand where float tensors would."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ffw_fast.data.pixels import Pixels
from ffw_fast.data.samples import Samples

MEAN, DEVIATION = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)


def images(count: int = 7) -> torch.Tensor:
    return torch.randint(256, (count, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


def expected(bytes_: torch.Tensor) -> torch.Tensor:
    mean, deviation = (torch.tensor(part, dtype=torch.float64).view(-1, 1, 1) for part in (MEAN, DEVIATION))
    return (bytes_.double() / 255 - mean) / deviation


@given(st.integers(1, 20), st.integers(1, 30), st.booleans())
def test_whatever_is_read_is_normalised(count, size, mapped):
    given = images(count)
    x = Pixels(given, MEAN, DEVIATION, mapped=mapped)
    assert (len(x), x.shape, x.dtype) == (count, given.shape, torch.float32)
    rows = torch.arange(count).flip(0)
    torch.testing.assert_close(x[rows].double(), expected(given.flip(0)), rtol=0, atol=1e-5)
    torch.testing.assert_close(x[1:3].double(), expected(given[1:3]), rtol=0, atol=1e-5)
    parts = list(x.split(size))
    assert [len(part) for part in parts] == [len(part) for part in given.split(size)]
    torch.testing.assert_close(torch.cat(parts).double(), expected(given), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.to(torch.float64)[rows], expected(given.flip(0)), rtol=0, atol=1e-6)


def test_the_bytes_stay_as_they_are():
    given = images()
    before = given.clone()
    x = Pixels(given, MEAN, DEVIATION)
    x[:3]
    x[torch.tensor([0, 0, 2])]
    assert torch.equal(given, before)
    assert x.to("cpu").images is x.images


def test_mapped_images_stay_in_their_file_wherever_they_are_read():
    x = Pixels(images(), MEAN, DEVIATION, mapped=True).to("meta")
    assert x.images.device.type == "cpu"
    assert x[:2].is_meta
    assert Pixels(images(), MEAN, DEVIATION).to("meta").images.is_meta


def test_minibatches_of_samples():
    given = images()
    samples = Samples(Pixels(given, MEAN, DEVIATION), torch.arange(7), torch.arange(7).unsqueeze(1))
    order = torch.tensor([6, 0, 3, 1, 5])
    batches = list(samples.batches(order, 2))
    assert [len(y) for _, y, _ in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([y for _, y, _ in batches]), order)
    read = torch.cat([x for x, _, _ in batches])
    torch.testing.assert_close(read.double(), expected(given[order]), rtol=0, atol=1e-5)
    assert not samples.augments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((images().float(), MEAN, DEVIATION), TypeError, "uint8"),
        ((images()[0], MEAN, DEVIATION), TypeError, r"\(3, 4, 5\)"),
        ((images(), MEAN[:2], DEVIATION), ValueError, "each of 3 channels"),
        ((images(), MEAN, (0.1, 0.0, 0.1)), ValueError, "positive deviation"),
    ],
)
def test_what_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Pixels(*arguments)
