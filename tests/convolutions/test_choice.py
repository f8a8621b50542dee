"""The choice among direct, FFT and unrolled convolutions, and that it changes no result beyond rounding."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ffw_fast.convolutions import cheapest_convolutions, use_cheapest_convolutions
from ffw_fast.convolutions.fft import has_compiled_kernel
from ffw_fast.convolutions.unrolled import UnrolledConv2d, is_worth_unrolling, live_taps
from ffw_fast.models import ResNet18
from tests.convolutions.layers import few_pixels, layers_on_small_images

needs_fft = pytest.mark.skipif(not has_compiled_kernel(), reason="the FFT convolution is not compiled")


@settings(max_examples=60, deadline=None)
@given(layers_on_small_images, few_pixels, few_pixels, st.integers(0, 3))
def test_unrolled_convolution_is_the_direct_one(arguments, height, width, images):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        direct = nn.Conv2d(3, 4, **arguments).double()
        x = torch.randn(images, 3, height, width, dtype=torch.float64)
    try:
        expected = direct(x[:1].expand(1, -1, -1, -1)) if images else direct(torch.zeros(1, *x.shape[1:]).double())
    except RuntimeError:  # the kernel is larger than the padded image
        assert live_taps(direct, height, width) is None
        return
    unrolled = copy.deepcopy(direct)
    unrolled.__class__ = UnrolledConv2d
    results = []
    for layer in (direct, unrolled):
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        assert y.shape[1:] == expected.shape[1:]
        y.square().sum().backward()
        results.append([y, inputs.grad, *(parameter.grad for parameter in layer.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_what_is_unrolled():
    same = nn.Conv2d(2, 2, 3, padding=1)
    assert [is_worth_unrolling(same, size, size) for size in (1, 2, 3, 28)] == [True, True, False, False]
    halving = nn.Conv2d(2, 2, 3, stride=2, padding=1)
    assert is_worth_unrolling(halving, 2, 2) and not is_worth_unrolling(halving, 4, 4)
    assert is_worth_unrolling(nn.Conv2d(2, 2, 1, stride=2), 1, 1)
    assert not is_worth_unrolling(nn.Conv2d(2, 2, 3, padding=1, groups=2), 1, 1)
    assert not is_worth_unrolling(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), 1, 1)
    assert not is_worth_unrolling(nn.Conv2d(2, 2, 3, padding="same"), 1, 1)


def test_unrolled_layer_takes_all_other_images_too():
    layer = nn.Conv2d(3, 4, 3, padding=1)
    unrolled = copy.deepcopy(layer)
    unrolled.__class__ = UnrolledConv2d
    for shape in ((2, 3, 9, 9), (3, 1, 1), (0, 3, 1, 1)):
        x = torch.randn(shape)
        torch.testing.assert_close(unrolled(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert unrolled(torch.randn(2, 3, 1, 1)).dtype == torch.bfloat16


@needs_fft
def test_choice_of_each_layer():
    model = nn.Sequential(
        nn.Conv2d(16, 16, 3, padding=1),
        nn.Conv2d(16, 64, 7, padding=3, stride=2),
        nn.Conv2d(64, 64, 7, padding=3, groups=2),
        nn.Conv2d(64, 64, 7, padding=0),
        nn.Conv2d(64, 64, 7, padding=3, padding_mode="circular"),
        nn.Conv2d(64, 64, 7, padding="same"),
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(64, 8, 3, padding=1),
    )
    assert use_cheapest_convolutions(model, torch.randn(2, 16, 28, 28)) == {"5": "fft", "7": "unrolled"}
    assert use_cheapest_convolutions(nn.Conv2d(64, 64, 7, padding=3).double(), torch.randn(2, 64, 9, 9).double()) == {}


@needs_fft
def test_resnet_keeps_its_results():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = ResNet18(10).eval()
        x = torch.randn(4, 3, 32, 32)
    fast = copy.deepcopy(plain)
    chosen = use_cheapest_convolutions(fast, x[:2])
    assert {"layer4.0.conv1", "layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2"} <= {
        name for name, way in chosen.items() if way == "unrolled"
    }
    assert chosen["layer1.0.conv1"] == "fft"
    exact = copy.deepcopy(plain).double()
    outputs = []
    for model, inputs in ((fast, x), (plain, x), (exact, x.double())):
        y = model(inputs)
        y.square().sum().backward()
        outputs.append([y.detach(), *(parameter.grad for parameter in model.parameters())])
    for ours, torchs, reference in zip(*outputs, strict=True):
        bound = 4 * (torchs - reference).norm() + 1e-3 * reference.norm()
        assert (ours - reference).norm() <= bound


@needs_fft
def test_modules_are_what_they_were_afterwards():
    model = ResNet18(10).train()
    classes = [type(module) for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with cheapest_convolutions(model, torch.randn(2, 3, 32, 32)):
        assert model.training
        assert UnrolledConv2d in {type(module) for module in model.modules()}
        model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert [type(module) for module in model.modules()] == classes
    assert not any("_taps_by_size" in module.__dict__ for module in model.modules())
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])]
    assert changed and all("running" in name or "num_batches" in name for name in changed)
