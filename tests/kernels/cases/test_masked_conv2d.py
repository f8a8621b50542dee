"""2d convolutions over gated weights: forward and both gradients against double precision."""

import pytest
import torch
from ffw_fast.kernels import tiles
from ffw_fast.kernels.masked_conv2d import masked_conv2d, masked_conv2d_input_grad, masked_conv2d_score_grad
from ffw_fast.kernels.tiles import Tile
from torch.nn import functional
from torch.nn import grad as conv_grad

from ffw_fast import ops
from ffw_fast.gates import GateKind

from .common import INTERPRETED, assert_as_good, draw, normal, one, tf32, with_gaps

SMALL = Tile(32, 16, 32, 4, 2)
# batch, channels, height, width, outputs, kernel, then the convolution's own settings
CASES = [
    (2, 3, 6, 5, 4, (3, 3), {"padding": 1}),
    (1, 1, 8, 8, 3, (7, 7), {}),
    (2, 5, 7, 8, 6, (3, 3), {"stride": 2, "padding": 1}),
    (1, 4, 7, 7, 5, (1, 1), {"stride": 2}),
    (1, 2, 9, 11, 3, (3, 2), {"stride": (2, 3), "padding": (2, 0)}),
    (1, 2, 11, 9, 3, (3, 3), {"dilation": 2, "padding": 2}),
    (1, 2, 12, 10, 3, (2, 3), {"dilation": (2, 1), "stride": (2, 2), "padding": (1, 1)}),
    (2, 4, 5, 4, 6, (3, 3), {"groups": 2, "padding": 1}),
    (1, 4, 5, 6, 4, (3, 3), {"groups": 2, "padding": 1, "stride": 2}),
    (1, 20, 4, 4, 18, (1, 1), {}),
    (1, 2, 3, 1, 2, (3, 1), {"stride": 3, "padding": (2, 0)}),
    (1, 3, 1, 1, 2, (3, 3), {"padding": 1, "stride": 2}),
]
CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last
IN_BOTH_FORMATS = (0, 2, 7)  # the other cases take turns
CASES_IN_FORMATS = [
    (case, memory_format)
    for index, case in enumerate(CASES)
    for turn, memory_format in enumerate((CONTIGUOUS, LAST))
    if index in IN_BOTH_FORMATS or index % 2 == turn
]
SMALL_CASE = (1, 3, 5, 4, 18, (3, 3), {"padding": 1})

pytestmark = pytest.mark.usefixtures("poisoned")


