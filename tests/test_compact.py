import copy
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from ffw_fast.channels import ChannelGraph
from ffw_fast.compact import compact, load_compacted
from ffw_fast.constant_inputs import constant_inputs
from ffw_fast.models import MLP, ResNet18, SimpleConvNet
from ffw_fast.models.resnet import BasicBlock

pytest.importorskip("torch_pruning", reason="the extra 'compact' is not installed")


def seeded(build, seed=0):
    """A network in eval mode and double precision whose batch norms have statistics and affine maps of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for value in (module.running_mean, module.weight, module.bias):
                    nn.init.normal_(value)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.double().eval()


def residual_network():
    pool = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12 * 4, 4)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), BasicBlock(8, 8, 1), BasicBlock(8, 12, 2), *pool)


def depthwise_network():
    def block(inside, outside, stride):
        depthwise = nn.Conv2d(inside, inside, 3, stride, 1, groups=inside, bias=False)
        return [depthwise, nn.BatchNorm2d(inside), nn.ReLU6(), nn.Conv2d(inside, outside, 1), nn.Hardswish()]

    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(16, 4)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), *block(8, 12, 2), *block(12, 16, 1), *head)


def grouped_network():
    grouped = nn.Conv2d(12, 12, 3, padding=1, groups=3)
    convolutions = [nn.Conv2d(3, 12, 3), nn.Tanh(), grouped, nn.GELU(), nn.Conv2d(12, 8, 3), nn.LeakyReLU()]
    return nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 4, 10), nn.ELU(), nn.Linear(10, 4))


class Concatenating(nn.Module):
    """Two branches of different width side by side, a third one that scales them, and reflected borders."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(3, 7, 5, padding=2, padding_mode="reflect")
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.mix, self.fc = nn.Conv2d(12, 6, 3, padding="same"), nn.Linear(6, 4)

    def forward(self, x):
        x = torch.cat([self.left(x).sigmoid(), self.right(x).relu()], 1)
        x = x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.fc(self.mix(x).relu().amax((2, 3)))


