"""Linear layers over gated weights: forward and both gradients against double precision."""

import pytest
import torch
from ffw_fast.kernels import tiles
from ffw_fast.kernels.masked_linear import masked_linear, masked_linear_input_grad, masked_linear_score_grad
from ffw_fast.kernels.tiles import Tile
from torch.nn import functional

from ffw_fast import ops
from ffw_fast.gates import GateKind

from .common import DEVICE, INTERPRETED, assert_as_good, draw, normal, one, tf32, with_gaps

SMALL = Tile(16, 16, 16, 4, 2)
SHAPES = [(1, 1, 1), (16, 16, 16), (17, 33, 5), (3, 20, 40), (35, 7, 31)]  # rows, outputs, inputs
DTYPES_WITH_RELU = [
    (torch.float32, False),
    (torch.float32, True),
    (torch.float16, True),
    (torch.bfloat16, False),
]

pytestmark = pytest.mark.usefixtures("poisoned")


def layer(rows, outs, ins, dtype=torch.float32, scores_dtype=None):
    x, weight, scores = normal(rows, ins), normal(outs, ins, seed=1), normal(outs, ins, seed=2)
    bias, grad = normal(outs, seed=3), normal(rows, outs, seed=4)
    tensors = [tensor.to(dtype) for tensor in (x, weight, scores, bias, grad)]
    if scores_dtype is not None:
        tensors[2] = scores.to(scores_dtype)
    return tensors, (one(0.7), draw())


def plain(x, weight, scores, bias, grad, temperature, key, kind, relu):
    """Output, gradient of the input and of the scores, in the precision of the arguments."""
    gated = ops.gate_weight_default(weight, scores, temperature, key, kind)
    out = functional.linear(x, gated, bias)
    out = out.relu() if relu else out
    grad = torch.where(out > 0, grad, 0) if relu else grad
    scores_grad = ops.gate_weight_backward_default(grad.T @ x, weight, scores, temperature, key, kind)
    return out, grad @ gated, scores_grad


def check(shape, dtype, kind, bias, relu, tile=SMALL, scores_dtype=None, precision="ieee", splits=None):
    (x, weight, scores, shift, grad), rest = layer(*shape, dtype, scores_dtype)
    shift = shift if bias else None
    gate = (weight, scores, *rest, kind)
    own = plain(x, weight, scores, shift, grad, *rest, kind, relu)
    wide = [None if tensor is None else tensor.double() for tensor in (x, weight, scores, shift, grad)]
    exact = plain(*wide, *rest, kind, relu)
    out = masked_linear(x, *gate, shift, relu, precision, tile)
    output = own[0] if relu else None  # the same zeros as in PyTorch's gradients
    exact_output = plain(*wide[:4], torch.zeros_like(wide[4]), *rest, kind, relu)[0]
    if relu and not torch.equal(exact_output > 0, own[0] > 0):  # rounding decided differently: leave those out
        grad = torch.where((exact_output > 0) == (own[0] > 0), grad, 0)
        own = plain(x, weight, scores, shift, grad, *rest, kind, relu)
        exact = plain(*wide[:4], grad.double(), *rest, kind, relu)
    results = (
        out,
        masked_linear_input_grad(grad, *gate, output, precision, tile),
        masked_linear_score_grad(grad, x, *gate, output, precision, tile, splits),
    )
    for result, one_own, one_exact in zip(results, own, exact, strict=True):
        assert_as_good(result, one_own, one_exact)
    return results


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "relu"), DTYPES_WITH_RELU)
def test_shapes(shape, dtype, relu):
    check(shape, dtype, GateKind.FFW, bias=not relu, relu=relu)


@pytest.mark.parametrize("kind", GateKind)
def test_kinds(kind):
    check((9, 18, 21), torch.float32, kind, bias=True, relu=True)


def test_float32_scores_beside_16_bits():
    (x, weight, scores, bias, _), rest = layer(8, 9, 40, torch.float16, torch.float32)
    result = masked_linear(x, weight, scores, *rest, GateKind.FFW, bias, tile=SMALL)
    own = functional.linear(x, ops.gate_weight_default(weight, scores, *rest, GateKind.FFW), bias)
    gated = ops.gate_weight_default(weight.double(), scores.double(), *rest, GateKind.FFW)
    assert_as_good(result, own, functional.linear(x.double(), gated, bias.double()))


@pytest.mark.parametrize("kind", [GateKind.FFW, GateKind.BERNOULLI])
@pytest.mark.parametrize("splits", [2, 5])
def test_split_sums(kind, splits):
    check((50, 6, 19), torch.float32, kind, False, False, splits=splits)


def test_tiles_wider_than_the_problem():
    check((5, 6, 7), torch.float32, GateKind.FFW, True, True, tile=Tile(64, 32, 32, 4, 2))


@pytest.mark.parametrize("number", sorted(tiles.ARCHITECTURES))
def test_tiles_of_the_table(number):
    with tiles.assume_architecture(number):
        check((20, 30, 40), torch.float32, GateKind.FFW, True, False, tile=None)


