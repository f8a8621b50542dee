"""When a masked layer's gate is fused into its kernel, and that it changes no result where it is."""

import copy

import pytest
import torch
from torch import nn

from ffw_fast import GATES, MaskedConv2d, MaskedLinear, fusion, mask_model, masked_layers, modules, triton_backend
from ffw_fast.gates import GateKind


@pytest.fixture
def fused(monkeypatch):
    monkeypatch.setattr(fusion, "choice", "fused")


@pytest.fixture
def served(monkeypatch):
    """As if Triton served the operators on the device ``meta``, which stands for a GPU here."""
    monkeypatch.setitem(triton_backend.registered, "meta", tuple(triton_backend.KERNELS))


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def linear_is_fused(rows, outs, ins, kind=GateKind.FFW, dtype=torch.float32):
    return fusion.fuses_linear(meta(rows, ins, dtype=dtype), meta(outs, ins, dtype=dtype), None, kind)


@pytest.mark.parametrize(
    ("rows", "outs", "ins", "expected"),
    [
        (1, 100, 2352, True),
        (64, 4096, 4096, True),  # one tile of rows always
        (65, 4096, 4096, False),  # two only where the layer is small
        (128, 100, 2352, True),
        (100, 10, 512, True),
        (256, 1000, 2048, False),
        (10**6, 1000, 2048, False),
    ],
)
def test_the_rule_for_linear_layers(served, rows, outs, ins, expected):
    assert linear_is_fused(rows, outs, ins) is expected


def test_the_rule_for_convolutions(served):
    def is_fused(batch, channels, outs, size, kernel, groups=1):
        x, weight = meta(batch, channels, size, size), meta(outs, channels // groups, kernel, kernel)
        return fusion.fuses_conv2d(x, weight, None, GateKind.FFW, (1, 1), groups)

    assert not is_fused(100, 64, 128, 28, 7)
    assert not is_fused(100, 512, 512, 4, 3)
    assert is_fused(1, 64, 64, 4, 3)
    assert not is_fused(1, 3, 64, 4, 3)  # most of a tile would be empty
    assert not is_fused(1, 64, 64, 4, 3, groups=64)


@pytest.mark.parametrize("kind", [kind for kind in GateKind if kind.is_random])
def test_random_gates_are_not_fused(served, kind):
    assert not linear_is_fused(1, 10, 10, kind)


def test_what_the_kernels_do_not_take_is_not_fused(served, fused):
    assert not linear_is_fused(1, 10, 10, dtype=torch.float64)
    x, weight = meta(1, 10), meta(10, 10)
    assert not fusion.fuses_linear(x.half(), weight, None, GateKind.FFW)
    assert not fusion.fuses_linear(x, weight, meta(10, dtype=torch.half), GateKind.FFW)
    assert not fusion.fuses_linear(x, weight.requires_grad_(), None, GateKind.FFW)
    with torch.autocast("cpu", torch.bfloat16):
        assert not fusion.fuses_linear(torch.empty(1, 10), torch.empty(10, 10), None, GateKind.FFW)


def test_nothing_is_fused_on_the_cpu_or_where_no_kernel_serves():
    x, weight = torch.empty(1, 10), torch.empty(10, 10)
    assert not fusion.fuses_linear(x, weight, None, GateKind.FFW)
    assert not linear_is_fused(1, 10, 10)


def test_pregated_can_be_forced(served, monkeypatch):
    monkeypatch.setattr(fusion, "choice", "pregated")
    assert not linear_is_fused(1, 10, 10)


def test_the_choice_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("FFW_FAST_MASKED_LAYERS", "fused")
    assert fusion.requested() == "fused"
    monkeypatch.setenv("FFW_FAST_MASKED_LAYERS", "always")
    with pytest.raises(ValueError, match="must be one of auto, fused, pregated, got 'always'"):
        fusion.requested()


def masked_network(gate):
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding="same"),
        nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular"),
        nn.Flatten(),
        nn.Linear(96, 5),
    )
    masked = mask_model(model, gate)
    for layer in masked_layers(masked).values():
        nn.init.normal_(layer.scores)
    return masked


@pytest.mark.parametrize("gate", GATES)
def test_fused_layers_give_the_same_results(monkeypatch, gate):
    plain, x = masked_network(gate), torch.randn(3, 4, 8, 8)
    twin = copy.deepcopy(plain)
    expected = plain(x)
    expected.square().sum().backward()
    monkeypatch.setattr(fusion, "choice", "fused")
    calls = count_calls(monkeypatch)
    given = twin(x)
    given.square().sum().backward()
    assert calls == ["conv2d", "linear"]  # the others have paddings of their own
    torch.testing.assert_close(given, expected)
    for name, layer in masked_layers(plain).items():
        torch.testing.assert_close(twin.get_submodule(name).scores.grad, layer.scores.grad, rtol=1e-4, atol=1e-5)


def count_calls(monkeypatch):
    """Names of the fused layers that modules run from now on."""
    calls = []
    for name in ("conv2d", "linear"):
        decide = getattr(modules, f"fuses_{name}")

        def decided(*arguments, name=name, decide=decide):
            answer = decide(*arguments)
            calls.extend([name] * answer)
            return answer

        monkeypatch.setattr(modules, f"fuses_{name}", decided)
    return calls


def test_compile_whole(fused):
    torch._dynamo.reset()
    plain, x = masked_network("bernoulli"), torch.randn(3, 4, 8, 8)
    twin = copy.deepcopy(plain)
    torch.testing.assert_close(torch.compile(twin, fullgraph=True, backend="aot_eager")(x), plain(x))
    torch._dynamo.reset()


def test_an_image_without_a_batch_is_not_fused(fused):
    layer = MaskedConv2d(2, 3, 3)
    assert layer(torch.randn(2, 5, 5)).shape == (3, 3, 3)


def test_a_trained_bias_gets_its_gradient(fused):
    layer = MaskedLinear(3, 2)
    layer.bias.requires_grad_()
    layer(torch.randn(4, 3)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((2,), 4.0))