class Block(nn.Module):
    """A transformer's block: layer norm, attention, GELU."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm1, self.norm2 = nn.Linear(8, 12), nn.LayerNorm(12), nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.fc1, self.fc2, self.head = nn.Linear(12, 24), nn.Linear(24, 12), nn.Linear(12, 4)

    def forward(self, x):
        x = self.embed(x.flatten(2))
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))
        return self.head(x.mean(1))


NETWORKS = {
    "MLP": (lambda: MLP(48, 12, 4), (3, 4, 4)),
    "SimpleConvNet": (SimpleConvNet, (3, 8, 8)),
    "residual": (residual_network, (3, 8, 8)),
    "depthwise": (depthwise_network, (3, 9, 9)),
    "grouped": (grouped_network, (3, 8, 8)),
    "concatenating": (Concatenating, (3, 8, 8)),
    "transformer block": (Block, (5, 2, 4)),
}


@torch.no_grad()
def prune(model, seed, channels, weights):
    """Zeros at random: whole output channels with or without their bias and batch norm, then single weights."""
    source = torch.Generator().manual_seed(seed)

    def some(shape, share):
        return torch.rand(shape, generator=source) < share

    modules = [module for module in model.modules() if hasattr(module, "weight")]
    for module, follower in zip(modules, [*modules[1:], None], strict=True):
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        dead = some(len(module.weight), channels)
        module.weight[dead] = 0
        module.weight[some(module.weight.shape, weights)] = 0
        if some((), 0.5) and module.bias is not None:
            module.bias[dead] = 0
        if some((), 0.5) and isinstance(follower, nn.BatchNorm2d) and len(follower.weight) == len(dead):
            follower.weight[dead] = 0
            follower.bias[dead] = 0
    return model


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def assert_same(ours, theirs, x, relative=1e-9):
    with torch.no_grad():
        given, expected = ours(x), theirs(x)
    torch.testing.assert_close(given, expected, rtol=0, atol=relative * float(expected.abs().max()) + 1e-12)


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=12)
@given(
    seed=st.integers(0, 10**6),
    channels=st.sampled_from([0.0, 0.2, 0.5, 0.9]),
    weights=st.sampled_from([0.0, 0.5, 0.9]),
)
def test_outputs_stay_whatever_is_pruned(name, seed, channels, weights):
    build, shape = NETWORKS[name]
    model = prune(seeded(build, seed), seed, channels, weights)
    x = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = compact(model, x[:1])
    assert_same(small, model, x)
    assert_same(small, model, 10 * x)
    assert parameters(small) <= parameters(model) + sum(len(m.weight) for m in model.modules() if type(m) is nn.Conv2d)
    again = load_compacted(seeded(build, seed + 1), small.state_dict())
    assert_same(again, small, x, relative=0)
    assert str(again) == str(small)


def test_where_nothing_is_cut_nothing_is_added():
    """Constants would go into the bias of a layer that has none, and its groups keep their channels."""
    grouped = nn.Conv2d(8, 8, 1, groups=2, bias=False)
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), grouped, nn.Flatten(), nn.Linear(32, 4)))
    with torch.no_grad():
        model[0].weight[:2] = 0
    with pytest.warns(UserWarning, match="is a grouped convolution"):
        small = compact(model, torch.randn(2, 3, 2, 2, dtype=torch.float64))
    assert small is not model and small[1].bias is None and torch.equal(small[1].weight, grouped.weight)


def test_instance_norms_are_read_back():
    def build():
        norm = nn.InstanceNorm2d(8, affine=True)
        return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 4))

    model = seeded(build)
    model[3].weight.data[:, :3] = 0
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    small = compact(model, x)
    assert small[1].num_features == 5
    assert_same(load_compacted(seeded(build, 1), small.state_dict()), model, x)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), weights=st.sampled_from([0.5, 0.8, 0.9, 0.97]))
def test_an_mlp_keeps_only_units_that_vary_and_are_read(seed, weights):
    model = prune(seeded(lambda: MLP(48, 12, 4), seed), seed, 0.1, weights)
    layers = [model.fc1, model.fc2, model.fc3, model.classifier]
    varies = [torch.ones(48, dtype=torch.bool)]
    for layer in layers[:-1]:
        varies.append((layer.weight[:, varies[-1]] != 0).any(1))
    read = torch.ones(4, dtype=torch.bool)
    widths = []
    for layer, inputs in zip(reversed(layers), reversed(varies), strict=True):
        read = (layer.weight[read] != 0).any(0) & inputs
        widths.insert(0, max(1, int(read.sum())))
    small = compact(model, torch.randn(2, 3, 4, 4, dtype=torch.float64))
    # A ReLU that is never open is not told from one that may open, so units may only be fewer than varying ones.
    assert [layer.in_features for layer in (small.fc2, small.fc3, small.classifier)] == widths[1:]
    assert small.fc1.in_features == 48


def constant_channels(**conv):
    """A convolution with two constant channels other than 0, two that are 0, two that vary, and one that reads them."""
    model = seeded(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Sigmoid(), nn.Conv2d(6, 5, 3, **conv)))
    with torch.no_grad():
        model[0].weight[:4] = 0
        model[0].bias[2:4] = -1e4  # the sigmoid is exactly 0
    return model


@pytest.mark.parametrize(
    ("conv", "kept"),
    [
        ({}, 2),
        ({"padding": 1, "padding_mode": "reflect"}, 2),
        ({"padding": 1, "padding_mode": "circular"}, 2),
        ({"padding": 1}, 3),  # one constant channel stays for both: at the borders it is no bias
        ({"padding": "same"}, 3),
        ({"padding": (0, 2), "bias": False}, 3),
        ({"bias": False}, 2),
    ],
)
def test_a_constant_goes_into_the_bias_except_where_zeros_are_padded(conv, kept):
    model = constant_channels(**conv)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    small = compact(model, x)
    assert small[0].out_channels == small[2].in_channels == kept
    assert_same(small, model, x)


def test_a_whole_residual_network_in_single_precision():
    model = prune(seeded(lambda: ResNet18(10)), 1, channels=0.3, weights=0.2)
    x = torch.randn(2, 3, 32, 32)
    small = compact(model.float(), x)
    assert {parameter.dtype for parameter in small.parameters()} == {torch.float32}
    assert parameters(small) < 0.75 * parameters(model)
    exact = copy.deepcopy(model).double()(x.double())
    scale = exact.abs().max()
    ours, theirs = ((network(x) - exact).abs().max() / scale for network in (small, model))
    assert ours <= 2 * theirs + 1e-6


def test_the_model_stays_as_it_is():
    model = prune(seeded(lambda: MLP(48, 12, 4)), 0, 0.5, 0.5).train()
    model.fc1.bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    small = compact(model, torch.randn(2, 3, 4, 4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and not small.training
    assert not small.fc1.bias.requires_grad and small.fc1.weight.requires_grad


def test_batch_norms_that_are_zero_silence_their_channels():
    """As channel gates leave them: the convolution's weights need not be zero."""
    model = seeded(SimpleConvNet)
    with torch.no_grad():
        model.bn2.weight[:20] = 0
        model.bn2.bias[:20] = 0
    small = compact(model, torch.randn(2, 3, 8, 8))
    assert (small.conv2.out_channels, small.bn2.num_features, small.conv3.in_channels) == (12, 12, 12)


