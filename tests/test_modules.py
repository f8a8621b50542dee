"""Masked layers as drop-ins for dense ones."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from ffw_fast import philox
from ffw_fast.gates import GATES, GateKind
from ffw_fast.masking import mask_model
from ffw_fast.modules import (
    MASKED_CLASSES,
    MaskedConv1d,
    MaskedConv2d,
    MaskedConv3d,
    MaskedLinear,
    draw_gates,
    masked_layers,
    set_temperature,
)
from tests.small_gates import with_random_scores

RANDOM = ("bernoulli", "concrete")
CONVS = {1: (nn.Conv1d, MaskedConv1d), 2: (nn.Conv2d, MaskedConv2d), 3: (nn.Conv3d, MaskedConv3d)}
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def straight_through(layer) -> torch.Tensor:
    """The layer's gates by the definition, differentiable by its scores."""
    scores, temperature = layer.scores, layer.temperature.double()
    uniform = philox.uniform(scores.numel(), layer.draw).view(scores.shape).double()
    s = torch.sigmoid(scores / temperature)
    noisy = scores + torch.logit(uniform)
    value, slope = {
        "ffw": ((2 * s).clamp_max(1), 2 * s),
        "hard": ((scores >= 0).double(), s),
        "bernoulli": ((uniform < s).double(), s),
        "concrete": ((noisy >= 0).double(), torch.sigmoid(noisy / temperature)),
    }[layer.gate]
    return slope + (value - slope).detach()


def assert_is_dense_layer_with_gated_weight(dense, masked, x) -> None:
    """Outputs and gradients, in double precision, of the masked layer and of the dense one given ``weight * gate``."""
    masked.load_state_dict(dense.state_dict(), strict=False)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    given = masked(ours)
    expected = functional_call(dense, {"weight": masked.weight * straight_through(masked)}, (theirs,))
    cotangent = torch.randn(given.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad(given, (ours, masked.scores), cotangent)
    references = torch.autograd.grad(expected, (theirs, masked.scores), cotangent)
    for result, reference in zip((given, *gradients), (expected, *references), strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-9, atol=1e-10)


@st.composite
def convolutions(draw):
    """Dimensions, and arguments of a convolution, all of them by position."""
    dims = draw(st.sampled_from((1, 2, 2, 2, 3)))
    groups = draw(st.integers(1, 3))
    in_channels = groups * draw(st.integers(1, 2))
    out_channels = groups * draw(st.integers(1, 2))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    padding = draw(st.sampled_from((0, 1, 2, "same", "valid")))
    stride = 1 if padding == "same" else draw(st.integers(1, 2))
    mode = draw(st.sampled_from(PADDING_MODES))
    rest = (stride, padding, draw(st.integers(1, 2)), groups, draw(st.booleans()), mode)
    return dims, (in_channels, out_channels, kernel, *rest)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@given(convolutions(), st.sampled_from(GATES), st.sampled_from((0.2, 1.0, 30.0)), st.booleans())
def test_convolution_takes_every_argument_of_the_dense_one(convolution, gate, temperature, training):
    dims, arguments = convolution
    dense_class, masked_class = CONVS[dims]
    dense = dense_class(*arguments, dtype=torch.float64)
    masked = with_random_scores(masked_class(*arguments, gate=gate, dtype=torch.float64)).train(training)
    assert repr(masked) == repr(dense).replace(dense_class.__name__, masked_class.__name__)[:-1] + f", gate='{gate}')"
    set_temperature(masked, temperature)
    x = torch.randn(2, arguments[0], *[7] * dims, dtype=torch.float64)
    assert_is_dense_layer_with_gated_weight(dense, masked, x)


@given(
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.booleans()),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(GATES),
    st.booleans(),
)
def test_linear_takes_every_argument_of_the_dense_one(arguments, batch, gate, training):
    dense = nn.Linear(*arguments, dtype=torch.float64)
    masked = with_random_scores(MaskedLinear(*arguments, gate=gate, dtype=torch.float64)).train(training)
    x = torch.randn(*batch, arguments[0], dtype=torch.float64)
    assert_is_dense_layer_with_gated_weight(dense, masked, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate", ["ffw", "hard"])
def test_open_gates_change_no_bit(gate, dtype):
    for dense, x in ((nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)), (nn.Linear(6, 5), torch.randn(4, 6))):
        dense, x = dense.to(dtype), x.to(dtype)
        masked = MASKED_CLASSES[type(dense)].from_dense(dense, gate)
        assert torch.equal(masked(x), dense(x))


def test_initialisation_is_that_of_the_dense_layer():
    pairs = ((nn.Conv2d, MaskedConv2d, (3, 4, 3)), (nn.Linear, MaskedLinear, (3, 4)))
    for dense_class, masked_class, arguments in pairs:
        torch.manual_seed(5)
        dense = dense_class(*arguments)
        torch.manual_seed(5)
        masked = masked_class(*arguments)
        assert torch.equal(masked.weight, dense.weight)
        assert torch.equal(masked.bias, dense.bias)


