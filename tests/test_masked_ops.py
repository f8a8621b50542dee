"""The operators of masked layers and their gradients, against dense layers over the gated weight."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ffw_fast import ops, philox
from ffw_fast.autograd import GatedConv2d, GatedLinear, GateWeight
from ffw_fast.gates import GateKind

LAST = torch.channels_last

pytestmark = pytest.mark.usefixtures("poisoned")


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gate_of(*shape, dtype=torch.float32, kind=GateKind.FFW):
    """Weight, scores that are to be trained, temperature, draw and kind."""
    scores = (0.5 * normal(*shape, seed=2)).to(dtype).requires_grad_()
    return normal(*shape, seed=1, dtype=dtype), scores, torch.tensor(0.3), philox.make_draw(5, 3, 8), int(kind)


def results(run, x, gate, grad):
    """The output and the gradients of x and the scores."""
    x, scores = x.detach().requires_grad_(), gate[1].detach().requires_grad_()
    y = run(x, gate[0], scores, *gate[2:])
    return [y, *torch.autograd.grad(y, [x, scores], grad)]


def assert_same(ours, theirs, tolerance=1e-5):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@given(
    shape=st.tuples(*[st.integers(1, 7)] * 2),
    batch=st.sampled_from([(), (1,), (5,), (2, 3)]),
    kind=st.sampled_from(GateKind),
    has_bias=st.booleans(),
    relu=st.booleans(),
)
def test_linear(shape, batch, kind, has_bias, relu):
    gate, bias = gate_of(*shape, dtype=torch.float64, kind=kind), normal(shape[0], dtype=torch.float64)
    bias = bias if has_bias else None
    x, grad = normal(*batch, shape[1], dtype=torch.float64), normal(*batch, shape[0], seed=4, dtype=torch.float64)

    def dense(x, *gate):
        y = nn.functional.linear(x, GateWeight.apply(*gate), bias)
        return y.relu() if relu else y

    assert_same(results(lambda *a: GatedLinear.apply(*a, bias, relu), x, gate, grad), results(dense, x, gate, grad))


@given(
    channels=st.sampled_from([(1, 1, 1), (2, 3, 1), (4, 6, 2), (3, 3, 3)]),
    kernel=st.tuples(*[st.integers(1, 3)] * 2),
    geometry=st.tuples(*[st.tuples(st.integers(1, 2), st.integers(1, 2))] * 3),
    kind=st.sampled_from(GateKind),
    relu=st.booleans(),
    last=st.booleans(),
)
def test_conv2d(channels, kernel, geometry, kind, relu, last):
    ins, outs, groups = channels
    stride, (pad_h, pad_w), dilation = geometry
    rest = (stride, (pad_h - 1, pad_w), dilation, groups)
    gate, bias = gate_of(outs, ins // groups, *kernel, dtype=torch.float64, kind=kind), normal(outs).double()
    x = normal(2, ins, 7, 6, dtype=torch.float64).contiguous(memory_format=LAST if last else torch.contiguous_format)

    def dense(x, *gate):
        y = nn.functional.conv2d(x, GateWeight.apply(*gate), bias, *rest)
        return y.relu() if relu else y

    grad = torch.randn_like(dense(x, *gate))
    ours = results(lambda *a: GatedConv2d.apply(*a, bias, *rest, relu), x, gate, grad)
    assert_same(ours, results(dense, x, gate, grad))
    assert ours[0].is_contiguous(memory_format=LAST if last else torch.contiguous_format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", ["linear", "conv2d"])
def test_precisions(layer, dtype):
    if layer == "linear":
        x, gate, run, rest = normal(9, 40), gate_of(8, 40, dtype=dtype), GatedLinear.apply, (None, False)
    else:
        x, gate, run = normal(2, 6, 5, 5), gate_of(8, 6, 3, 3, dtype=dtype), GatedConv2d.apply
        rest = (None, (1, 1), (1, 1), (1, 1), 1, False)
    x = x.to(dtype)
    exact = run(x.double(), gate[0].double(), gate[1].double(), *gate[2:], *rest)
    given = run(x, *gate, *rest)
    assert given.dtype == dtype
    error, scale = (given.double() - exact).abs().max(), exact.abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * scale


def calls():
    """Arguments of a call of every operator, of a fixed and a random kind."""
    for kind in (GateKind.FFW, GateKind.CONCRETE):
        x, y = normal(2, 3, 7), normal(2, 3, 5, seed=3)
        gate = [value.detach() if isinstance(value, torch.Tensor) else value for value in gate_of(5, 7, kind=kind)]
        yield ops.masked_linear, (x, *gate, normal(5), True)
        yield ops.masked_linear_input_grad, (y, *gate, y.relu())
        yield ops.masked_linear_score_grad, (y, x, *gate, None)
        gate = [v.detach() if isinstance(v, torch.Tensor) else v for v in gate_of(6, 2, 3, 3, kind=kind)]
        for memory_format in (LAST, torch.contiguous_format):
            x = normal(2, 4, 8, 8).contiguous(memory_format=memory_format)
            y = normal(2, 6, 4, 4, seed=3).contiguous(memory_format=memory_format)
            geometry = ((2, 2), (1, 1), (1, 1), 2)
            yield ops.masked_conv2d, (x, *gate, None, *geometry, False)
            yield ops.masked_conv2d_input_grad, (y, x.shape, *gate, *geometry, y.relu())
            yield ops.masked_conv2d_score_grad, (y, x, *gate, *geometry, None)


CALLS = list(calls())


@pytest.mark.parametrize(("operator", "arguments"), CALLS, ids=[f"{c[0].name()}-{i}" for i, c in enumerate(CALLS)])
def test_opcheck(operator, arguments):
    torch.library.opcheck(operator, arguments)


def test_compile_fullgraph_with_gradients():
    torch._dynamo.reset()
    linear, conv = gate_of(5, 36), gate_of(4, 3, 3, 3)

    def run(x):
        y = GatedConv2d.apply(x, *conv, None, (2, 2), (1, 1), (1, 1), 1, True)
        return GatedLinear.apply(y.flatten(1), *linear, None, False)

    x = normal(2, 3, 5, 5).requires_grad_()
    leaves = [x, linear[1], conv[1]]
    given = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    assert_same(torch.autograd.grad(given.sum(), leaves), torch.autograd.grad(run(x).sum(), leaves))
    torch._dynamo.reset()


def test_wrong_sizes_are_refused():
    gate = gate_of(5, 7)
    with pytest.raises((ValueError, RuntimeError)):
        ops.masked_linear(normal(2, 6), *gate, None, False)
    plain = [value.detach() if isinstance(value, torch.Tensor) else value for value in (normal(2, 6), *gate)]
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in plain]
        with pytest.raises(ValueError, match=r"expected x \(..., 7\)"):
            ops.masked_linear(*fakes, None, False)