def test_channels_that_a_mask_closes_behind_a_residual_sum_go():
    model = seeded(residual_network)
    graph = ChannelGraph(copy.deepcopy(model))
    assert list(graph.shapes) == ["0", "2.conv1", "2.conv2", "3.conv1", "3.conv2"]
    masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in graph.shapes.items()}
    masks["0"][:3] = masks["2.conv2"][:2] = masks["3.conv2"][:4] = False
    pruned = graph.prune(masks).eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    small = compact(pruned, x)
    assert_same(small, pruned, x)
    convolutions = [module for module in small.modules() if isinstance(module, nn.Conv2d)]
    assert convolutions[0].out_channels == 6  # of the three that the first mask closes the block fills one again
    assert [module.out_features for module in small.modules() if isinstance(module, nn.Linear)] == [4]
    assert [module.in_features for module in small.modules() if isinstance(module, nn.Linear)] == [8 * 4]


class SqueezeAndExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.squeeze, self.excite = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.last, self.fc = nn.Conv2d(16, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.conv(x))
        factor = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.fc(torch.relu(self.last(x * factor)).mean((2, 3)))


def test_a_channel_that_is_zero_stays_so_through_a_product():
    model = seeded(SqueezeAndExcite)
    with torch.no_grad():
        model.conv.weight[:12] = model.conv.bias[:12] = 0
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    small = compact(model, x)
    assert (small.conv.out_channels, small.excite.out_channels, small.last.in_channels) == (4, 4, 4)
    torch.testing.assert_close(small(x), model(x))


def test_a_branch_that_nobody_reads_keeps_one_channel_that_reads_nothing():
    model = seeded(lambda: MLP(48, 12, 4))
    with torch.no_grad():
        model.classifier.weight.zero_()
    small = compact(model, torch.randn(2, 3, 4, 4))
    assert [layer.out_features for layer in (small.fc1, small.fc2, small.fc3)] == [1, 1, 1]
    assert not small.fc1.weight.any()


# what cannot be compacted stays, and is named -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "shape", "layer", "why"),
    [
        (grouped_network, (3, 8, 8), "layer '0'", r"'2' \(Conv2d\) is a grouped convolution"),
        (Block, (5, 2, 4), "layer 'embed'", r"reads all its channels together"),
    ],
)
def test_a_layer_that_stays_dense_is_named(build, shape, layer, why):
    model = seeded(build)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight[:, 0] = 0
        if isinstance(model, Block):
            model.attention.in_proj_weight[:, 0] = 0
    x = torch.randn(2, *shape, dtype=torch.float64)
    with pytest.warns(UserWarning, match=rf"compact: {layer} kept dense: .*{why}"):
        small = compact(model, x)
    assert_same(small, model, x)