def test_meta_device_and_deferred_initialisation():
    layer = MaskedConv2d(3, 4, 3, device="meta", gate="bernoulli")
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    assert layer(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 4, 6, 6)
    source = with_random_scores(MaskedConv2d(3, 4, 3, gate="bernoulli")).eval()
    layer.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(layer.eval()(x), source(x))
    assert [parameter.requires_grad for parameter in (layer.weight, layer.bias, layer.scores)] == [False, False, True]
    empty = MaskedLinear(3, 4, device="meta").to_empty(device="cpu")
    empty.reset_parameters()
    assert empty.temperature == 1
    assert not empty.scores.any()
    assert not empty.draw.any()
    assert 0 < empty.weight.abs().max() <= 1 / 3**0.5


# gradients -----------------------------------------------------------------------------------------------------------


def test_frozen_parameters_get_no_gradient_and_an_unfrozen_weight_the_right_one():
    layer = with_random_scores(MaskedLinear(4, 3, dtype=torch.float64))
    x = torch.randn(5, 4, dtype=torch.float64)
    layer(x).square().sum().backward()
    assert layer.scores.grad is not None
    assert layer.weight.grad is None
    assert layer.bias.grad is None
    layer.weight.requires_grad_(True)
    (given,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    plain = (x @ (layer.weight * straight_through(layer)).T + layer.bias).square().sum()
    (expected,) = torch.autograd.grad(plain, layer.weight)
    torch.testing.assert_close(given, expected)


@pytest.mark.parametrize("gate", RANDOM)
def test_random_gates_are_drawn_anew_in_training_and_kept_in_evaluation(gate):
    layer = MaskedLinear(40, 30, gate=gate)
    first, second = layer.gated_weight(), layer.gated_weight()
    assert not torch.equal(first, second)
    layer.eval()
    assert torch.equal(layer.gated_weight(), layer.gated_weight())
    kept = layer.gated_weight()
    draw_gates(layer)
    assert not torch.equal(kept, layer.gated_weight())
    assert 0.3 < (kept != 0).double().mean() < 0.7


@pytest.mark.parametrize("gate", RANDOM)
def test_each_backward_pass_uses_the_mask_of_its_own_forward_pass(gate):
    layer = with_random_scores(MaskedLinear(6, 5, gate=gate, dtype=torch.float64))
    layer.weight.requires_grad_(True)  # its gradient shows the mask, that of the scores the uniform numbers
    x = torch.randn(3, 6, dtype=torch.float64)
    outputs, references = [], []
    for _ in range(2):
        outputs.append(layer(x).square().sum())
        references.append((x @ (layer.weight * straight_through(layer)).T + layer.bias).square().sum())
    for output, reference in reversed(list(zip(outputs, references, strict=True))):
        given = torch.autograd.grad(output, (layer.scores, layer.weight))
        torch.testing.assert_close(given, torch.autograd.grad(reference, (layer.scores, layer.weight)))


# round trips ---------------------------------------------------------------------------------------------------------


DENSE = [
    lambda: nn.Conv1d(4, 6, 3, groups=2),
    lambda: nn.Conv2d(3, 4, (3, 2), stride=2, padding="valid", padding_mode="reflect", bias=False),
    lambda: nn.Conv2d(4, 4, 3, padding="same", groups=4).to(memory_format=torch.channels_last),
    lambda: nn.Conv3d(2, 3, 2, dilation=2).double(),
    lambda: nn.Linear(5, 3, bias=False),
    lambda: nn.Linear(5, 3, dtype=torch.bfloat16),
]


@pytest.mark.parametrize("make", DENSE)
def test_dense_round_trip_is_exact(make):
    dense = make().eval()
    calls = []
    dense.register_forward_hook(lambda *_arguments: calls.append("hook"))
    dense.note = "kept"
    masked = MASKED_CLASSES[type(dense)].from_dense(dense, "hard")
    assert masked.weight.data_ptr() == dense.weight.data_ptr()
    assert not masked.training
    back = masked.to_dense()
    assert type(back) is type(dense)
    assert vars(back).keys() == vars(dense).keys()
    assert repr(back) == repr(dense)
    assert back.state_dict().keys() == dense.state_dict().keys()
    for name, value in dense.state_dict().items():
        given = back.state_dict()[name]
        assert torch.equal(given, value)
        assert given.dtype == value.dtype
        assert given.stride() == value.stride()
        assert given.data_ptr() != value.data_ptr()
    spatial = (9,) * (dense.weight.dim() - 2)
    back(torch.randn(2, getattr(dense, "in_channels", 5), *spatial, dtype=dense.weight.dtype))
    assert calls == ["hook"]
    assert (back.note, back.training) == ("kept", False)
    assert dense.weight.requires_grad  # the dense layer is left as it was
    assert back.weight.requires_grad


def test_pruning_keeps_where_the_score_is_at_least_zero():
    layer = MaskedLinear(6, 1)
    with torch.no_grad():
        layer.weight.fill_(2)
        layer.scores.copy_(torch.tensor([[0.0, -0.0, 1e-30, -1e-30, 5.0, -5.0]]))
    assert layer.mask().tolist() == [[True, True, True, False, True, False]]
    assert layer.to_dense().weight.tolist() == [[2, 2, 2, 0, 2, 0]]


def state_round_trip(layer):
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin = MaskedConv2d(3, 4, 3, gate=layer.gate).eval()
    twin.load_state_dict(torch.load(file, weights_only=True))
    return twin


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("copied", [state_round_trip, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_whole_and_independent(copied, gate):
    layer = with_random_scores(MaskedConv2d(3, 4, 3, gate=gate)).eval()
    set_temperature(layer, 0.125)
    draw_gates(layer)
    x = torch.randn(2, 3, 8, 8)
    expected = layer(x)
    twin = copied(layer)
    assert torch.equal(twin(x), expected)
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in layer.parameters()]
    with torch.no_grad():
        twin.scores.fill_(-9)
    twin.temperature.fill_(3)
    draw_gates(twin)
    assert torch.equal(layer(x), expected)


def test_what_layer_compile_has_compiled_is_not_taken_over():
    dense = nn.Linear(4, 3)
    dense.compile(backend="eager")
    masked = MaskedLinear.from_dense(dense, "hard")
    with torch.no_grad():
        masked.scores.fill_(-1)
        assert torch.equal(masked(torch.randn(2, 4)), masked.bias.expand(2, 3))


# dtypes, layouts, autocast -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
@pytest.mark.parametrize("gate", ["ffw", "hard"])
def test_temperature_keeps_its_precision_when_the_layer_is_converted(convert, gate):
    layer = with_random_scores(MaskedLinear(50, 40, gate=gate))
    set_temperature(layer, 1e-8)
    convert(nn.Sequential(layer))
    assert layer.temperature.dtype == torch.float32
    assert layer.temperature.item() == pytest.approx(1e-8)
    assert layer.draw.dtype == torch.int64
    assert layer.scores.dtype == layer.weight.dtype
    assert torch.equal(layer.gated_weight(), torch.where(layer.scores >= 0, layer.weight, 0))


def test_channels_last_is_kept():
    x = torch.randn(2, 3, 8, 8)
    layer = with_random_scores(MaskedConv2d(3, 4, 3, padding=1))
    expected = layer(x)
    layer.to(memory_format=torch.channels_last)
    given = layer(x.to(memory_format=torch.channels_last))
    assert given.is_contiguous(memory_format=torch.channels_last)
    assert layer.gated_weight().stride() == layer.weight.stride() == layer.scores.stride()
    torch.testing.assert_close(given, expected)
    given.sum().backward()
    assert layer.scores.grad.stride() == layer.scores.stride()


def test_autocast_runs_the_layer_in_16_bits_and_its_scores_in_32():
    dense = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
    masked = mask_model(copy.deepcopy(dense))
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        given, expected = masked(x), dense(x)
    assert given.dtype == torch.bfloat16
    assert torch.equal(given, expected)
    given.float().square().sum().backward()
    autocast = masked[0].scores.grad.clone()
    masked[0].scores.grad = None
    masked(x).square().sum().backward()
    assert autocast.dtype == torch.float32
    assert not (autocast - masked[0].scores.grad).norm() > 0.05 * autocast.norm()


# compilers and transforms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("training", [True, False])
def test_compile_whole_without_recompiling_for_a_temperature(gate, training):
    torch._dynamo.reset()
    plain = mask_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)), gate)
    plain.train(training)
    for layer in masked_layers(plain).values():
        with_random_scores(layer)
    twin = copy.deepcopy(plain)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin, fullgraph=True, backend=counter)
    for temperature in (1.0, 0.3, 1e-8):
        x = torch.randn(2, 3, 8, 8)
        for model in (plain, twin):
            set_temperature(model, temperature)
            model.zero_grad()
        expected, given = plain(x), compiled(x)
        torch.testing.assert_close(given, expected)
        expected.sum().backward()
        given.sum().backward()
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(twin.get_parameter(name).grad, parameter.grad)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("gate", ["ffw", "bernoulli"])
def test_compile_by_inductor(gate):
    torch._dynamo.reset()
    plain = mask_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)), gate)
    twin = copy.deepcopy(plain)
    x = torch.randn(2, 3, 8, 8)
    expected, given = plain(x), torch.compile(twin, fullgraph=True)(x)
    torch.testing.assert_close(given, expected)
    expected.sum().backward()
    given.sum().backward()
    torch.testing.assert_close(twin[0].scores.grad, plain[0].scores.grad)
    torch._dynamo.reset()


