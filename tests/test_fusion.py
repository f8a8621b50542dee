"""When a masked layer's gate is fused into its kernel, and that it changes no result where it is."""

import copy

import pytest
import torch
from torch import nn

from ffw_fast import GATES, MaskedConv2d, MaskedLinear, fusion, mask_model, masked_layers, ops


@pytest.fixture
def fused(monkeypatch):
    monkeypatch.setattr(fusion, "choice", "fused")


@pytest.mark.parametrize(("choice", "expected"), [("auto", False), ("pregated", False), ("fused", True)])
def test_layers_are_fused_only_where_that_is_asked_for(monkeypatch, choice, expected):
    monkeypatch.setattr(fusion, "choice", choice)
    for device in ("cpu", "meta"):
        assert fusion.fuses(MaskedLinear(10, 10, device=device), torch.empty(1, 10, device=device)) is expected
        image = torch.empty(1, 2, 5, 5, device=device)
        assert fusion.fuses(MaskedConv2d(2, 3, 3, device=device), image) is expected


def test_what_the_operators_do_not_take_is_not_fused(fused):
    layer, x = MaskedLinear(10, 10), torch.empty(1, 10)
    assert not fusion.fuses(MaskedLinear(10, 10, dtype=torch.float64), x.double())
    assert not fusion.fuses(layer, x.half())
    with torch.autocast("cpu", torch.bfloat16):
        assert not fusion.fuses(layer, x)
    layer.weight.requires_grad_()
    assert not fusion.fuses(layer, x)
    layer = MaskedLinear(10, 10)
    layer.bias = nn.Parameter(layer.bias.half(), requires_grad=False)
    assert not fusion.fuses(layer, x)


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
    calls = recorded_calls(monkeypatch)
    given = twin(x)
    given.square().sum().backward()
    assert calls == ["masked_conv2d", "masked_linear"]  # the others have paddings of their own
    torch.testing.assert_close(given, expected)
    for name, layer in masked_layers(plain).items():
        torch.testing.assert_close(twin.get_submodule(name).scores.grad, layer.scores.grad, rtol=1e-4, atol=1e-5)


def recorded_calls(monkeypatch):
    """Names of the fused layers' operators that are called from now on."""
    calls = []
    for name in ("masked_conv2d", "masked_linear"):
        operator = getattr(ops, name)

        def called(*arguments, name=name, operator=operator):
            calls.append(name)
            return operator(*arguments)

        monkeypatch.setattr(ops, name, called)
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
