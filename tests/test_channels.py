"""Channel gates: where they stand, and pruned networks that compute what the gated ones do."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from ffw_fast import GATES, draw_gates, mask_model, masked_layers, set_temperature
from ffw_fast.channel_sparsity import share_gone
from ffw_fast.channels import ChannelGraph, ChannelMask
from ffw_fast.models import MLP, ResNet18, SimpleConvNet
from ffw_fast.modules import GatedActivation
from tests.small_images import Block


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.act = nn.Conv2d(3, 6, 3), nn.GELU()
        self.plain, self.wide = Block(6, 6, False), Block(6, 8, True)
        self.last = Block(8, 8, False)
        self.pool, self.flatten, self.fc = nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4)

    def forward(self, x):
        x = self.last(self.wide(self.plain(self.act(self.stem(x)))))
        return self.fc(self.flatten(self.pool(x)))


class Functional(nn.Module):
    """Functions and methods for non-linearities, one that does not map 0 to 0, and norms without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 6, 3), nn.Conv2d(6, 7, 3, groups=1)
        self.norm, self.flatten = nn.BatchNorm2d(6, affine=False), nn.Flatten()
        self.fc1, self.fc2 = nn.Linear(7 * 4, 9), nn.Linear(9, 4)

    def forward(self, x):
        x = torch.nn.functional.leaky_relu(self.conv1(x), 0.1)
        x = self.norm(self.conv2(x)).relu()
        x = torch.sigmoid(self.conv3(x))
        return self.fc2(torch.tanh(self.fc1(self.flatten(x))))


class PreActivation(nn.Module):
    """A layer that is read by a batch norm and by a shortcut, and a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3)
        self.bn1, self.relu1, self.conv2 = nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.bn2, self.relu2 = nn.BatchNorm2d(6), nn.ReLU6()
        self.pool, self.flatten, self.fc = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)

    def forward(self, x):
        x = self.conv1(x)
        x = x + self.conv2(self.relu1(self.bn1(x)))
        return self.fc(self.flatten(self.pool(self.relu2(self.bn2(x)))))


class Pooled(nn.Module):
    """Pools between layers and their non-linearities: a module that runs twice, and a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu1, self.pool = nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        self.conv2, self.norm, self.relu2 = nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()
        self.conv3, self.relu3, self.flatten, self.fc = nn.Conv2d(6, 7, 1), nn.ReLU(), nn.Flatten(), nn.Linear(7, 4)

    def forward(self, x):
        x = self.relu1(self.pool(self.conv1(x)))
        x = self.relu2(self.pool(self.norm(self.conv2(x))))
        return self.fc(self.flatten(self.relu3(torch.nn.functional.adaptive_avg_pool2d(self.conv3(x), 1))))


