"""``mask_model`` on whole networks: what it masks, and what it refuses."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from ffw_fast.masking import mask_model
from ffw_fast.modules import MaskedLinear, masked_layers
from tests.small_gates import with_random_scores

RANDOM = ("bernoulli", "concrete")


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
        self.heads = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})

    def forward(self, x):
        pooled = (x + self.body(x)).mean((2, 3))
        return self.heads["a"](pooled) + self.heads["b"](pooled)


def test_nested_model_is_masked_in_place_and_frozen():
    model = Residual().eval()
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    assert mask_model(model) is model
    assert list(masked_layers(model)) == ["body.0", "heads.a", "heads.b"]
    assert torch.equal(model(x), expected)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable == ["body.0.scores", "heads.a.scores", "heads.b.scores"]
    for layer in masked_layers(model).values():
        with_random_scores(layer)
    assert not torch.allclose(model(x), expected)


@pytest.mark.parametrize(
    ("include", "names"),
    [
        ("heads.*", ["heads.a", "heads.b"]),
        (["body.?", "*.b"], ["body.0", "heads.b"]),
        (lambda name: name.endswith("a"), ["heads.a"]),
    ],
)
def test_layers_are_chosen_by_name(include, names):
    model = mask_model(Residual(), include=include)
    assert list(masked_layers(model)) == names
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "scores" not in name)


def test_a_layer_under_two_names_stays_one_layer():
    shared = nn.Linear(3, 3)
    model = mask_model(nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}))
    assert model["a"] is model["b"][0]
    assert list(masked_layers(model)) == ["a"]


def test_a_model_that_is_one_layer_is_replaced():
    dense = nn.Linear(3, 2)
    masked = mask_model(dense, "hard")
    assert type(masked) is MaskedLinear
    assert list(masked_layers(masked)) == [""]
    assert torch.equal(masked.weight, dense.weight)


def test_masking_the_rest_keeps_what_is_masked():
    model = mask_model(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), "bernoulli", include="0", seed=4)
    first = model[0]
    mask_model(model, "concrete", seed=4)
    assert model[0] is first
    assert first.scores.requires_grad
    assert [layer.gate for layer in model] == ["bernoulli", "concrete"]
    assert model[0].draw[2] != model[1].draw[2]  # or both layers would draw the same uniform numbers
    with pytest.raises(ValueError, match="no Conv or Linear layer that is not masked already"):
        mask_model(model)


@pytest.mark.parametrize("gate", RANDOM)
def test_layers_draw_numbers_of_their_own_from_the_seed(gate):
    def weights(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(*(nn.Linear(9, 9) for _ in range(2)))
        model = mask_model(model, gate, seed=seed).eval()
        return [layer.gated_weight() != 0 for layer in model]

    state = torch.get_rng_state()
    once, again, other = weights(1), weights(1), weights(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, once, again))
    assert not any(map(torch.equal, once, other))
    assert not torch.equal(*once)


def test_attention_projections_are_left_dense():
    attention = mask_model(nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)))
    assert list(masked_layers(attention)) == ["1"]
    with pytest.raises(ValueError, match="nothing to mask: MultiheadAttention has no Conv or Linear layer"):
        mask_model(nn.MultiheadAttention(8, 2))


def test_transformers_in_eval_mode_use_their_gates():
    """PyTorch's fused path reads the weights past the layers; it must not be taken."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    dense = nn.TransformerEncoder(layer, 2).eval()
    model = mask_model(copy.deepcopy(dense), "hard")
    assert list(masked_layers(model)) == [f"layers.{index}.linear{number}" for index in (0, 1) for number in (1, 2)]
    for name, masked in masked_layers(model).items():
        with_random_scores(masked)
        dense.get_submodule(name).weight.data = masked.to_dense().weight.data
    x = torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for arguments in ({}, {"src_key_padding_mask": padding}):
        with torch.no_grad():
            given = model(x, **arguments)
        expected = dense.train()(x, **arguments)  # without dropout the same function, by the ordinary path
        for result in (given, model(x, **arguments)):
            torch.testing.assert_close(result[0], expected[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(result[1, :3], expected[1, :3], rtol=1e-4, atol=1e-5)
        model(x, **arguments).square()[0, :3].sum().backward()
    assert all(layer.scores.grad.any() for layer in masked_layers(model).values())


def tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    return model


def with_first(layer):
    return nn.Sequential(layer, nn.Linear(3, 3))


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


def with_parametrized_bias(layer):
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    return layer


def with_integer_weight():
    layer = nn.Linear(3, 3)
    layer.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    return layer


def with_another_forward():
    layer = nn.Linear(3, 3)
    layer.forward = lambda x: x
    return layer


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(nn.Sequential(nn.Linear(3, 3)))


def exported():
    return torch.export.export(nn.Sequential(nn.Linear(3, 3)), (torch.randn(2, 3),)).module()


class ReadingWeights(nn.Module):
    """Reads one layer's weight past the layer, another one's dtype alone, and draws and counts as it runs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x):
        self.runs += torch.rand(())
        self.kept = nn.functional.linear(x.to(self.second.weight.dtype), self.first.weight, self.first.bias)
        return self.second(self.kept)


COMPUTED = "of layer '0' is computed by a parametrization"
LAZY = "'0.weight' is not initialised yet"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (tied, ValueError, "layers '0' and '2' share one weight"),
        (lambda: with_first(parametrizations.weight_norm(nn.Linear(3, 3))), ValueError, COMPUTED),
        (lambda: with_first(parametrizations.spectral_norm(nn.Linear(3, 3))), ValueError, COMPUTED),
        (lambda: with_first(old_weight_norm(nn.Linear(3, 3))), ValueError, COMPUTED),
        (lambda: with_first(nn.utils.spectral_norm(nn.Linear(3, 3))), ValueError, COMPUTED),
        (lambda: with_first(prune.l1_unstructured(nn.Linear(3, 3), "weight", 2)), ValueError, COMPUTED),
        (lambda: with_first(with_parametrized_bias(nn.Linear(3, 3))), ValueError, COMPUTED),
        (lambda: with_first(with_another_forward()), ValueError, "forward method of layer '0' was replaced"),
        (ReadingWeights, ValueError, "the weight of layer 'first' is read past the layer's own forward method"),
        (lambda: with_first(nn.LazyLinear(3)), ValueError, LAZY),
        (lambda: nn.Sequential(nn.LazyConv2d(3, 3)), ValueError, LAZY),
        (lambda: with_first(nn.LazyBatchNorm1d()), ValueError, LAZY),
        (lambda: with_first(nn.Linear(3, 3, dtype=torch.complex64)), TypeError, "layer '0' is torch.complex64; only"),
        (lambda: with_first(with_integer_weight()), TypeError, "layer '0' is torch.int8; only float64"),
        (scripted, ValueError, "RecursiveScriptModule has no .* layer, as it was scripted, .*: hand in the model"),
        (exported, ValueError, "GraphModule has no .* layer, as it was .* exported: hand in the model"),
        (nn.ReLU, ValueError, "nothing to mask: ReLU has no Conv or Linear layer$"),
        (lambda: "model", TypeError, r"must be a torch\.nn\.Module, got str"),
    ],
)
def test_what_cannot_be_masked_is_refused_and_left_alone(make, error, message):
    model = make()
    flags = [p.requires_grad for p in model.parameters()] if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=message):
        mask_model(model)
    if isinstance(model, nn.Module):
        assert [p.requires_grad for p in model.parameters()] == flags
        assert not masked_layers(model)


def test_layers_are_masked_beside_one_that_is_read_past_its_forward():
    model, state = ReadingWeights(), torch.random.get_rng_state()
    assert list(masked_layers(mask_model(model, include="second"))) == ["second"]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.runs == 0 and not hasattr(model, "kept")
    with pytest.raises(ValueError, match="'first' is read past"):
        mask_model(model)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"gate": "soft"}, ValueError, "unknown gate 'soft'; known gates: ffw, hard, bernoulli, concrete"),
        ({"granularity": "row"}, ValueError, "unknown granularity 'row'; known granularities: weight"),
        ({"include": ("0", "fc*")}, ValueError, r"'fc\*' matches none of the Conv and Linear layers: 0, 1"),
        ({"include": lambda name: False}, ValueError, "no Conv or Linear layer of the given names"),
        ({"include": 3}, TypeError, "include must be a predicate or patterns of names, got int"),
        ({"seed": -1}, ValueError, "seed must be a whole number from 0"),
        ({"seed": 2**63}, ValueError, "seed must be a whole number from 0"),
        ({"seed": 1.0}, ValueError, "seed must be a whole number from 0"),
    ],
)
def test_bad_arguments_leave_the_model_alone(arguments, error, message):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with pytest.raises(error, match=message):
        mask_model(model, **arguments)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not masked_layers(model)