@pytest.mark.parametrize("gate", GATES)
def test_function_transforms(gate):
    layer = with_random_scores(MaskedLinear(4, 3, gate=gate, dtype=torch.float64)).eval()
    x = torch.randn(6, 5, 4, dtype=torch.float64)

    def loss(scores, x):
        return functional_call(layer, {"scores": scores}, (x,)).square().sum()

    layer(x[0]).square().sum().backward()
    torch.testing.assert_close(grad(loss)(layer.scores.detach(), x[0]), layer.scores.grad)
    many = torch.randn(6, 3, 4, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # the operators have no batching rule
        together = vmap(grad(loss))(many, x)
    torch.testing.assert_close(together, torch.stack([grad(loss)(*pair) for pair in zip(many, x, strict=True)]))


@pytest.mark.parametrize("gate", ["ffw", "bernoulli"])
def test_export(gate):
    model = mask_model(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)), gate).eval()
    for layer in masked_layers(model).values():
        with_random_scores(layer)
    example, x = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(torch.export.export(model, (example,)).module()(x), model(x))


class Subclass(nn.Linear):
    pass


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(1, 1, 1), lambda: MaskedLinear(2, 2), lambda: Subclass(2, 2)])
def test_from_dense_takes_its_own_dense_class_only(make):
    layer = make()
    with pytest.raises(TypeError, match=f"MaskedLinear.from_dense needs a Linear, got {type(layer).__name__}"):
        MaskedLinear.from_dense(layer)