class Named(nn.Module):
    """Modules that are called by keyword, and dropout as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm, self.relu1 = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU()
        self.conv2, self.relu2, self.pool, self.fc = (
            nn.Conv2d(5, 6, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Linear(6, 4),
        )

    def forward(self, x):
        x = self.relu1(input=self.norm(input=self.conv1(input=x)))
        x = self.relu2(torch.nn.functional.dropout(self.conv2(input=x), 0.5, self.training))
        return self.fc(self.pool(input=x).flatten(1))


NETWORKS = {
    "mlp": lambda: MLP(3 * 8 * 8, 12, 4),
    "simple": lambda: SimpleConvNet(4),
    "residual": Residual,
    "functional": Functional,
    "pre-activation": PreActivation,
    "pooled": Pooled,
    "named": Named,
}


def make(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = NETWORKS[name]()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                if module.affine:
                    nn.init.normal_(module.weight)
                    nn.init.normal_(module.bias)
    return model.eval()


def images(count: int = 5) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def random_masks(graph: ChannelGraph, seed: int, share: float) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=source) >= share for name, shape in graph.shapes.items()}


# where they stand ----------------------------------------------------------------------------------------------------


def test_places_of_the_benchmarks_networks():
    assert list(ChannelGraph(MLP()).places) == ["fc1", "fc2", "fc3"]
    assert list(ChannelGraph(SimpleConvNet()).places) == ["conv1", "conv2", "conv3", "conv4"]
    resnet = ChannelGraph(ResNet18())
    assert len(resnet.places) == 17
    blocks = ChannelGraph(ResNet18(), where="layer*")
    assert len(blocks.places) == 16
    assert {name: str(place.node.target) for name, place in blocks.places.items()} == {
        f"layer{stage}.{block}.conv{number}": f"layer{stage}.{block}.relu{number}"
        for stage in (1, 2, 3, 4)
        for block in (0, 1)
        for number in (1, 2)
    }
    assert blocks.places["layer1.0.conv2"].silent == ("layer1.0.bn2", "layer1.0.conv2")
    assert not blocks.places["layer1.0.conv2"].is_silenced, "the shortcut enters the sum"
    downsampled = blocks.places["layer2.0.conv2"]
    assert sorted(downsampled.silent) == [
        *("layer2.0.bn2", "layer2.0.conv2"),
        *("layer2.0.downsample.0", "layer2.0.downsample.1"),
    ]
    assert downsampled.is_silenced


def test_a_layer_that_is_read_elsewhere_is_silenced_in_its_norm():
    places = ChannelGraph(make("pre-activation")).places
    assert list(places) == ["conv1", "conv2"]
    assert places["conv1"].silent == ("bn1",)
    assert places["conv1"].is_silenced
    assert places["conv2"].silent[0] == "bn2"


def test_gates_behind_functions_and_modules_that_run_twice():
    model = make("residual")
    graph = ChannelGraph(model)
    assert list(graph.places) == [
        "stem", *(f"{block}.conv{number}" for block in ("plain", "wide", "last") for number in (1, 2))
    ]  # fmt: skip
    explicit, sites = graph.explicit()
    assert isinstance(explicit, fx.GraphModule)
    assert len(set(sites.values())) == 7
    assert torch.equal(explicit(images()), model(images()))
    assert not explicit.training
    plain = make("mlp")
    assert ChannelGraph(plain).explicit()[0] is plain


@pytest.mark.parametrize(
    ("where", "expected"), [("wide.*", ["wide.conv1", "wide.conv2"]), ("*.conv1, stem", ["stem", "plain.conv1"])]
)
def test_patterns_choose(where, expected):
    assert list(ChannelGraph(make("residual"), where).places)[:2] == expected


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Flatten(), nn.Linear(192, 12), nn.MaxPool1d(2), nn.ReLU(), nn.Linear(6, 4)),
        (nn.Flatten(), nn.Linear(192, 12), nn.MaxPool1d(3, 1, 1), nn.ReLU(), nn.Linear(12, 4)),
        (nn.Conv2d(3, 6, 3), nn.MaxPool3d((3, 1, 1), 1, (1, 0, 0)), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4)),
    ],
    ids=["maxout", "neighbours", "planes"],
)
def test_a_pool_over_channels_is_none_of_each(layers):
    with pytest.raises(ValueError, match="no channel can be gated"):
        ChannelGraph(nn.Sequential(*layers))


class Tokens(nn.Module):
    """The layer behind the convolution mixes positions, or their means over channels."""

    def __init__(self, mean: bool) -> None:
        super().__init__()
        self.conv, self.relu, self.mean = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), mean
        self.mix, self.fc = nn.Linear(64, 16), nn.Linear(16, 4)

    def forward(self, x):
        x = self.relu(self.conv(x)).flatten(2)
        x = self.mix(x.mean(1) if self.mean else x)
        return self.fc(x if self.mean else x.mean(1))


@pytest.mark.parametrize("mean", [False, True])
def test_weights_that_read_positions_are_not_gone(mean):
    graph = ChannelGraph(Tokens(mean).eval())
    mask = torch.arange(8) < 2
    weights = sum(layer.weight.numel() for layer in (graph.model.conv, graph.model.mix, graph.model.fc))
    assert share_gone(graph, {"conv": mask}) == 6 * 27 / weights


# pruned networks -----------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(name=st.sampled_from(sorted(NETWORKS)), seed=st.integers(0, 99), share=st.sampled_from([0.0, 0.3, 0.7, 1.0]))
def test_the_pruned_network_computes_what_the_gated_one_does(name, seed, share):
    model = make(name)
    before = copy.deepcopy(model.state_dict())
    masks = random_masks(ChannelGraph(model), seed, share)
    gated = mask_model(copy.deepcopy(model), "hard", "channel")
    layers = masked_layers(gated)
    for layer, mask in zip(layers.values(), masks.values(), strict=True):
        layer.scores.data = torch.where(mask, 0.5, -0.5)
    pruned = ChannelGraph(copy.deepcopy(model)).prune(masks)
    x = images()
    torch.testing.assert_close(pruned(x), gated(x), rtol=1e-5, atol=1e-6)
    assert not any(isinstance(part, GatedActivation) for part in pruned.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["mlp", "simple", "pre-activation", "pooled", "named"])
def test_zeros_suffice_where_nothing_else_enters(name):
    model = make(name)
    graph = ChannelGraph(model)
    masks = random_masks(graph, 3, 0.5)
    if name == "pre-activation":
        masks = {**masks, "conv2": torch.ones(6, dtype=torch.bool)}
    pruned = graph.prune(masks)
    assert pruned is model
    assert not any(isinstance(part, ChannelMask) for part in pruned.modules())
    for place, mask in ((graph.places[layer], mask) for layer, mask in masks.items()):
        for module in place.silent:
            part = model.get_submodule(module)
            assert not part.weight[~mask].any()
            assert part.bias is None or not part.bias[~mask].any()


def test_what_a_shortcut_brings_is_masked_behind_the_non_linearity():
    pruned = ChannelGraph(make("residual"))
    masks = random_masks(pruned, 0, 0.0)
    masks["plain.conv2"][2] = False
    model = pruned.prune(masks)
    (mask,) = (part for part in model.modules() if isinstance(part, ChannelMask))
    assert mask.mask.flatten().tolist() == [1, 1, 0, 1, 1, 1]


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_weights_are_gone_where_no_output_depends_on_them(name):
    """Brute force: a weight is gone where no change of it changes the logits by more than a constant."""
    model = make(name).double()
    graph = ChannelGraph(copy.deepcopy(model))
    masks = random_masks(graph, 1, 0.5)
    counted = share_gone(graph, masks)
    pruned = ChannelGraph(copy.deepcopy(model)).prune(masks)
    for part in pruned.modules():  # every unit active, and no kept weight zero by chance
        for child in [child for child, module in part.named_children() if "ReLU" in type(module).__name__]:
            setattr(part, child, nn.Identity())
    x = images(8).double()
    layers = [part for part in pruned.modules() if type(part) in (nn.Conv2d, nn.Linear)]
    alive = 0
    for layer in layers:
        (gradient,) = torch.autograd.grad(pruned(x).square().sum(), layer.weight, materialize_grads=True)
        alive += int((gradient.abs() * layer.weight.ne(0) > 0).sum())
    total = sum(layer.weight.numel() for layer in layers)
    assert counted <= 1 - alive / total + 1e-12
    assert 0.2 < counted < 1
    if name in ("mlp", "simple"):
        assert counted == pytest.approx(1 - alive / total)


def test_no_pruning_no_weights_gone():
    for name in NETWORKS:
        graph = ChannelGraph(make(name))
        assert share_gone(graph, random_masks(graph, 0, 0.0)) == 0


# masked models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
def test_masked_models(gate):
    model = mask_model(make("simple"), gate, "channel", seed=3)
    layers = masked_layers(model)
    assert {name: tuple(layer.scores.shape) for name, layer in layers.items()} == {
        "relu1": (16,), "relu2": (32,), "relu3": (64,), "tanh": (128,)
    }  # fmt: skip
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [f"{name}.scores" for name in layers]
    set_temperature(model, 0.5)
    draw_gates(model)
    model(images()).square().sum().backward()
    assert all(layer.scores.grad.any() for layer in layers.values())
    layers["relu1"].scores.data[3] = -1
    dense = layers["relu1"].to_dense()
    assert not dense(torch.ones(2, 16, 3, 3))[:, 3].any()
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images()), model(images()))


def test_patterns_of_masked_models():
    model = mask_model(make("mlp"), granularity="channel", include="fc[12]")
    assert list(masked_layers(model)) == ["relu1", "relu2"]


# bad input -----------------------------------------------------------------------------------------------------------


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(x).relu() if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ChannelGraph(Untraceable()), r"torch.fx cannot trace Untraceable: .*granularity='weight'"),
        (lambda: ChannelGraph(torch.compile(MLP())), r"cannot trace OptimizedModule: .*; hand in model\._orig_mod"),
        (lambda: ChannelGraph(nn.DataParallel(MLP())), r"cannot trace DataParallel: .*; hand in model\.module"),
        (lambda: ChannelGraph(nn.Sequential(nn.Linear(3, 3))), "no channel can be gated: in Sequential no output"),
        (lambda: ChannelGraph(MLP(), "conv*"), "where: 'conv\\*' matches none .*: fc1, fc2, fc3"),
        (lambda: ChannelGraph(MLP()).prune({"fc1": torch.ones(3).bool()}), "masks do not fit .* expected {'fc1'"),
        (lambda: ChannelGraph(MLP()).check_bottleneck("fc3"), "'fc3' lies before the gate .* behind 'relu3'"),
        (lambda: ChannelGraph(Residual()).check_bottleneck("last"), "bottleneck 'last' is a container"),
        (lambda: mask_model(mask_model(MLP()), granularity="channel"), "masked already: 'fc1'"),
        (lambda: mask_model(MLP(), granularity="channel", include="conv1"), "'conv1' matches none"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_gated_activation_tells_its_gate_when_printed():
    assert "GatedActivation(\n  gate='hard'\n  (activation): ReLU()\n)" in repr(
        GatedActivation(nn.ReLU(), (4,), "hard")
    )