def test_leading_dimensions_and_strides():
    (x, weight, scores, bias, _), rest = layer(24, 5, 7)
    gate = (weight, scores, *rest, GateKind.FFW)
    expected = masked_linear(x, *gate, bias, tile=SMALL)
    assert torch.equal(masked_linear(x.view(2, 3, 4, 7), *gate, bias, tile=SMALL), expected.view(2, 3, 4, 5))
    padded = torch.full((24, 9), torch.nan, device=DEVICE)
    padded[:, :7] = x
    assert torch.equal(masked_linear(padded[:, :7], *gate, bias, tile=SMALL), expected)
    assert torch.equal(masked_linear(x.T.contiguous().T, *gate, bias, tile=SMALL), expected)
    assert torch.equal(masked_linear_score_grad(expected, padded[:, :7], *gate, tile=SMALL),
                       masked_linear_score_grad(expected, x, *gate, tile=SMALL))  # fmt: skip


def test_draws_and_biases_with_gaps():
    (x, weight, scores, bias, grad), (temperature, key) = layer(4, 5, 7)
    dense, other = ((weight, scores, temperature, one_key, GateKind.BERNOULLI) for one_key in (key, with_gaps(key)))
    expected = masked_linear(x, *dense, bias, tile=SMALL)
    assert torch.equal(masked_linear(x, *other, with_gaps(bias), tile=SMALL), expected)
    for call in (
        lambda gate: masked_linear_input_grad(grad, *gate, tile=SMALL),
        lambda gate: masked_linear_score_grad(grad, x, *gate, tile=SMALL),
    ):
        assert torch.equal(call(other), call(dense))


def test_no_rows():
    (x, weight, scores, bias, grad), rest = layer(4, 5, 7)
    gate = (weight, scores, *rest, GateKind.FFW)
    assert masked_linear(x[:0], *gate, bias).shape == (0, 5)
    assert masked_linear_input_grad(grad[:0], *gate).shape == (0, 7)
    assert torch.equal(masked_linear_score_grad(grad[:0], x[:0], *gate, tile=SMALL), torch.zeros_like(scores))


def test_nan_passes_through():
    (x, weight, scores, bias, _), rest = layer(3, 4, 5)
    x[1, 2] = torch.nan
    out = masked_linear(x, weight, scores, *rest, GateKind.FFW, bias, relu=True, tile=SMALL)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize(("wrong", "message"), [("dtype", "dtype"), ("shape", "shape"), ("precision", "precision")])
def test_wrong_inputs_are_refused(wrong, message):
    (x, weight, scores, bias, _), rest = layer(3, 4, 5)
    x = x.half() if wrong == "dtype" else x[:, :4] if wrong == "shape" else x
    with pytest.raises((TypeError, ValueError), match=message):
        masked_linear(x, weight, scores, *rest, 0, bias, precision="fp8" if wrong == "precision" else "ieee")


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="needs 8 GB of memory that is never touched, which only the CPU gives")
def test_places_beyond_32_bits():
    torch.use_deterministic_algorithms(False)  # else the memory is filled, with NaN
    rows = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((2, 24), (2**31 + 16, 1))
    (x, weight, scores, bias, grad), rest = layer(2, 5, 24, torch.float16)
    rows.copy_(x)
    gate = (weight, scores, *rest, GateKind.FFW)
    assert torch.equal(masked_linear(rows, *gate, bias, tile=SMALL), masked_linear(x, *gate, bias, tile=SMALL))
    assert torch.equal(
        masked_linear_score_grad(grad, rows, *gate, tile=SMALL),
        masked_linear_score_grad(grad, x, *gate, tile=SMALL),
    )


def in_tf32(grad, x, gate, bias, tile=None):
    """Output, gradient of the input and of the scores, by the kernels in TF32."""
    return (
        masked_linear(x, *gate, bias, precision="tf32", tile=tile),
        masked_linear_input_grad(grad, *gate, precision="tf32", tile=tile),
        masked_linear_score_grad(grad, x, *gate, precision="tf32", tile=tile),
    )


def test_tf32_operands_are_rounded():
    (x, weight, scores, bias, grad), rest = layer(17, 33, 40)
    rounded, kind = (tf32(x), tf32(weight), scores, bias, tf32(grad)), GateKind.HARD  # its gates round nothing
    own = plain(*rounded, *rest, kind, False)
    exact = plain(*(tensor.double() for tensor in rounded), *rest, kind, False)
    out, x_grad, scores_grad = in_tf32(grad, x, (weight, scores, *rest, kind), bias, SMALL)
    scores_grad = scores_grad * (tf32(weight) / weight)  # the weight behind the sum is not rounded
    for result, one_own, one_exact in zip((out, x_grad, scores_grad), own, exact, strict=True):
        assert_as_good(result, one_own, one_exact)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter multiplies in full precision")
def test_tf32():
    (x, weight, scores, bias, grad), rest = layer(100, 100, 200)
    exact = plain(*(tensor.double() for tensor in (x, weight, scores, bias, grad)), *rest, GateKind.FFW, False)
    torch.backends.cuda.matmul.allow_tf32 = True
    own = plain(x, weight, scores, bias, grad, *rest, GateKind.FFW, False)
    torch.backends.cuda.matmul.allow_tf32 = False
    results = in_tf32(grad, x, (weight, scores, *rest, GateKind.FFW), bias)
    for result, one_own, one_exact in zip(results, own, exact, strict=True):
        assert_as_good(result, one_own, one_exact)
