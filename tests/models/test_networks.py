"""The networks: shapes, named bottlenecks, and a module of its own for every non-linearity."""

from collections import Counter

import pytest
import torch
from torch import nn

from ffw_fast.models import MLP, SimpleConvNet

NETWORKS = [(MLP, "relu3", 100), (SimpleConvNet, "flatten", 128)]


@pytest.mark.parametrize(("network", "bottleneck", "features"), NETWORKS)
def test_the_bottleneck_feeds_the_classifier(network, bottleneck, features):
    model = network().eval()
    seen = {}
    model.get_submodule(bottleneck).register_forward_hook(lambda *call: seen.update(features=call[-1]))
    logits = model(torch.rand(3, 3, 28, 28))
    assert logits.shape == (3, 10)
    assert seen["features"].shape == (3, features)
    assert torch.equal(model.classifier(seen["features"]), logits)


@pytest.mark.parametrize(("network", "bottleneck", "features"), NETWORKS)
def test_the_graph_is_modules_used_once(network, bottleneck, features):
    graph = torch.fx.symbolic_trace(network()).graph
    assert {node.op for node in graph.nodes} == {"placeholder", "call_module", "output"}
    uses = Counter(node.target for node in graph.nodes if node.op == "call_module")
    assert uses == Counter(name for name, _ in network().named_children())


def test_simple_conv_net_is_as_published():
    model = SimpleConvNet()
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [conv.out_channels for conv in convolutions] == [16, 32, 64, 128]
    assert all(conv.kernel_size == (7, 7) and conv.padding == (3, 3) for conv in convolutions)
    kinds = [type(module).__name__ for module in model.children()]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU"] * 3 + [
        "Conv2d", "BatchNorm2d", "Tanh", "AdaptiveAvgPool2d", "Flatten", "Linear",
    ]  # fmt: skip
    assert model(torch.rand(2, 3, 14, 14)).shape == (2, 10)


def test_mlp_is_as_published():
    linear = [module for module in MLP().modules() if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [
        (2352, 100),
        (100, 100),
        (100, 100),
        (100, 10),
    ]
    assert MLP()(torch.rand(2, 2352)).shape == (2, 10)
