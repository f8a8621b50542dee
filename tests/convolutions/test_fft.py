"""FFT convolution: both kernels against double precision, gradients, memory order, and networks that use it.

Error bounds are scaled to PyTorch's own: the root mean square error may be 4 times that of PyTorch's float32
convolution, and a few units in the last place more.
"""

import copy
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ffw_fast.convolutions import fft, use_cheapest_convolutions
from ffw_fast.convolutions.batch_innermost import BatchInnermostGlobalPool
from ffw_fast.convolutions.fft import (
    FftConv2d,
    fft_conv2d,
    fft_conv2d_backward_default,
    fft_conv2d_default,
    kept_frequencies,
    spectrum_sizes,
    transform_length,
)
from ffw_fast.models import SimpleConvNet

SHAPES = [  # images, inputs, outputs, height, width, kernel height, kernel width
    (40, 3, 16, 28, 28, 7, 7),
    (17, 16, 32, 14, 14, 7, 7),
    (4, 24, 40, 28, 28, 7, 7),
    (1, 1, 1, 5, 5, 3, 3),
    (3, 2, 3, 7, 10, 7, 5),
    (1, 5, 6, 1, 3, 11, 1),
    (33, 3, 5, 9, 9, 5, 5),
    (130, 3, 4, 9, 12, 5, 9),
    (300, 4, 9, 6, 6, 3, 3),
    (2, 2, 2, 2, 2, 1, 1),
    (2, 3, 2, 100, 41, 11, 11),
]
UNITS = 8 * torch.finfo(torch.float32).eps

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(params=["torch", "cpp"])
def kernels(request):
    """Forward and backward kernel of one backend."""
    if request.param == "torch":
        return fft_conv2d_default, fft_conv2d_backward_default
    request.getfixturevalue("compiled_convolution")
    return torch.ops.ffw_fast.fft_conv2d.default, torch.ops.ffw_fast.fft_conv2d_backward.default


@pytest.fixture
def compiled_convolution(compiled):
    if not fft.has_compiled_kernel():
        pytest.skip("the compiled CPU kernels were built without the FFT convolution")


def arguments(shape, dtype=torch.float32):
    """Images, weight, bias and a gradient of the output."""
    images, inputs, outputs, height, width, *kernel = shape
    source = torch.Generator().manual_seed(0)

    def normal(*sizes, scale=1.0):
        return scale * torch.randn(*sizes, generator=source, dtype=dtype)

    weight = normal(outputs, inputs, *kernel, scale=0.1)
    return (
        normal(images, inputs, height, width),
        weight,
        normal(outputs),
        normal(images, outputs, height, width),
    )


def direct(x, weight, bias, grad):
    """Output and both gradients by PyTorch's own convolution."""
    padding = [size // 2 for size in weight.shape[2:]]
    y = nn.functional.conv2d(x, weight, bias, padding=padding)
    gradients = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], 1, [True, True, False]
    )
    return y, *gradients[:2]


def by_fft(kernels, x, weight, bias, grad):
    forward, backward = kernels
    spectra = [x.new_empty(size) for size in spectrum_sizes(x.shape, weight.shape)]
    return forward(x, weight, bias, *spectra), *backward(grad, weight, *spectra)


def rms(values):
    return values.double().square().mean().sqrt().item()


