"""The network as the loop trains it: flat buffers of gates, features at the bottleneck, and what stays as it was."""

import copy

import pytest
import torch
from torch import nn

from ffw_fast import ops
from ffw_fast.gated_network import GatedNetwork
from ffw_fast.gates import GATES, GateKind, gate_kind
from ffw_fast.masking import mask_model
from ffw_fast.modules import masked_layers, set_temperature
from ffw_fast.optim import GatedAdam
from tests import six_features, small_images
from tests.small_gates import spread_scores


def make(model, x, bottleneck, kind=GateKind.FFW, seed=3) -> GatedNetwork:
    return GatedNetwork(model, bottleneck, kind, seed, x[:8])


@pytest.mark.parametrize("gate", GATES)
def test_it_is_the_masked_model(gate):
    """Outputs, features and gradients by the scores, batch norms folded, against masked layers in the model itself."""
    model = small_images.network()
    x, y, _ = small_images.biased_set(20, seed=5)
    network = make(model, x, small_images.BOTTLENECK, gate_kind(gate))
    masked = mask_model(copy.deepcopy(model), gate, seed=3)
    spread_scores(network.gates)
    for name, scores in network.gates.views(network.gates.scores).items():
        masked.get_submodule(name).scores.data.copy_(scores)
    set_temperature(masked, 0.5)
    network.gates.set_temperature(0.5)

    kept = []
    masked.get_submodule(small_images.BOTTLENECK).register_forward_hook(lambda _module, _x, output: kept.append(output))
    expected = masked(x)
    features, logits = network(x)
    torch.testing.assert_close(features, kept[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network.features(x), features)
    torch.testing.assert_close(network.outputs(x), (features, logits))

    for given in (logits, expected):
        nn.functional.cross_entropy(given, y).backward()
    for name, scores in scores_gradients(network).items():
        torch.testing.assert_close(scores, masked_layers(masked)[name].scores.grad, rtol=1e-3, atol=1e-6)


def scores_gradients(network: GatedNetwork) -> dict[str, torch.Tensor]:
    """Straight-through gradients of the scores, by layer."""
    gates = network.gates
    flat = ops.gate_weight_backward(
        gates.gated.grad, gates.weight, gates.scores, gates.temperature, gates.draw, int(gates.kind)
    )
    return gates.views(flat)


def test_the_model_is_left_as_it_was():
    model = small_images.network().train()
    model.zero_grad()
    before = copy.deepcopy(model.state_dict())
    x, y, _ = small_images.biased_set(20, seed=5)
    network = make(model, x, small_images.BOTTLENECK)
    _, logits = network(x)
    nn.functional.cross_entropy(logits, y).backward()
    GatedAdam(network.gates).step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(part.training for part in model.modules())
    assert not any(part.training for part in network.module.modules() if not isinstance(part, nn.Identity))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(part._forward_hooks for part in model.modules())


def test_only_gated_weights_get_gradients():
    x, _, _ = small_images.biased_set(20, seed=5)
    network = make(small_images.network(), x, small_images.BOTTLENECK)
    x.requires_grad_(False)
    _, logits = network(x)
    logits.sum().backward()
    with_gradient = [name for name, parameter in network.module.named_parameters() if parameter.grad is not None]
    assert with_gradient == ["conv1.weight", "conv2.weight", "classifier.weight"]
    flat = network.gates.gated.grad
    for name, view in network.gates.views(flat).items():
        assert network.module.get_submodule(name).weight.grad.data_ptr() == view.data_ptr()
        assert view.any()


def test_what_lies_behind_the_bottleneck_is_not_run_for_features():
    ran = []
    model = six_features.network()
    model.classifier.register_forward_hook(lambda *_arguments: ran.append(1))
    x, _, _ = six_features.samples(30)
    network = make(model, x, six_features.BOTTLENECK)
    ran.clear()
    features = network.features(x)
    assert not ran
    given, _ = network(x)
    assert ran == [1]
    torch.testing.assert_close(given, features)


@pytest.mark.parametrize("count", [1, 499, 500, 501, 1003])
def test_large_sets_are_passed_in_parts(count):
    x, _, _ = six_features.samples(count)
    network = make(six_features.network(), x, six_features.BOTTLENECK)
    features, logits = network.outputs(x)
    assert features.shape == (count, 8)
    torch.testing.assert_close(logits, six_features.network()(x))
    torch.testing.assert_close(network.features(x), features)
    assert not features.requires_grad


def test_a_layer_that_runs_twice_sums_its_gradients():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.relu, self.classifier = nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)

        def forward(self, x):
            return self.classifier(self.relu(self.layer(self.layer(x).tanh())))

    model = Twice().eval()
    x, y, _ = six_features.samples()
    network = make(model, x, "relu")
    nn.functional.cross_entropy(network(x)[1], y).backward()
    nn.functional.cross_entropy(model(x), y).backward()
    assert list(network.gates.shapes) == ["layer", "classifier"]
    for name, gradient in network.gates.views(network.gates.gated.grad).items():
        torch.testing.assert_close(gradient, model.get_submodule(name).weight.grad)


