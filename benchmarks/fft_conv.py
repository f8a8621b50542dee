"""SimpleConvNet's convolutions by FFT against oneDNN's direct ones, both in float32 and in one run.

``python -m ffw_fast.benchmarks.fft_conv [--batch 100 --size 28 --repeats 3]`` prints, for each layer, the
times of the forward pass alone and with the gradients that the network needs (the first layer has none of its
input), the direct convolution's FLOPs over both times, what the rule of ``ffw_fast.convolutions.fft`` estimates, and
the memory of the spectra; then a whole step of the network, and a pass without gradients. Sides take turns,
and the best of their times stands, because a disturbance only ever adds. A speed is reported only where the
results agree.
"""

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from ffw_fast.benchmarks.command import bench_parser
from ffw_fast.benchmarks.machine import describe, take_turns
from ffw_fast.benchmarks.operators import check_same
from torch import Tensor, nn

from ffw_fast import backend
from ffw_fast.convolutions import use_cheapest_convolutions
from ffw_fast.convolutions.batch_innermost import BatchInnermostGlobalPool, batch_innermost
from ffw_fast.convolutions.fft import (
    FftConv2d,
    direct_cost,
    fft_conv2d,
    fft_cost,
    has_compiled_kernel,
    spectrum_sizes,
)
from ffw_fast.models import SimpleConvNet

CHANNELS = (3, 16, 32, 64, 128)
KERNEL = 7


def best_times(sides: list[Callable[[], Any]], repeats: int) -> list[float]:
    """The best time of each side, in seconds, of so many turns after one that warms up."""
    return [min(times) for times in take_turns(sides, 0, repeats + 1)]


