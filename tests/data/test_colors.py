"""Drawing colours and painting with them."""

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ffw_fast.data.colors import PALETTE, Coloring, draw_colors, find_foreground, paint
from ffw_fast.data.digits import Digits, load_digits


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(rho=st.floats(0, 1), label=st.integers(0, 9), seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_own_color_with_probability_rho_else_uniform(rho, label, seed):
    n = 20_000
    colors = draw_colors(torch.full((n,), label), rho, generator(seed))
    counts = torch.bincount(colors, minlength=10)
    assert len(counts) == 10
    for color in range(10):
        p = rho if color == label else (1 - rho) / 9
        assert abs(counts[color] - n * p) <= 6 * math.sqrt(n * p * (1 - p)) + 1e-3 * (0 < p < 1)


def test_rho_zero_and_one_are_exact():
    labels = torch.arange(10).repeat(1000)
    assert torch.equal(draw_colors(labels, 1.0, generator()), labels)
    assert not (draw_colors(labels, 0.0, generator()) == labels).any()


def slow_paint(foreground, colors, palette, white):
    """The same with loops over pixels."""
    n, height, width = foreground.shape
    image = torch.full((n, 3, height, width), math.nan)
    for i in range(n):
        for row in range(height):
            for column in range(width):
                stripe = column * colors.shape[1] // width
                image[i, :, row, column] = white if foreground[i, row, column] else palette[colors[i, stripe]]
    return image


@given(n=st.integers(1, 4), stripes=st.integers(1, 3), per_stripe=st.integers(1, 4), height=st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_paint_agrees_with_loops(n, stripes, per_stripe, height):
    foreground = torch.rand((n, height, stripes * per_stripe), generator=generator(1)) < 0.4
    colors = torch.randint(0, 10, (n, stripes), generator=generator(2))
    palette = torch.rand((10, 3), generator=generator(3))
    image = paint(foreground, colors, palette, 2.0)
    assert image.dtype == torch.float32
    assert image.is_contiguous()
    assert torch.equal(image, slow_paint(foreground, colors, palette, 2.0))


def test_foreground_is_every_pixel_above_zero():
    images = torch.zeros((1, 28, 28), dtype=torch.uint8)
    images[0, 3, 4] = 1
    images[0, 5, 6] = 255
    assert find_foreground(images).nonzero().tolist() == [[0, 3, 4], [0, 5, 6]]


def test_a_smaller_pixel_is_foreground_where_half_of_it_is():
    images = torch.zeros((1, 28, 28), dtype=torch.uint8)
    images[0, 0, 0] = 255  # a quarter of the first pixel
    images[0, 0, 2:4] = 1  # half of the second
    images[0, 0:2, 4:6] = 7  # all of the third
    assert find_foreground(images, 14).nonzero().tolist() == [[0, 0, 1], [0, 0, 2]]


@pytest.mark.parametrize("side", [7, 14, 20, 28])
def test_smaller_digits_keep_their_share_of_ink(side):
    images = load_digits().test.images
    share = find_foreground(images, side).float().mean() / (images > 0).float().mean()
    assert 0.8 < share < 1.25


def test_digits_are_repeated_in_order_with_new_colors():
    digits = load_digits().test[:7]
    samples = Coloring(PALETTE / 255, 1.0)(digits, 24, [0.1, 0.1], generator())
    assert samples.x.shape == (24, 3, 28, 28)
    assert samples.b.shape == (24, 2)
    assert torch.equal(samples.y, digits.labels.repeat(4)[:24])
    digit = (samples.x == 1).all(dim=1)
    assert torch.equal(digit, (digits.images > 0).repeat(4, 1, 1)[:24])
    assert not torch.equal(samples.b[:7], samples.b[7:14])


def test_colouring_is_fast():
    n = 10_000
    images = torch.randint(0, 2, (n, 28, 28), dtype=torch.uint8, generator=generator())
    digits = Digits(images, torch.arange(n) % 10)
    coloring = Coloring(PALETTE / 255, 1.0)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        coloring(digits, n, [0.9, 0.9], generator())
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1, "10,000 images should take far less than a second"