@pytest.mark.parametrize(
    "computed",
    [lambda layer: torch_prune.custom_from_mask(layer, "weight", layer.weight != 0), parametrizations.weight_norm],
    ids=["pruned by PyTorch", "parametrized"],
)
def test_layers_that_compute_their_weight_are_named(computed):
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 4)))
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[2].weight[:, 3:5] = 0
    computed(model[2])
    x = torch.randn(2, 6, dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"layer '0' kept dense: of '2' .* the weight is computed: make it permanent"):
        small = compact(model, x)
    assert_same(small, model, x)


class MeanOverChannels(nn.Module):
    """What divides by the number of channels, which no dependency graph tells."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, x):
        x = self.conv(x).mean((2, 3))
        return self.fc(x) + x.mean(1, keepdim=True)


class Thresholding(nn.Module):
    """A comparison swallows NaN, so that its outcome looks constant."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc2((self.fc1(x) > 0).to(x.dtype))


class ReadTwice(nn.Module):
    """A weight that the module's own code reads beside the layer's forward."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc2(self.fc1(x).relu()) + self.fc2.weight.sum()


def test_a_channel_that_an_output_depends_on_in_another_way_stays():
    model = seeded(MeanOverChannels)
    with torch.no_grad():
        model.fc.weight[:, :3] = 0
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with pytest.warns(UserWarning, match="layer 'conv' kept dense: .* outputs would change"):
        small = compact(model, x)
    assert small.conv.out_channels == 6
    assert_same(small, model, x)


def test_a_weight_that_is_read_elsewhere_stays():
    model = seeded(ReadTwice)
    with torch.no_grad():
        model.fc1.weight[:3] = 0
    x = torch.randn(2, 6, dtype=torch.float64)
    with pytest.warns(UserWarning, match="layer 'fc2' kept dense: its weight is read elsewhere, too"):
        small = compact(model, x)
    assert_same(small, model, x)


def test_what_decides_by_values_is_not_taken_for_constant():
    model = seeded(Thresholding)
    x = torch.randn(8, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"aten\.gt\.Scalar decides by values"):
        constant_inputs(model, x)
    with pytest.warns(UserWarning, match="no constants go into biases, as they cannot be told: .* decides by values"):
        small = compact(model, x)
    assert_same(small, model, x)


@pytest.mark.parametrize(
    ("example", "error", "message"),
    [
        (torch.zeros(2, 3, 4, 4, dtype=torch.int64), TypeError, "must be a floating-point tensor, got torch.int64"),
        ([1.0], TypeError, "must be a floating-point tensor, got list"),
        (torch.zeros(0, 3, 4, 4), ValueError, r"at least one sample, got shape \(0, 3, 4, 4\)"),
        (torch.zeros(2, 3, 5, 5), ValueError, "fails on the example"),
        (torch.full((2, 3, 4, 4), torch.inf), ValueError, "outputs on the example are not finite"),
    ],
)
def test_bad_examples(example, error, message):
    with pytest.raises(error, match=message):
        compact(seeded(lambda: MLP(48, 12, 4)), example)


def test_without_torch_pruning(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"pip install 'ffw_fast\[compact\]'"):
        compact(MLP(48, 12, 4), torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("fc2.weight"), "differ in fc2.weight"),
        (lambda state: state.update(other=torch.zeros(1)), "differ in other"),
        (lambda state: state.update({"fc1.weight": torch.zeros(3)}), r"'fc1.weight' has shape \(3,\), expected 2"),
    ],
)
def test_a_state_dict_of_another_network_is_refused(change, message):
    model = MLP(48, 12, 4)
    state = dict(model.state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        load_compacted(MLP(48, 12, 4), state)
