"""The tanh in place: as accurate as PyTorch's own, in any memory order, with the same gradient."""

import copy
import os
import subprocess
import sys
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ffw_fast.convolutions import cheapest_convolutions
from ffw_fast.models import SimpleConvNet
from ffw_fast.simplify import simplified
from ffw_fast.tanh import FastTanh, tanh_default, use_fast_tanh

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["torch", "cpp"])
def tanh_(request):
    """The kernel of one backend."""
    if request.param == "torch":
        return tanh_default
    request.getfixturevalue("compiled_tanh")
    return torch.ops.ffw_fast.tanh_.default


@pytest.fixture
def compiled_tanh(compiled):
    if not torch._C._dispatch_has_kernel_for_dispatch_key("ffw_fast::tanh_", "CPU"):
        pytest.skip("the compiled CPU kernels were built without tanh")


def of(tanh_, x):
    y = x.clone()
    tanh_(y)
    return y


def all_sizes(dtype):
    """Numbers from the least to those whose tanh is 1, of both signs, and about the two formulas' border."""
    wide = torch.cat([torch.logspace(-44, 2, 200_001, dtype=torch.float64), torch.linspace(0.6, 0.65, 20_001).double()])
    return torch.cat([wide, -wide]).to(dtype)


def units_off(y, x):
    """The largest error in units in the last place of the exact result."""
    exact = x.double().tanh()
    finfo = torch.finfo(y.dtype)
    exponent = exact.abs().clamp(min=finfo.smallest_normal).log2().floor()
    return ((y.double() - exact).abs() / (torch.exp2(exponent) * finfo.eps)).max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_double_precision(tanh_, dtype):
    x = all_sizes(dtype)
    most = {torch.float32: 1.5}.get(dtype, 0.51)  # 16 bits are rounded once, from float32
    assert units_off(of(tanh_, x), x) <= most
    assert units_off(torch.tanh(x), x) <= most


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_numbers(tanh_, dtype):
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 20.0, -20.0], dtype=dtype)
    y = of(tanh_, x)
    assert torch.equal(y.nan_to_num(7), torch.tensor([0, 0, 1, -1, 7, 1, -1], dtype=dtype))
    assert torch.equal(y[:2].signbit(), torch.tensor([False, True]))


@given(
    shape=st.lists(st.integers(0, 9), max_size=4),
    turned=st.booleans(),
    step=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape_and_memory_order(compiled_tanh, shape, turned, step, dtype):
    whole = torch.randn([size * step for size in shape]).to(dtype)
    whole = whole.permute(tuple(reversed(range(len(shape))))) if turned else whole
    before = whole.clone()
    part = whole[tuple(slice(None, None, step) for _ in shape)]
    expected = torch.tanh(part)
    torch.ops.ffw_fast.tanh_(part)
    torch.testing.assert_close(part, expected)
    part.copy_(before[tuple(slice(None, None, step) for _ in shape)])
    assert torch.equal(whole, before), "nothing else is written"


OTHER_INSTRUCTIONS = """
import hashlib, torch, ffw_fast
x = torch.linspace(-9, 9, 100_003)
torch.ops.ffw_fast.tanh_(x)
print(hashlib.sha256(x.numpy().tobytes()).hexdigest())
"""


def test_the_same_bits_on_all_instruction_sets(compiled_tanh):
    printed = set()
    for capability in ("baseline", "avx2", "avx512"):
        environment = os.environ | {"FFW_FAST_CPU_CAPABILITY": capability}
        command = [sys.executable, "-c", OTHER_INSTRUCTIONS]
        printed.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(printed) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    torch.library.opcheck(torch.ops.ffw_fast.tanh_, (torch.randn(3, 5).to(dtype),))


def test_other_dtypes_are_refused_by_the_compiled_kernel(compiled_tanh):
    with pytest.raises(RuntimeError, match=r"x must be torch\.float32, bfloat16 or float16, got torch\.float64"):
        torch.ops.ffw_fast.tanh_(torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_module(inplace, dtype):
    layer = FastTanh()
    layer.inplace = inplace
    given = torch.randn(4, 5, 6).to(dtype).requires_grad_()
    before = given * 2
    y = layer(before)
    assert (y.data_ptr() == before.data_ptr()) == inplace
    (gradient,) = torch.autograd.grad(y.square().sum(), given)
    expected = torch.tanh(given * 2)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.square().sum(), given)[0])


def test_second_derivatives():
    x = torch.randn(7).requires_grad_()
    found, expected = (
        torch.autograd.grad(torch.autograd.grad(y.sum(), x, create_graph=True)[0].sum(), x)[0]
        for y in (FastTanh()(x), torch.tanh(x))
    )
    torch.testing.assert_close(found, expected)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def network(*between):
    return nn.Sequential(nn.Conv2d(3, 4, 3), *between, nn.Tanh(), Mean(), nn.Linear(4, 2)).eval().requires_grad_(False)


def outputs(model):
    return [model(torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)))]


def test_a_simplified_network_overwrites_what_its_tanh_alone_reads():
    model = network(nn.BatchNorm2d(4))
    cheap = simplified(model, "2", outputs)
    assert type(cheap[2]) is FastTanh and cheap[2].inplace
    assert type(model[2]) is nn.Tanh
    torch.testing.assert_close(outputs(cheap), outputs(model))


@pytest.mark.parametrize(
    ("between", "bottleneck"), [((), "0"), ((nn.MaxPool2d(2),), "2")], ids=["the bottleneck", "a pool's output"]
)
def test_nothing_else_is_overwritten(between, bottleneck):
    cheap = simplified(network(*between), bottleneck, outputs)
    (tanh,) = (module for module in cheap if isinstance(module, nn.Tanh))
    assert type(tanh) is FastTanh and not tanh.inplace


def test_a_network_that_cannot_be_traced_has_it_too():
    model = network()
    with mock.patch("torch.fx.Tracer.trace", side_effect=TypeError):
        cheap = simplified(model, "1", outputs)
    assert type(cheap[1]) is FastTanh and not cheap[1].inplace


def test_only_what_is_tanh_itself_is_changed():
    class Scaled(nn.Tanh):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Tanh(), Scaled())
    use_fast_tanh(model)
    assert [type(module) for module in model] == [FastTanh, Scaled]


def test_training_has_it_and_leaves_the_model_as_it_was():
    model = SimpleConvNet().train()
    plain = copy.deepcopy(model)
    x = torch.randn(4, 3, 9, 9)
    with cheapest_convolutions(model, x[:2]):
        assert type(model.tanh) is FastTanh
        y = model(x)
    assert type(model.tanh) is nn.Tanh
    torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-4)
