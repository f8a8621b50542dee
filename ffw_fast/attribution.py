"""Where in an image a network finds its answer: Grad-CAM, and gradient times input where nothing is convolved."""

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ffw_fast.data.samples import Samples

EXAMPLE_COUNT = 8
CONVOLUTIONS = (nn.Conv2d, nn.LazyConv2d)


def attribution(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What speaks for the class that the network predicts.

    Grad-CAM (Selvaraju et al., ICCV 2017, equations 1 and 2) at the last convolution that gives more than one pixel:
    the positive part of its channels' sum, each weighted with the mean gradient of the predicted class's logit. A
    network without one gets the positive part of gradient times input, summed over channels.

    Args:
        model: a classifier of images; it is run in the mode that it is in and stays as it is.
        x: float (n, channels, height, width).

    Returns:
        Maps (n, rows, columns), the largest value of each 1 unless all of it is 0, and predicted classes (n,).
    """
    x = x.detach().clone().requires_grad_()
    outputs: list[Tensor] = []
    with torch.enable_grad():
        with ExitStack() as hooks:
            for layer in model.modules():
                if isinstance(layer, CONVOLUTIONS):
                    keep = layer.register_forward_hook(lambda _layer, _x, output: outputs.append(output))
                    hooks.enter_context(keep)
            logits = model(x.clone())  # a copy, which it may overwrite
        predictions = logits.argmax(1)
        predicted = logits.gather(1, predictions.unsqueeze(1)).sum()
        planes = [output for output in outputs if output.dim() == 4 and output[0, 0].numel() > 1]
        activations, gradient = _last_with_gradient(predicted, [x, *(plane for plane in planes if plane.requires_grad)])
    weights = gradient if activations is x else gradient.mean((2, 3), keepdim=True)
    maps = (weights * activations).sum(1).clamp_min(0).detach()
    return maps / maps.amax((1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny), predictions


def _last_with_gradient(output: Tensor, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The last of the tensors that the output depends on, with its gradient; if there is none, the first and zeros."""
    if not output.requires_grad:
        return tensors[0], torch.zeros_like(tensors[0])
    gradients = torch.autograd.grad(output, tensors, allow_unused=True)
    found = [pair for pair in zip(tensors, gradients, strict=True) if pair[1] is not None]
    return found[-1] if found else (tensors[0], torch.zeros_like(tensors[0]))


def conflicting_examples(samples: Samples, count: int = EXAMPLE_COUNT) -> Samples:
    """The first samples that conflict with all their biases, one of each target in turn."""
    conflicting = (samples.b != samples.y.unsqueeze(1)).all(1).nonzero().flatten().tolist() or range(len(samples.y))
    targets = samples.y.tolist()
    seen: dict[int, int] = {}
    ranked = []
    for index in conflicting:
        rank = seen[targets[index]] = seen.get(targets[index], -1) + 1
        ranked.append((rank, targets[index], index))
    chosen = torch.tensor([index for _, _, index in sorted(ranked)[:count]], device=samples.y.device)
    return Samples(samples.x[chosen], samples.y[chosen], samples.b[chosen])


def explain(networks: Mapping[str, nn.Module], samples: Samples) -> dict[str, Tensor]:
    """Maps and predictions of the networks for a few samples; empty where these are no images.

    Returns:
        ``x`` (n, channels, height, width), ``y`` (n,), ``b`` (n, biases), and for each network ``NAME.map`` (n, rows,
        columns) and ``NAME.prediction`` (n,); all on the CPU.
    """
    shape = samples.x.shape
    if len(shape) != 4 or shape[1] not in (1, 3) or shape[2] * shape[3] < 2:
        return {}
    chosen = conflicting_examples(samples)
    x = chosen.x[torch.arange(len(chosen.y), device="cpu")].float()
    found = {"x": x, "y": chosen.y, "b": chosen.b}
    for name, network in networks.items():
        weight = next(network.parameters())
        found[f"{name}.map"], found[f"{name}.prediction"] = attribution(network, x.to(weight.device, weight.dtype))
    return {name: tensor.detach().contiguous().cpu() for name, tensor in found.items()}
