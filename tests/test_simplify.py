"""Folding batch norm and overwriting in activations change nothing that is computed."""

import copy

import pytest
import torch
from torch import fx, nn

from ffw_fast.bottleneck import outputs_of
from ffw_fast.gated_network import GatedNetwork
from ffw_fast.gates import GateKind
from ffw_fast.models import ResNet18
from ffw_fast.simplify import TOLERANCE, fold_batch_norms, overwrite_in_activations, simplified


class Residual(nn.Module):
    """Two convolutions with batch norm beside a shortcut, and a norm that does not follow a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.relu = nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4, affine=False)
        self.bn3 = nn.BatchNorm2d(4)
        self.pool, self.flatten, self.fc = nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(self.flatten(self.pool(torch.relu(self.bn3(out + x)))))


def with_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval().requires_grad_(False)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return with_statistics(Residual())


@pytest.fixture
def x():
    return torch.randn(5, 4, 8, 8)


def test_batch_norms_after_convolutions_are_folded_and_no_others(model, x):
    cheap = simplified(model, "flatten", lambda network: outputs_of(network, "flatten", x))
    kept = [name for name, module in cheap.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert kept == ["bn3"]
    assert cheap.relu.inplace
    assert not (cheap(x) - model(x)).abs().max() > 1e-5
    assert isinstance(model.bn1, nn.BatchNorm2d), "the model itself stays as it is"


def test_a_layer_read_twice_or_run_twice_is_not_folded(x):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.again, self.norm = (
                nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            )  # fmt: skip

        def forward(self, x):
            y = self.conv(x)
            y = self.bn(y) + y
            return self.norm(self.again(self.norm(self.again(y)))).mean((2, 3))

    model = with_statistics(Twice())
    graph = fx.Tracer().trace(model)
    assert fold_batch_norms(copy.deepcopy(model), graph) == []


def test_networks_are_compared_in_full_precision(monkeypatch, as_on_a_gpu):
    """On a GPU operands are rounded, which hides from a comparison that a folded network is the same."""
    torch.manual_seed(0)
    model, x = with_statistics(ResNet18(10)), torch.randn(5, 3, 32, 32)
    outputs = lambda network: outputs_of(network, "flatten", x)  # noqa: E731
    cheap = simplified(model, "flatten", outputs)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in cheap.modules())
    (ours, _), (theirs, _) = outputs(cheap), outputs(model)
    assert not torch.allclose(ours, theirs, rtol=0, atol=TOLERANCE * float(theirs.abs().max())), "what was to hide it"
    assert torch.backends.cudnn.conv.fp32_precision == "tf32", "PyTorch is told what it was before"


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Convolutions round their operands to TF32 where PyTorch is told so."""
    assert torch.backends.cudnn.conv.fp32_precision == "tf32", "PyTorch's default"
    convolve = nn.Conv2d._conv_forward

    def rounded(x):
        if torch.backends.cudnn.conv.fp32_precision != "tf32":
            return x
        return ((x.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)

    monkeypatch.setattr(
        nn.Conv2d, "_conv_forward", lambda self, x, weight, bias: convolve(self, rounded(x), rounded(weight), bias)
    )


@pytest.mark.parametrize("bottleneck", ["conv1", "bn1", "relu", "conv2", "flatten"])
def test_features_at_every_bottleneck_stay_what_they_are(model, x, bottleneck):
    expected = outputs_of(model, bottleneck, x)
    network = GatedNetwork(model, bottleneck, GateKind.FFW, 0, x)
    features, logits = network(x)
    assert torch.allclose(logits, expected[0], atol=1e-4)
    assert torch.allclose(features, expected[1].flatten(1), atol=1e-4)
    assert torch.allclose(network.features(x), features)
    folded = [name for name, module in network.module.named_modules() if isinstance(module, nn.Identity)]
    assert folded == [name for name in ("bn1", "bn2") if bottleneck != name.replace("bn", "conv")]


def test_a_simplification_that_changes_an_output_is_not_used(model, x):
    model.relu.register_forward_hook(lambda module, _x, out: out * (2 if module.inplace else 1))
    assert not simplified(model, "flatten", lambda network: outputs_of(network, "flatten", x)).relu.inplace


def test_a_forward_that_cannot_be_traced_is_left_alone(x):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(self.conv(x)).mean((2, 3)) * (1 if x.sum() > 0 else 2)

    cheap = simplified(with_statistics(Branching()), "bn", lambda network: outputs_of(network, "bn", x))
    assert isinstance(cheap.bn, nn.BatchNorm2d)


def test_folded_gradients_of_the_scores_equal_the_unfolded_ones(model, x):
    """dJ/dm through w' = w a: the gradient of the gated weight times the weight is the same, folded or not."""

    def score_gradients(network: nn.Module) -> list[torch.Tensor]:
        layers = [network.conv1, network.conv2, network.fc]
        for layer in layers:
            layer.weight.requires_grad_(True)
        network(x).square().sum().backward()
        return [layer.weight.grad * layer.weight.detach() for layer in layers]

    cheap = copy.deepcopy(model)
    graph = fx.Tracer().trace(cheap)
    assert fold_batch_norms(cheap, graph) == ["bn1", "bn2"]
    overwrite_in_activations(cheap, graph)
    for folded, plain in zip(score_gradients(cheap), score_gradients(model), strict=True):
        assert torch.allclose(folded, plain, rtol=1e-4, atol=1e-5 * plain.abs().max())


class Shortcuts(nn.Module):
    """Two sums: one is read by its ReLU alone, the other by something else, too."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.alone, self.shared = nn.ReLU(), nn.ReLU()

    def forward(self, x):
        x = self.alone(self.first(x) + x)
        total = self.second(x) + x
        return self.shared(total) * total


def test_a_relu_overwrites_a_sum_that_nothing_else_reads():
    model, x = Shortcuts(), torch.randn(5, 4)
    cheap = copy.deepcopy(model)
    overwrite_in_activations(cheap, fx.Tracer().trace(cheap))
    assert cheap.alone.inplace and not cheap.shared.inplace
    for network in (model, cheap):
        network(x).square().sum().backward()
    assert torch.equal(cheap(x), model(x))
    for ours, theirs in zip(cheap.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