def layer(case, dtype=torch.float32, memory_format=CONTIGUOUS):
    batch, channels, height, width, outs, kernel, settings = case
    x = normal(batch, channels, height, width)
    weight, scores = (normal(outs, channels // settings.get("groups", 1), *kernel, seed=seed) for seed in (1, 2))
    out = functional.conv2d(x, weight, **settings)
    tensors = [tensor.to(dtype, memory_format=memory_format) for tensor in (x, weight, scores)]
    return [*tensors, normal(outs, seed=3).to(dtype), normal(*out.shape, seed=4).to(dtype)], (
        one(0.7),
        draw(),
    )


def plain(x, weight, scores, bias, grad, temperature, key, kind, relu, settings):
    """Output, gradient of the input and of the scores, in the precision of the arguments."""
    gated = ops.gate_weight_default(weight, scores, temperature, key, kind)
    out = functional.conv2d(x, gated, bias, **settings)
    out = out.relu() if relu else out
    grad = torch.where(out > 0, grad, 0) if relu else grad
    weight_grad = conv_grad.conv2d_weight(x, weight.shape, grad, **settings)
    scores_grad = ops.gate_weight_backward_default(weight_grad, weight, scores, temperature, key, kind)
    return out, conv_grad.conv2d_input(x.shape, gated, grad, **settings), scores_grad


def check(case, dtype, kind, relu, memory_format, tile=SMALL, splits=None):
    (x, weight, scores, bias, grad), rest = layer(case, dtype, memory_format)
    settings = case[-1]
    gate = (weight, scores, *rest, kind)
    exact_output = plain(*(tensor.double() for tensor in (x, weight, scores, bias, grad)), *rest, kind, relu, settings)
    own = plain(x, weight, scores, bias, grad, *rest, kind, relu, settings)
    if relu:  # where rounding decides whether an output is positive, there is no gradient to compare
        grad = torch.where((exact_output[0] > 0) == (own[0] > 0), grad, 0)
        own = plain(x, weight, scores, bias, grad, *rest, kind, relu, settings)
    exact = plain(*(tensor.double() for tensor in (x, weight, scores, bias, grad)), *rest, kind, relu, settings)
    output = own[0] if relu else None
    grad = grad.contiguous(memory_format=memory_format)
    results = (
        masked_conv2d(x, *gate, bias, **settings, relu=relu, tile=tile),
        masked_conv2d_input_grad(grad, x.shape, *gate, **settings, output=output, tile=tile),
        masked_conv2d_score_grad(grad, x, *gate, **settings, output=output, tile=tile, splits=splits),
    )
    for result, one_own, one_exact in zip(results, own, exact, strict=True):
        assert x.shape[2:].numel() == 1 or result.is_contiguous(memory_format=memory_format)
        assert_as_good(result, one_own, one_exact)
    return results


@pytest.mark.parametrize(("case", "memory_format"), CASES_IN_FORMATS)
def test_shapes(case, memory_format):
    check(case, torch.float32, GateKind.FFW, relu=True, memory_format=memory_format)


@pytest.mark.parametrize("memory_format", [CONTIGUOUS, LAST])
@pytest.mark.parametrize("kind", GateKind)
def test_kinds(kind, memory_format):
    check(SMALL_CASE, torch.float32, kind, relu=False, memory_format=memory_format)


@pytest.mark.parametrize(("dtype", "memory_format"), [(torch.float16, CONTIGUOUS), (torch.bfloat16, LAST)])
def test_16_bits(dtype, memory_format):
    check(SMALL_CASE, dtype, GateKind.FFW, relu=True, memory_format=memory_format)


@pytest.mark.parametrize(("kind", "memory_format"), [(GateKind.FFW, CONTIGUOUS), (GateKind.CONCRETE, LAST)])
def test_split_sums(kind, memory_format):
    check(CASES[0], torch.float32, kind, False, memory_format, splits=3)


@pytest.mark.parametrize("number", sorted(tiles.ARCHITECTURES))
def test_tiles_of_the_table(number):
    with tiles.assume_architecture(number):
        check(CASES[2], torch.float32, GateKind.FFW, True, CONTIGUOUS, tile=None)


def test_strided_tensors():
    (x, weight, scores, bias, grad), rest = layer(CASES[0])
    gate = (weight, scores, *rest, GateKind.FFW)
    expected = masked_conv2d(x, *gate, bias, padding=1, tile=SMALL)
    odd = torch.stack([x, x], dim=-1)[..., 0]
    assert torch.equal(masked_conv2d(odd, *gate, bias, padding=1, tile=SMALL), expected)
    other = weight.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(masked_conv2d(x, other, *gate[1:], bias, padding=1, tile=SMALL), expected)
    last = grad.contiguous(memory_format=LAST)
    torch.testing.assert_close(
        masked_conv2d_score_grad(last, x, *gate, padding=1, tile=SMALL),
        masked_conv2d_score_grad(grad, x, *gate, padding=1, tile=SMALL),
    )


def test_draws_and_biases_with_gaps():
    (x, weight, scores, bias, grad), (temperature, key) = layer(SMALL_CASE)
    dense, other = ((weight, scores, temperature, one_key, GateKind.CONCRETE) for one_key in (key, with_gaps(key)))
    expected = masked_conv2d(x, *dense, bias, padding=1, tile=SMALL)
    assert torch.equal(masked_conv2d(x, *other, with_gaps(bias), padding=1, tile=SMALL), expected)
    for call in (
        lambda gate: masked_conv2d_input_grad(grad, x.shape, *gate, padding=1, tile=SMALL),
        lambda gate: masked_conv2d_score_grad(grad, x, *gate, padding=1, tile=SMALL),
    ):
        assert torch.equal(call(other), call(dense))


def test_no_samples():
    (x, weight, scores, bias, grad), rest = layer(CASES[0])
    gate = (weight, scores, *rest, GateKind.FFW)
    assert masked_conv2d(x[:0], *gate, bias, padding=1).shape == (0, 4, 6, 5)
    assert masked_conv2d_input_grad(grad[:0], x[:0].shape, *gate, padding=1).shape == (0, 3, 6, 5)
    result = masked_conv2d_score_grad(grad[:0], x[:0], *gate, padding=1, tile=SMALL)
    assert torch.equal(result, torch.zeros_like(scores))


def test_wrong_inputs_are_refused():
    (x, weight, scores, bias, grad), rest = layer(CASES[0])
    gate = (weight, scores, *rest, GateKind.FFW)
    with pytest.raises(ValueError, match="expected x"):
        masked_conv2d(x[:, :2], *gate, bias)
    with pytest.raises(ValueError, match="larger than"):
        masked_conv2d(x[:, :, :2], *gate, bias)
    with pytest.raises(ValueError, match="grad must have shape"):
        masked_conv2d_input_grad(grad, x.shape, *gate)
    with pytest.raises(TypeError, match="dtype"):
        masked_conv2d(x.half(), *gate, bias)


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="needs 4 GB of memory that is hardly touched, which only the CPU gives")
def test_places_beyond_32_bits():
    torch.use_deterministic_algorithms(False)  # else the memory is filled, with NaN
    x = torch.empty(2, 1, 16, 2**26 + 40, dtype=torch.float16)
    window = x[1, :, :, -6:]
    window.copy_(normal(1, 16, 6))
    weight, scores = (
        normal(2, 1, 16, 3, dtype=torch.float16),
        normal(2, 1, 16, 3, seed=1, dtype=torch.float16),
    )
    gate = (weight, scores, one(1.0), draw(), GateKind.FFW)
    # A stride as large as the image leaves two output pixels an image: its first and its last columns.
    stride = (1, x.shape[3] - 3)
    x[:, :, :, :3] = 1
    x[0, :, :, -3:] = 2
    small = torch.cat([x[..., :3], x[..., -3:]], dim=3)
    result = masked_conv2d(x, *gate, stride=stride, tile=SMALL)
    assert torch.equal(result, masked_conv2d(small, *gate, stride=(1, 3), tile=SMALL))
    grad = torch.ones_like(result)
    result = masked_conv2d_score_grad(grad, x, *gate, stride=stride, tile=SMALL)
    assert torch.equal(result, masked_conv2d_score_grad(grad, small, *gate, stride=(1, 3), tile=SMALL))


def in_tf32(case, grad, x, gate, bias, tile=None):
    """Output, gradient of the input and of the scores, by the kernels in TF32."""
    settings = {**case[-1], "precision": "tf32", "tile": tile}
    return (
        masked_conv2d(x, *gate, bias, **settings),
        masked_conv2d_input_grad(grad, x.shape, *gate, **settings),
        masked_conv2d_score_grad(grad, x, *gate, **settings),
    )


@pytest.mark.parametrize("memory_format", [CONTIGUOUS, LAST])
def test_tf32_operands_are_rounded(memory_format):
    (x, weight, scores, bias, grad), rest = layer(SMALL_CASE, memory_format=memory_format)
    rounded, kind = (tf32(x), tf32(weight), scores, bias, tf32(grad)), GateKind.HARD  # its gates round nothing
    own = plain(*rounded, *rest, kind, False, SMALL_CASE[-1])
    exact = plain(*(tensor.double() for tensor in rounded), *rest, kind, False, SMALL_CASE[-1])
    out, x_grad, scores_grad = in_tf32(SMALL_CASE, grad, x, (weight, scores, *rest, kind), bias, SMALL)
    scores_grad = scores_grad * (tf32(weight) / weight)  # the weight behind the sum is not rounded
    for result, one_own, one_exact in zip((out, x_grad, scores_grad), own, exact, strict=True):
        assert_as_good(result, one_own, one_exact)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter multiplies in full precision")
def test_tf32():
    """As good as PyTorch's own, whose convolutions are in TF32 unless they are told otherwise."""
    case = (4, 32, 14, 14, 48, (3, 3), {"padding": 1})
    (x, weight, scores, bias, grad), rest = layer(case)
    own = plain(x, weight, scores, bias, grad, *rest, GateKind.FFW, False, case[-1])
    wide = (tensor.double() for tensor in (x, weight, scores, bias, grad))
    exact = plain(*wide, *rest, GateKind.FFW, False, case[-1])
    results = in_tf32(case, grad, x, (weight, scores, *rest, GateKind.FFW), bias)
    for result, one_own, one_exact in zip(results, own, exact, strict=True):
        assert_as_good(result, one_own, one_exact)
