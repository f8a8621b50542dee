"""Convolutions whose weight lies tap by tap: the same numbers, without what meets nothing but padding."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from torch import nn

from ffw_fast.convolutions import lay_out_by_taps
from ffw_fast.convolutions.batch_innermost import batch_innermost
from ffw_fast.convolutions.tap_major import TapMajorConv2d, by_taps, put_taps
from ffw_fast.convolutions.unrolled import is_worth_unrolling
from tests.convolutions.layers import few_pixels, layers_on_small_images


def laid_out(direct: nn.Conv2d, height: int, width: int) -> tuple[nn.Conv2d, torch.Tensor]:
    """A trainable copy that lies tap by tap, and its taps."""
    layer = copy.deepcopy(direct)
    image = torch.zeros(1, direct.in_channels, height, width).to(direct.weight)
    taps = lay_out_by_taps(layer, lambda layer: [layer(image)])[""]
    assert type(layer) is TapMajorConv2d
    return layer.requires_grad_(), taps


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(layers_on_small_images, few_pixels, few_pixels)
def test_it_is_the_direct_one(arguments, height, width):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        direct = nn.Conv2d(3, 4, **arguments).double()
        x = torch.randn(5, 3, height, width, dtype=torch.float64)
    assume(is_worth_unrolling(direct, height, width))
    layer, taps = laid_out(direct, height, width)
    for order in (torch.Tensor.contiguous, batch_innermost):
        results = []
        for tested in (direct, layer):
            tested.zero_grad()
            inputs = order(x.clone()).requires_grad_()
            y = tested(inputs)
            y.square().sum().backward()
            gradients = [parameter.grad for parameter in tested.parameters()]
            results.append([y, inputs.grad, *gradients])
        of_all = torch.zeros_like(direct.weight)
        put_taps(of_all, taps, results[1][2])
        results[1][2] = of_all  # so that the idle taps' gradient is seen to be 0
        for theirs, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert torch.equal(by_taps(of_all, taps), layer.weight.grad)


def test_one_pixel_leaves_one_tap_and_the_weight_is_multiplied_where_it_lies():
    direct = nn.Conv2d(5, 7, 3, padding=1)
    layer, taps = laid_out(direct, 1, 1)
    assert taps.tolist() == [4] and layer.weight.shape == (1, 5, 7)
    assert torch.equal(layer.weight[0], direct.weight[:, :, 1, 1].T)


def test_an_activation_may_overwrite_the_output():
    for size in (1, 2):
        layer, _ = laid_out(nn.Conv2d(3, 4, 3, padding=1), size, size)
        y = layer(torch.randn(2, 3, size, size))
        assert not y._is_view()
        nn.functional.relu_(y).sum().backward()
        assert layer.weight.grad is not None


def test_autocast_computes_in_bf16():
    for size in (1, 2):
        layer, _ = laid_out(nn.Conv2d(3, 4, 3, padding=1), size, size)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(torch.randn(2, 3, size, size))
        assert y.dtype == torch.bfloat16 and y.shape == (2, 4, size, size)


def test_images_of_another_size_are_refused():
    layer, _ = laid_out(nn.Conv2d(3, 4, 3, padding=1), 1, 1)
    with pytest.raises(RuntimeError, match=r"expected images of \(1, 1\) pixels as before, got \(2, 3, 2, 2\)"):
        layer(torch.randn(2, 3, 2, 2))


def test_layers_on_images_of_several_sizes_stay_as_they_are():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x).sum() + self.conv(x[:, :, :1, :1]).sum()

    model = Twice()
    assert lay_out_by_taps(model, lambda model: [model(torch.randn(2, 3, 2, 2))]) == {}
    assert type(model.conv) is nn.Conv2d
    assert lay_out_by_taps(nn.Conv2d(3, 3, 3, padding=1), lambda model: [model(torch.randn(2, 3, 9, 9))]) == {}


@pytest.mark.parametrize(
    "other_use",
    [
        lambda conv, y: y / conv.weight.square().sum().sqrt(),
        lambda conv, y: nn.functional.conv_transpose2d(y, conv.weight, padding=1),
    ],
    ids=["another output", "an error"],
)
def test_layers_whose_weight_is_read_elsewhere_too_stay_as_they_are(other_use):
    conv = nn.Conv2d(3, 8, 3, padding=1)
    conv.register_forward_hook(lambda conv, _inputs, y: other_use(conv, y))
    before, weight, x = dict(vars(conv)), conv.weight, torch.randn(2, 3, 1, 1)
    expected = conv(x)
    assert lay_out_by_taps(conv, lambda conv: [conv(x)]) == {}
    assert type(conv) is nn.Conv2d and conv.weight is weight and vars(conv) == before
    assert torch.equal(conv(x), expected)