def test_features_before_a_relu_are_not_overwritten_by_it():
    x, _, _ = six_features.samples()
    network = make(six_features.network(), x, "fc1")
    given, _ = network(x)
    torch.testing.assert_close(given, six_features.network().fc1(x))
    torch.testing.assert_close(network.features(x), given)


def test_features_are_flattened():
    x, _, _ = small_images.biased_set(5)
    network = make(small_images.network(), x, "relu2")
    assert network.features(x).shape == (5, 12 * 3 * 3)


def test_features_in_bf16_are_in_the_order_of_those_in_float32():
    x, _, _ = small_images.biased_set(20)
    network = make(small_images.network(), x, "relu2")
    exact = network.features(x)
    with torch.autocast("cpu", torch.bfloat16):
        given, _ = network(x)
        features = network.features(x)
    assert torch.equal(given, features)
    torch.testing.assert_close(features.float(), exact, rtol=0, atol=0.03 * float(exact.abs().max()))


def test_unknown_bottleneck_names_the_known_ones():
    x, _, _ = six_features.samples()
    with pytest.raises(ValueError, match="unknown bottleneck 'fc9'; the modules of Sequential: fc1, relu, classifier"):
        make(six_features.network(), x, "fc9")


class OverWidth(nn.Module):
    """Adds a convolution's channels and a Linear layer's outputs, which lie along the image's width."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.relu, self.flatten = nn.Conv2d(3, 6, 3), nn.Linear(6, 6), nn.ReLU(), nn.Flatten()
        self.classifier = nn.Linear(216, 3)

    def forward(self, x):
        x = self.conv(x)
        return self.classifier(self.flatten(self.relu(x + self.fc(x))))


def norm_over_tokens():
    norm = nn.BatchNorm1d(8)
    nn.init.normal_(norm.bias)
    return nn.Sequential(nn.Linear(5, 8), norm, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def with_a_hook():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3))
    model[0].register_forward_hook(lambda _layer, _inputs, output: output + 1)
    return model


@pytest.mark.parametrize(
    ("make_network", "shape", "bottleneck"),
    [(norm_over_tokens, (8, 5), "3"), (OverWidth, (3, 8, 8), "flatten"), (with_a_hook, (3, 8, 8), "2")],
)
def test_channels_that_zeros_do_not_prune_are_refused(make_network, shape, bottleneck):
    torch.manual_seed(0)
    model, x = make_network(), torch.randn(4, *shape)
    with pytest.raises(ValueError, match="pruned in its layers and batch norms the network computes something else"):
        GatedNetwork(model, bottleneck, GateKind.FFW, 0, x, granularity="channel")
    GatedNetwork(model, bottleneck, GateKind.FFW, 0, x)
