"""Layers between FFT convolutions: the same numbers as PyTorch's, in memory order (C, H, W, N)."""

import copy

import pytest
import torch
from torch import nn

from ffw_fast.convolutions import use_cheapest_convolutions
from ffw_fast.convolutions.batch_innermost import (
    BatchInnermostAvgPool2d,
    BatchInnermostBatchNorm2d,
    BatchInnermostGlobalPool,
    BatchInnermostMaxPool2d,
    PointwiseConv2d,
    TurningConv2d,
    batch_innermost,
    batch_outermost,
    is_batch_innermost,
    is_pointwise,
    keep_batch_innermost,
)
from ffw_fast.convolutions.fft import has_compiled_kernel
from ffw_fast.models import ResNet18


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(5, 3, 4, 6), (1, 3, 4, 6), (0, 3, 4, 6), (70, 2, 9, 8)])
def test_there_and_back(order, shape):
    x = torch.randn(shape).to(memory_format=order)
    turned = batch_innermost(x)
    assert is_batch_innermost(turned)
    assert torch.equal(turned, x) and torch.equal(batch_outermost(turned), x)
    assert batch_outermost(turned).is_contiguous()
    assert batch_innermost(turned) is turned, "no copy"


def results_of(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of the input and of all parameters under one fixed gradient."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_(), *layer.parameters()]
    y = layer(leaves[0])
    grad = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves, batch_innermost(grad) if is_batch_innermost(y) else grad)]


@pytest.mark.parametrize(
    ("dense", "kind"),
    [
        (nn.MaxPool2d(3, 2, 1), BatchInnermostMaxPool2d),
        (nn.MaxPool2d(2, ceil_mode=True), BatchInnermostMaxPool2d),
        (nn.MaxPool2d(2, stride=1, dilation=2), BatchInnermostMaxPool2d),
        (nn.AvgPool2d(3, 2, 1, count_include_pad=False), BatchInnermostAvgPool2d),
        (nn.AdaptiveAvgPool2d(1), BatchInnermostGlobalPool),
        (nn.BatchNorm2d(6), BatchInnermostBatchNorm2d),
        (nn.BatchNorm2d(6).eval(), BatchInnermostBatchNorm2d),
        (nn.Conv2d(6, 4, 1), PointwiseConv2d),
        (nn.Conv2d(6, 4, 1, stride=(2, 3), bias=False), PointwiseConv2d),
        (nn.Conv2d(6, 4, 3, stride=2, padding=1), TurningConv2d),
        (nn.Conv2d(6, 4, 3, groups=2, dilation=2, padding="same", padding_mode="reflect"), TurningConv2d),
    ],
    ids=str,
)
def test_numbers_are_pytorchs_and_the_order_stays(dense, kind):
    layer = copy.deepcopy(dense).double()
    expected = copy.deepcopy(layer)
    layer.__class__ = kind
    x = torch.randn(5, 6, 9, 8, dtype=torch.float64).clamp_min(0)  # a ReLU's, in which many zeros tie
    ours, theirs = results_of(layer, batch_innermost(x)), results_of(expected, x)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    if isinstance(dense, nn.MaxPool2d):
        assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True)), "to the last bit"
    for mine, other in zip(layer.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
    assert is_batch_innermost(ours[0]), "the output"
    assert ours[1].stride(0) == 1, "the input's gradient"
    if not isinstance(dense, nn.BatchNorm2d):
        assert torch.equal(layer(x[0]), expected(x[0])), "of one image without a batch"


@pytest.mark.parametrize(
    ("dense", "kind"),
    [
        (nn.MaxPool2d(3, 2, 1), BatchInnermostMaxPool2d),
        (nn.AvgPool2d(2), BatchInnermostAvgPool2d),
        (nn.BatchNorm2d(6), BatchInnermostBatchNorm2d),
        (nn.Conv2d(6, 4, 1, stride=2), PointwiseConv2d),
        (nn.Conv2d(6, 4, 3, stride=2), TurningConv2d),
    ],
    ids=str,
)
def test_what_overwrites_an_output_gets_the_same_gradient(dense, kind):
    """An in-place ReLU or sum behind a layer, as in torchvision's networks; and no copies of a view's gradient."""
    layer = copy.deepcopy(dense).double()
    in_order = copy.deepcopy(layer)
    in_order.__class__ = kind
    x = torch.randn(5, 6, 9, 8, dtype=torch.float64)

    class Overwritten(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x)
            assert not y._is_view()
            y += 0.1
            return torch.relu_(y)

    ours, theirs = results_of(Overwritten(in_order), batch_innermost(x)), results_of(Overwritten(layer), x)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_an_indexed_pool_is_left_alone():
    pool = nn.MaxPool2d(2, return_indices=True)
    x = batch_innermost(torch.randn(3, 2, 4, 4))
    expected = pool(x)
    pool.__class__ = BatchInnermostMaxPool2d
    assert all(torch.equal(mine, other) for mine, other in zip(pool(x), expected, strict=True))


@pytest.mark.parametrize("kind", [PointwiseConv2d, TurningConv2d])
def test_under_autocast_images_are_not_turned(kind):
    layer = kind(3, 4, 1)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(batch_innermost(torch.randn(5, 3, 4, 4)))
    assert y.dtype == torch.bfloat16
    assert not is_batch_innermost(y)


def test_what_reads_single_pixels():
    assert is_pointwise(nn.Conv2d(3, 4, 1, stride=2)) and is_pointwise(nn.Conv2d(3, 4, 1, padding="same"))
    others = [nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(3, 4, 1, padding=1), nn.Conv2d(3, 4, (1, 3))]
    assert not any(map(is_pointwise, others))


def test_convolutions_and_batch_norms_stay_where_few_are_by_fft():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.MaxPool2d(2))
    keep_batch_innermost(model, by_fft=1)
    assert [type(layer) for layer in model] == [nn.Conv2d, nn.BatchNorm2d, nn.Conv2d, BatchInnermostMaxPool2d]
    keep_batch_innermost(model, by_fft=2)
    assert [type(layer) for layer in model[:3]] == [TurningConv2d, BatchInnermostBatchNorm2d, PointwiseConv2d]


def test_all_of_a_resnet_has_the_batch_innermost():
    if not has_compiled_kernel():
        pytest.skip("without the compiled kernel nothing is convolved by FFT")
    model = ResNet18(2)
    chosen = use_cheapest_convolutions(model, torch.randn(2, 3, 64, 64))
    assert set(chosen.values()) == {"fft", "unrolled"}
    orders: dict[str, bool] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.ReLU, nn.MaxPool2d, PointwiseConv2d, TurningConv2d)):
            hook = lambda _module, _inputs, y, name=name: orders.update({name: is_batch_innermost(y)})  # noqa: E731
            module.register_forward_hook(hook)
    model(torch.randn(4, 3, 64, 64))
    few_pixels = "layer4"  # 2 x 2, which are unrolled
    assert all(kept for name, kept in orders.items() if not name.startswith(few_pixels)), orders
    assert len(orders) > 15
