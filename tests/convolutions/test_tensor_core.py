"""Convolutions as tensor cores read them: the same sums, channels last; and the same bits from run to run on a GPU."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from ffw_fast import extract
from ffw_fast.convolutions import _for_tensor_cores, cheapest_convolutions, repeatable_convolutions, tensor_core
from ffw_fast.convolutions.tensor_core import TensorCoreConv2d
from ffw_fast.data.samples import Samples
from ffw_fast.models import ResNet18, SimpleConvNet
from ffw_fast.vanilla import Recipe, train_vanilla

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The CPU takes part, in float64, where sums in another order agree to the last digits."""
    monkeypatch.setattr(tensor_core, "is_for_tensor_cores", lambda images: images.dim() == 4)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": 3},
        {"stride": 2, "bias": False},
        {"padding": "same", "dilation": 2},
        {"padding": 1, "padding_mode": "reflect"},
    ],
)
def test_the_sums_are_the_same(as_on_a_gpu, channels, options):
    torch.manual_seed(0)
    plain = nn.Conv2d(channels, 6, 3, **options).double()
    ours = copy.deepcopy(plain)
    ours.__class__ = TensorCoreConv2d
    results = []
    for layer in (plain, ours):
        x = torch.randn(2, channels, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(parameter.grad for parameter in layer.parameters())])
    for ours_part, plain_part in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours_part, plain_part)
    if plain.padding_mode == "zeros":  # else PyTorch pads in an order of its own
        assert results[1][0].is_contiguous(memory_format=torch.channels_last)


def test_groups_and_single_images_are_taken_as_they_are(as_on_a_gpu):
    torch.manual_seed(0)
    plain = nn.Conv2d(2, 4, 3, groups=2).double()
    ours = copy.deepcopy(plain)
    ours.__class__ = TensorCoreConv2d
    for x in (torch.randn(3, 2, 5, 5).double(), torch.randn(2, 5, 5).double()):
        torch.testing.assert_close(ours(x), plain(x))


def test_a_whole_network_keeps_its_results(as_on_a_gpu):
    torch.manual_seed(0)
    model = ResNet18(10).double().eval()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    expected = model(x)
    assert len(_for_tensor_cores(model, x[:1])) == 20
    torch.testing.assert_close(model(x), expected)


def test_a_network_that_needs_the_usual_order_keeps_it(as_on_a_gpu):
    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4 * 9, 2)

        def forward(self, x):
            y = self.conv(x)
            return self.fc(y.view(len(y), -1))

    model = Viewing()
    assert _for_tensor_cores(model, torch.randn(2, 3, 5, 5)) == {}
    assert type(model.conv) is nn.Conv2d


def test_repeatable_algorithms_are_asked_for_only_within():
    assert not torch.backends.cudnn.deterministic
    with contextlib.suppress(ZeroDivisionError), repeatable_convolutions():
        assert torch.backends.cudnn.deterministic
        raise ZeroDivisionError
    assert not torch.backends.cudnn.deterministic


def images(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(230, 3, 14, 14, generator=source)
    return x, torch.randint(10, (230,), generator=source), torch.randint(10, (230, 1), generator=source)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.filterwarnings("ignore")  # noise has no bias to remove
def test_the_same_seed_gives_the_same_bits(device, precision):
    def scores():
        torch.manual_seed(0)
        model, samples = SimpleConvNet(), Samples(*images(0))
        train_vanilla(model, samples, Recipe("sgd", 0.1, 100, 1), seed=0, device=device, precision=precision)
        return extract(
            model, images(0), images(1), bottleneck="flatten", num_bias_classes=10, max_epochs=1, precision=precision,
            device=device, progress=False,
        ).scores  # fmt: skip

    first, second = scores(), scores()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_what_the_cpu_gives(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    model = SimpleConvNet().eval()
    x = images(0)[0]
    expected = model(x)
    on_gpu = copy.deepcopy(model).cuda()
    with torch.no_grad(), cheapest_convolutions(on_gpu, x[:2].cuda()):
        assert type(on_gpu.conv1) is TensorCoreConv2d
        torch.testing.assert_close(on_gpu(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-5)