def batch_innermost(x):
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_double_precision(kernels, shape):
    given = arguments(shape)
    exact = direct(*(tensor.double() for tensor in given))
    for ours, torchs, reference in zip(by_fft(kernels, *given), direct(*given), exact, strict=True):
        assert ours.shape == reference.shape
        assert rms(ours - reference) <= 4 * rms(torchs - reference) + UNITS * rms(reference)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_spectra_of_both_kernels_agree(compiled_convolution, shape):
    x, weight, bias, _ = arguments(shape)
    ours, plain = ([x.new_empty(size) for size in spectrum_sizes(x.shape, weight.shape)] for _ in range(2))
    torch.ops.ffw_fast.fft_conv2d(x, weight, bias, *ours)
    fft_conv2d_default(x, weight, bias, *plain)
    for given, expected in zip(ours, plain, strict=True):
        assert (given - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("arrange", [batch_innermost, torch.Tensor.contiguous], ids=["chwn", "nchw"])
def test_any_memory_order_and_what_comes_out(kernels, arrange):
    x, weight, bias, grad = arguments((20, 3, 4, 9, 8, 5, 3))
    y, x_grad, weight_grad = by_fft(
        kernels, arrange(x), weight.to(memory_format=torch.channels_last), bias, arrange(grad)
    )
    expected = by_fft(kernels, x, weight, bias, grad)
    for ours, other in zip((y, x_grad, weight_grad), expected, strict=True):
        assert torch.equal(ours, other)
    assert y.stride() == batch_innermost(y).stride()
    assert x_grad.stride() == batch_innermost(x_grad).stride()
    assert weight_grad.is_contiguous()
    assert not y._is_view()


def test_expanded_and_sliced_tensors(kernels):
    x, weight, bias, grad = arguments((6, 3, 4, 9, 8, 5, 3))
    flat = grad.mean((2, 3), keepdim=True).expand_as(grad)
    part = torch.cat([x, x], dim=3)[::2, :, :, 2:10]
    given = by_fft(kernels, part, weight, bias, flat[::2])
    expected = by_fft(kernels, part.contiguous(), weight, bias, flat[::2].contiguous())
    for ours, other in zip(given, expected, strict=True):
        assert torch.equal(ours, other)


def test_without_spectra_large_batches_go_in_pieces(kernels):
    x, weight, bias, _ = arguments((300, 4, 9, 6, 6, 3, 3))
    whole, *_ = by_fft(kernels, x, weight, bias, x.new_zeros(300, 9, 6, 6))
    assert (kernels[0](x, weight, bias, None, None) - whole).abs().max() <= 1e-6 * whole.abs().max()


def test_empty_batch(kernels):
    given = arguments((0, 3, 4, 9, 8, 5, 3))
    y, x_grad, weight_grad = by_fft(kernels, *given)
    assert y.shape == (0, 4, 9, 8)
    assert x_grad.shape == (0, 3, 9, 8)
    assert torch.equal(weight_grad, torch.zeros_like(given[1]))


def test_what_is_not_wanted_is_not_computed(kernels):
    x, weight, bias, grad = arguments((5, 3, 4, 9, 8, 5, 3))
    forward, backward = kernels
    x_size, weight_size = spectrum_sizes(x.shape, weight.shape)
    x_spectrum, weight_spectrum = x.new_empty(x_size), x.new_empty(weight_size)
    forward(x, weight, bias, x_spectrum, weight_spectrum)
    both = backward(grad, weight, x_spectrum, weight_spectrum)
    x_grad, nothing = backward(grad, weight, None, weight_spectrum)
    assert torch.equal(x_grad, both[0])
    assert nothing.numel() == 0
    nothing, weight_grad = backward(grad, weight, x_spectrum, None)
    assert torch.equal(weight_grad, both[1])
    assert nothing.numel() == 0


def test_threads_change_no_bit(compiled_convolution, restore_threads):
    given = arguments((37, 5, 7, 14, 14, 7, 7))
    kernels = torch.ops.ffw_fast.fft_conv2d.default, torch.ops.ffw_fast.fft_conv2d_backward.default
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(by_fft(kernels, *given))
    for other in results[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(results[0], other, strict=True))


OTHER_INSTRUCTIONS = """
import torch
from ffw_fast.convolutions import fft
from tests.convolutions.test_fft import SHAPES, arguments, by_fft, direct, rms
kernels = torch.ops.ffw_fast.fft_conv2d.default, torch.ops.ffw_fast.fft_conv2d_backward.default
for shape in SHAPES[3:]:
    given = arguments(shape)
    for ours, reference in zip(by_fft(kernels, *given), direct(*(part.double() for part in given))):
        assert rms(ours - reference) <= 2e-6 * rms(reference), shape
"""


@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_lesser_instruction_sets(compiled, compiled_convolution, capability):
    if compiled["instruction_set"] in ("baseline", capability):
        pytest.skip("the other tests ran on these instructions")
    environment = os.environ | {"FFW_FAST_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", OTHER_INSTRUCTIONS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("leave_out", [None, "x", "weight"])
def test_opcheck(leave_out):
    x, weight, bias, grad = arguments((5, 3, 4, 9, 8, 5, 3))
    x_size, weight_size = spectrum_sizes(x.shape, weight.shape)
    x_spectrum = None if leave_out == "x" else x.new_zeros(x_size)
    weight_spectrum = None if leave_out == "weight" else x.new_zeros(weight_size)
    torch.library.opcheck(torch.ops.ffw_fast.fft_conv2d, (x, weight, bias, x_spectrum, weight_spectrum))
    torch.ops.ffw_fast.fft_conv2d(x, weight, bias, x_spectrum, weight_spectrum)
    torch.library.opcheck(torch.ops.ffw_fast.fft_conv2d_backward, (grad, weight, x_spectrum, weight_spectrum))


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(fft, "_forward", fft_conv2d_default)
    monkeypatch.setattr(fft, "_backward", fft_conv2d_backward_default)
    x, weight, bias, _ = arguments((2, 2, 1, 3, 4, 3, 5), torch.float64)
    leaves = [part.requires_grad_() for part in (x, weight, bias)]
    assert torch.autograd.gradcheck(fft_conv2d, leaves, fast_mode=True)


def test_autograd_matches_the_direct_convolution():
    x, weight, bias, grad = arguments((12, 3, 4, 9, 8, 5, 3))
    ours, theirs = ([part.clone().requires_grad_() for part in (x, weight, bias)] for _ in range(2))
    fft_conv2d(*ours).backward(grad)
    nn.functional.conv2d(*theirs, padding=(2, 1)).backward(grad)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.grad - other.grad).abs().max() <= 1e-5 * other.grad.abs().max()


def test_compiles_whole():
    x, weight, bias, _ = arguments((5, 3, 4, 9, 8, 5, 3))
    weight.requires_grad_()
    run = torch.compile(fft_conv2d, fullgraph=True, backend="aot_eager")
    run(x, weight, bias).sum().backward()
    compiled, weight.grad = weight.grad, None
    fft_conv2d(x, weight, bias).sum().backward()
    assert torch.equal(compiled, weight.grad)


def test_what_an_earlier_convolution_left_in_memory_changes_no_bit(kernels):
    given = arguments((5, 5, 4, 9, 8, 5, 3))
    before = by_fft(kernels, *given)
    by_fft(kernels, *(tensor * math.nan for tensor in arguments((33, 16, 17, 9, 8, 5, 3))))
    for again, result in zip(by_fft(kernels, *given), before, strict=True):
        assert torch.equal(again, result)


def test_two_graphs_at_once_keep_their_spectra_apart():
    _, weight, bias, _ = arguments((5, 3, 4, 9, 8, 5, 3))
    weight.requires_grad_()
    images = [torch.randn(5, 3, 9, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    alone = [torch.autograd.grad(fft_conv2d(x, weight, bias).square().sum(), weight)[0] for x in images]
    outputs = [fft_conv2d(x, weight, bias) for x in images]
    together = [torch.autograd.grad(y.square().sum(), weight)[0] for y in outputs]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_memory_is_used_again():
    x, weight, bias, _ = arguments((5, 3, 4, 9, 8, 5, 3))
    weight.requires_grad_()
    fft.release_memory()
    for _ in range(3):
        fft_conv2d(x, weight, bias).sum().backward()
    assert len(fft._free_memory) == 1
    fft.release_memory()
    assert not fft._free_memory


def test_nested_checkpoints_keep_their_spectra():
    """What the outer one computes again is needed after its graph is gone, and while the inner one computes again."""
    torch.manual_seed(0)
    layers = [FftConv2d(8, 8, 7, padding=3) for _ in range(3)]
    x = torch.randn(8, 8, 28, 28)

    def inner(x):
        return layers[2](layers[1](x).tanh()).tanh()

    def outer(x, nested):
        x = layers[0](x).tanh()
        return checkpoint(inner, x, use_reentrant=False) if nested else inner(x)

    def gradients(y):
        return torch.autograd.grad(y.square().sum(), [layer.weight for layer in layers])

    expected = gradients(outer(x, nested=False))
    for ours, plain in zip(gradients(checkpoint(outer, x, True, use_reentrant=False)), expected, strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weight": torch.zeros(4, 3, 4, 4)},
            r"kernel sizes must be odd and at most 11, got a weight \(4, 3, 4, 4\)",
        ),
        ({"weight": torch.zeros(4, 3, 13, 13)}, "kernel sizes must be odd and at most 11"),
        (
            {"weight": torch.zeros(4, 2, 3, 3)},
            r"x must be \(images, 2, height, width\) for a weight \(4, 2, 3, 3\)",
        ),
        ({"x": torch.zeros(3, 9, 9)}, r"x must be \(images, 3, height, width\)"),
        ({"x": torch.zeros(1, 3, 300, 9)}, "x must be at most 240 pixels high and wide"),
        ({"x": torch.zeros(1, 3, 9, 9, dtype=torch.float16)}, "x must "),
        ({"x_spectrum": torch.zeros(7)}, "x_spectrum must have shape"),
    ],
)
def test_unsupported_arguments(kernels, change, message):
    given = {"x": torch.zeros(2, 3, 9, 9), "weight": torch.zeros(4, 3, 3, 3), "x_spectrum": None} | change
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        kernels[0](given["x"], given["weight"], None, given["x_spectrum"], None)


def test_transform_lengths():
    assert [transform_length(size, 7) for size in (28, 14, 32, 224)] == [32, 18, 36, 240]
    assert transform_length(1, 11) == 12
    assert kept_frequencies(32, 32) == 514
    for height, width in ((4, 5), (9, 9), (6, 2)):
        rows, _ = fft._frequencies(height, width, torch.device("cpu"))
        assert len(rows) == kept_frequencies(height, width)


# Networks ---------------------------------------------------------------------------------------------------


def frozen_network():
    """A SimpleConvNet as gates train it: frozen but for its weights, its batch norms folded."""
    torch.manual_seed(0)
    model = SimpleConvNet().eval().requires_grad_(False)
    for name in ("bn1", "bn2", "bn3", "bn4"):
        setattr(model, name, nn.Identity())
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.requires_grad_()
        if isinstance(module, nn.ReLU):
            module.inplace = True
    return model


def step(model, x):
    """Logits and the gradients of the weights."""
    logits = model(x)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [logits.detach(), *torch.autograd.grad(logits.square().sum(), weights)]


def test_network_keeps_its_results(compiled_convolution):
    plain = frozen_network()
    fast = copy.deepcopy(plain)
    x = torch.randn(6, 3, 14, 14, generator=torch.Generator().manual_seed(1))
    assert use_cheapest_convolutions(fast, x[:2]) == dict.fromkeys(["conv2", "conv3", "conv4"], "fft")
    assert isinstance(fast.pool, BatchInnermostGlobalPool)
    exact = step(copy.deepcopy(plain).double(), x.double())
    for ours, torchs, reference in zip(step(fast, x), step(plain, x), exact, strict=True):
        # A pixel near 0 that rounding puts on the other side of a ReLU weighs more than the rounding itself.
        assert rms(ours - reference) <= 4 * rms(torchs - reference) + 1e-3 * rms(reference)
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert use_cheapest_convolutions(fast, x[:2]) == {}


def test_network_stays_batch_innermost(compiled_convolution):
    model = frozen_network()
    x = torch.randn(6, 3, 14, 14)
    use_cheapest_convolutions(model, x[:2])
    seen = {}

    def note(name):
        def hook(_module, _inputs, output):
            seen[name, "output"] = output.stride()
            if output.requires_grad and name != "relu2":  # the in-place ReLU has taken the convolution's place
                output.register_hook(lambda grad: seen.update({(name, "grad"): grad.stride()}))

        return hook

    for name in ("conv2", "relu2", "conv3", "conv4", "tanh"):
        getattr(model, name).register_forward_hook(note(name))
    step(model, x)
    assert {strides[0] for strides in seen.values()} == {1}
    assert seen["conv4", "grad"] == seen["conv4", "output"]


def test_other_precisions_are_left_alone(compiled_convolution):
    layer = FftConv2d(4, 4, 7, padding=3)
    assert layer(torch.randn(4, 9, 9)).shape == (4, 9, 9)
    layer.to(torch.bfloat16)
    assert layer(torch.randn(2, 4, 9, 9).bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 4, 9, 9)).dtype == torch.bfloat16


@pytest.mark.parametrize(("rate", "dtype"), [(0.5, torch.float32), (2.0, torch.float32), (50.0, torch.bfloat16)])
def test_under_autocast_the_cheaper_way_is_taken(compiled_convolution, monkeypatch, rate, dtype):
    monkeypatch.setattr(fft, "low_precision_rate", lambda: rate)
    layer = FftConv2d(32, 64, 7, padding=3)
    x = torch.randn(2, 32, 28, 28)
    exact = nn.functional.conv2d(x.double(), layer.weight.detach().double(), padding=3).float()
    for given in (x, x.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(given)
        assert y.dtype == dtype
        (gradient,) = torch.autograd.grad(y.float().sum(), layer.weight)
        assert gradient.dtype == torch.float32
        without_bias = (y - layer.bias.detach().view(-1, 1, 1)).float()
        assert rms(without_bias.detach() - exact) <= 1e-2 * rms(exact)


def test_this_processor_has_a_rate():
    assert fft.low_precision_rate() in (0.5, 2.0, 8.0)
