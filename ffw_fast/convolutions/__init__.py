"""The cheapest exact way to each convolution of a network, chosen by shapes alone.

On the CPU images of a few pixels are multiplied by one matrix (``unrolled``, and where gates are trained
``tap_major``), and where FFTs need fewer FLOPs they are used (``fft``), with the layers between them in the same order
of memory (``batch_innermost``). On a GPU all of them are cuDNN's, of images as tensor cores read them
(``tensor_core``). Everything else stays PyTorch's own.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ffw_fast.convolutions import tap_major
from ffw_fast.convolutions.batch_innermost import keep_batch_innermost
from ffw_fast.convolutions.fft import FftConv2d, can_use_fft, has_compiled_kernel, is_worth_it, memory_of_steps
from ffw_fast.convolutions.tensor_core import TensorCoreConv2d
from ffw_fast.convolutions.unrolled import UnrolledConv2d, is_worth_unrolling
from ffw_fast.modes import evaluation_mode
from ffw_fast.precision import full_float32
from ffw_fast.simplify import Outputs, still_gives
from ffw_fast.tanh import use_fast_tanh

Sizes = set[tuple[int, int]]


@torch.no_grad()
def use_cheapest_convolutions(model: nn.Module, example: Tensor) -> dict[str, str]:
    """Choose for each ``nn.Conv2d`` of a model, in place.

    Only the class of such a layer changes, so parameters, hooks and names stay as they are. Between FFT convolutions
    the other ones, batch norms and pools keep the batch innermost, too.

    Args:
        model: any module; it is run once, without gradients, in the mode that it is in.
        example: a few samples, of the shape that it will be run on.

    Returns:
        Name of each layer that was changed -> "unrolled", "fft" or "tensor cores".
    """
    if example.device.type not in ("cpu", "cuda") or not any(type(layer) is nn.Conv2d for layer in model.modules()):
        return {}
    if example.device.type == "cuda":
        return _for_tensor_cores(model, example)
    with _image_sizes(model) as sizes:
        model(example.clone())  # a copy, for a layer may overwrite its input
    chosen = {name: _cheapest(layer, sizes[layer]) for name, layer in model.named_modules() if layer in sizes}
    for name, way in chosen.items():
        if way is not None:
            model.get_submodule(name).__class__ = CLASSES[way]
    if by_fft := sum(way == "fft" for way in chosen.values()):
        keep_batch_innermost(model, by_fft)
    return {name: way for name, way in chosen.items() if way is not None}


CLASSES: dict[str, type[nn.Conv2d]] = {"unrolled": UnrolledConv2d, "fft": FftConv2d}


@torch.no_grad()
@full_float32()
def lay_out_by_taps(model: nn.Module, outputs: Outputs) -> dict[str, Tensor]:
    """Lay the weights of convolutions of a few pixels out tap by tap, in place.

    Nothing is done where that changes the outputs: where the model's code reads such a weight itself, too.

    Args:
        model: a frozen network on the CPU.
        outputs: runs the model on a few samples, of the only shape that it will be run on, and gives all the outputs
            that matter.

    Returns:
        Name of each layer that was changed -> the taps that are left of it, see ``tap_major.lay_out``.
    """
    with _image_sizes(model) as sizes:
        expected = outputs(model)
    layers = {name: layer for name, layer in model.named_modules() if len(sizes.get(layer, ())) == 1}
    weights = {name: layer.weight for name, layer in layers.items()}
    found = {name: tap_major.lay_out(layer, *next(iter(sizes[layer]))) for name, layer in layers.items()}
    laid_out = {name: taps for name, taps in found.items() if taps is not None}
    if laid_out and not still_gives(model, expected, outputs):
        for name in laid_out:
            tap_major.put_back(layers[name], weights[name])
        return {}
    return laid_out


def _for_tensor_cores(model: nn.Module, example: Tensor) -> dict[str, str]:
    """All of a model's convolutions, unless it cannot take what they give: a ``view`` may need the usual order."""
    layers = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Conv2d}
    for layer in layers.values():
        layer.__class__ = TensorCoreConv2d
    try:
        model(example.clone())
    except RuntimeError:
        for layer in layers.values():
            layer.__class__ = nn.Conv2d
        return {}
    return dict.fromkeys(layers, "tensor cores")


@contextmanager
def repeatable_convolutions() -> Iterator[None]:
    """Within it cuDNN takes only algorithms that give the same bits every time: on an H200 they were as fast."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


def _cheapest(layer: nn.Conv2d, sizes: Sizes) -> str | None:
    if all(is_worth_unrolling(layer, *size) for size in sizes):
        return "unrolled"
    if can_use_fft(layer) and has_compiled_kernel() and all(is_worth_it(*size, layer.weight.shape) for size in sizes):
        return "fft"
    return None


@contextmanager
def cheapest_convolutions(model: nn.Module, example: Tensor) -> Iterator[None]:
    """Within it the model's convolutions and tanh are the cheapest ones; afterwards its modules are what they were."""
    classes = {module: module.__class__ for module in model.modules()}
    try:
        with evaluation_mode(model):  # in which running statistics stay as they are
            use_cheapest_convolutions(model, example)
        use_fast_tanh(model)
        with repeatable_convolutions(), memory_of_steps():
            yield
    finally:
        for module, was in classes.items():
            module.__class__ = was
            module.__dict__.pop("_taps_by_size", None)


@contextmanager
def _image_sizes(model: nn.Module) -> Iterator[dict[nn.Module, Sizes]]:
    """Within it heights and widths of the images that each convolution gets are noted."""
    sizes: dict[nn.Module, Sizes] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        x = inputs[0] if inputs else named["input"]
        if x.dim() == 4:
            sizes.setdefault(layer, set()).add((x.shape[2], x.shape[3]))

    with ExitStack() as hooks:
        for layer in model.modules():
            if type(layer) is nn.Conv2d:
                hooks.enter_context(layer.register_forward_pre_hook(note, with_kwargs=True))
        yield sizes