def test_from_dense_keeps_what_else_the_layer_holds():
    dense = nn.Linear(3, 3)
    dense.adapter = nn.Linear(3, 3)
    dense.scale = nn.Parameter(torch.ones(2))
    masked = MaskedLinear.from_dense(dense)
    assert masked.adapter is dense.adapter
    assert torch.equal(masked.scale, dense.scale)
    assert "scores" not in dict(dense.named_parameters())
    with pytest.raises(ValueError, match="the weight or bias of the Linear is computed"):
        MaskedLinear.from_dense(nn.utils.spectral_norm(nn.Linear(3, 3)))


def test_constructors_refuse_unknown_gates_and_dtypes():
    with pytest.raises(ValueError, match="unknown gate 'soft'"):
        MaskedConv2d(3, 4, 3, gate="soft")
    with pytest.raises(TypeError, match=r"the weight of MaskedLinear is .*complex64"):
        MaskedLinear(3, 4, dtype=torch.complex64)


# temperature and draws -----------------------------------------------------------------------------------------------


def test_temperature_of_a_model_or_of_one_layer():
    model = mask_model(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    set_temperature(model, 0.5)
    set_temperature(model[1], 1e-30)
    assert [layer.temperature.item() for layer in model] == [0.5, pytest.approx(1e-30)]


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan"), float("inf"), 1e-50, 1e39])
def test_impossible_temperatures_are_refused(temperature):
    layer = MaskedLinear(2, 2)
    with pytest.raises(ValueError, match=r"the temperature must be from 1.18e-38 to 3.4e\+38, got"):
        set_temperature(layer, temperature)
    assert layer.temperature == 1


@pytest.mark.parametrize("exponent", [-30, -8, 0, 30])
@pytest.mark.parametrize("kind", GateKind)
def test_forward_and_backward_are_finite_at_every_temperature(kind, exponent):
    layer = with_random_scores(MaskedLinear(30, 20, gate=kind.name.lower()))
    set_temperature(layer, 10.0**exponent)
    layer(torch.ones(1, 30)).sum().backward()
    assert layer.scores.grad.isfinite().all()


def test_where_nothing_is_masked_there_is_nothing_to_set_or_draw():
    for function, arguments in ((set_temperature, (1.0,)), (draw_gates, ())):
        with pytest.raises(ValueError, match=f"{function.__name__}: ReLU has no masked layer; call ffw_fast.mask"):
            function(nn.ReLU(), *arguments)


def test_gates_that_are_not_random_are_not_drawn():
    layer = with_random_scores(MaskedLinear(5, 5))
    before = layer.gated_weight()
    draw_gates(layer)
    assert torch.equal(layer.gated_weight(), before)


@pytest.mark.parametrize("gate", RANDOM)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_in_eval_mode_runs_one_mask_twice(gate, use_reentrant):
    layer = with_random_scores(MaskedLinear(6, 5, gate=gate).double()).eval()
    draw_gates(layer)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    gradients = []
    for forward in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        layer.scores.grad = x.grad = None
        forward(x).square().sum().backward()
        gradients.append((layer.scores.grad, x.grad))
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*gradients, strict=True))