class Layer:
    """One convolution on both sides: its output, and its gradients by the weight and, perhaps, the input."""

    def __init__(self, batch: int, size: int, inputs: int, outputs: int) -> None:
        self.x = torch.randn(batch, inputs, size, size)
        self.x_innermost = batch_innermost(self.x)
        self.needs_x = inputs != CHANNELS[0]
        self.weight = torch.randn(outputs, inputs, KERNEL, KERNEL) / (inputs * KERNEL**2) ** 0.5
        self.bias = torch.randn(outputs)
        self.grad = torch.randn(batch, outputs, size, size)
        self.grad_innermost = batch_innermost(self.grad)

    def forward_direct(self) -> Tensor:
        return nn.functional.conv2d(self.x, self.weight, self.bias, padding=KERNEL // 2)

    def forward_fft(self) -> Tensor:
        return fft_conv2d(self.x_innermost, self.weight, self.bias)

    def step(self, convolve: Callable[..., Tensor], x: Tensor, grad: Tensor) -> list[Tensor]:
        leaves = [self.weight.detach().requires_grad_()]
        if self.needs_x:
            leaves.append(x.detach().requires_grad_())
        y = convolve(leaves[-1] if self.needs_x else x, leaves[0], self.bias)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    def step_direct(self) -> list[Tensor]:
        def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return nn.functional.conv2d(x, weight, bias, padding=KERNEL // 2)

        return self.step(convolve, self.x, self.grad)

    def step_fft(self) -> list[Tensor]:
        return self.step(fft_conv2d, self.x_innermost, self.grad_innermost)


def compare_layer(batch: int, size: int, inputs: int, outputs: int, repeats: int) -> None:
    layer = Layer(batch, size, inputs, outputs)
    check_same(layer.step_fft(), layer.step_direct())
    shape = (outputs, inputs, KERNEL, KERNEL)
    forward = best_times([layer.forward_direct, layer.forward_fft], repeats)
    step = best_times([layer.step_direct, layer.step_fft], repeats)
    work = batch * direct_cost(size, size, shape)
    estimate = direct_cost(size, size, shape) / fft_cost(size, size, shape, batch)
    spectra = sum(spectrum_sizes((batch, inputs, size, size), shape)) * 4 / 2**20
    passes = 3 if layer.needs_x else 2
    both = [*columns(forward, work), *columns(step, passes * work)]
    print(f"{inputs:3d} -> {outputs:3d} {work / 1e9:6.1f} |", *both, f"{estimate:8.1f}x {spectra:7.0f}")


def columns(times: list[float], work: float) -> list[str]:
    """Times in milliseconds, ratio, and GFLOP/s of the direct convolution's FLOPs that each side reaches."""
    direct, fft = times
    return [
        f"{direct * 1e3:7.1f} {fft * 1e3:6.1f}",
        f"{direct / fft:5.1f}x",
        f"{work / direct / 1e9:5.0f} {work / fft / 1e9:6.0f} |",
    ]


def frozen_network() -> SimpleConvNet:
    """The network as gates train it: frozen but for its weights, without batch norms, which are folded."""
    model = SimpleConvNet().eval().requires_grad_(False)
    for index in range(1, 5):
        setattr(model, f"bn{index}", nn.Identity())
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.requires_grad_()
        if isinstance(module, nn.ReLU):
            module.inplace = True
    return model


def everywhere_by_fft(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = FftConv2d
        if type(module) is nn.AdaptiveAvgPool2d:
            module.__class__ = BatchInnermostGlobalPool


def step_of(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    model.zero_grad()
    logits = model(x)
    nn.functional.cross_entropy(logits, labels).backward()
    return logits.detach()


def compare_network(batch: int, size: int, repeats: int) -> None:
    plain = frozen_network()
    chosen, everywhere = copy.deepcopy(plain), copy.deepcopy(plain)
    x, labels = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))
    names = use_cheapest_convolutions(chosen, x[:2])
    everywhere_by_fft(everywhere)
    models = [plain, chosen, everywhere]
    reference = step_of(plain, x, labels)
    for model in models[1:]:
        check_same([step_of(model, x, labels)], [reference])
    steps = best_times([partial(step_of, model, x, labels) for model in models], repeats)
    with torch.no_grad():
        large = torch.randn(5 * batch, 3, size, size)
        passes = best_times([partial(model, large) for model in models], repeats)
    print(f"\nwhole network, ms: direct, {', '.join(names)} by FFT, all by FFT; ratios")
    for name, times in ((f"step of {batch}", steps), (f"forward of {5 * batch}", passes)):
        milliseconds = " ".join(f"{value * 1e3:8.1f}" for value in times)
        print(f"{name:>16} {milliseconds}   {times[0] / times[1]:.1f}x {times[0] / times[2]:.1f}x")


def main(arguments: list[str] | None = None) -> None:
    parser = bench_parser("fft_conv", __doc__)
    parser.add_argument("--batch", type=int, default=100, help="images (default: 100)")
    parser.add_argument("--size", type=int, default=28, help="height and width of the images (default: 28)")
    parser.add_argument("--repeats", type=int, default=3, help="of every time, of which the best stands (default: 3)")
    parser.add_argument("--threads", type=int, default=None, help="default: as many as PyTorch takes")
    given = parser.parse_args(arguments)
    if not has_compiled_kernel():
        raise SystemExit("the FFT convolution is not compiled: see ffw_fast.backend_info()")
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    print(describe(), "compiled kernels:", backend.backend_info()["cpu"]["instruction_set"])
    print(f"batch {given.batch}, {given.size} x {given.size}, 7 x 7 kernels; direct against FFT:")
    columns_of = "ms, ratio, direct GFLOP/s"
    print(f"channels   GFLOP | forward: {columns_of} | with gradients: {columns_of} | estimate, MiB of spectra")
    for inputs, outputs in itertools.pairwise(CHANNELS):
        compare_layer(given.batch, given.size, inputs, outputs, given.repeats)
    compare_network(given.batch, given.size, given.repeats)


if __name__ == "__main__":
    main()
