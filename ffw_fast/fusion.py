"""Whether a masked layer gates its weight first or inside the kernel of its matrix product, and why.

- *Pre-gated*: ``gate_weight`` writes ``v = w g``, and PyTorch's own linear or convolution reads it.
- *Fused*: ``masked_linear`` or ``masked_conv2d`` loads weights and scores, and gates them on the way to the product.

Fusing saves a launch and a pass over ``v``, but every tile of the output gates its weights anew, and Triton's launcher
takes more of the CPU's time than the launch that it saves. Forward and backward of a layer on an H200 in microseconds,
called as usual and replayed in a CUDA graph, which takes the device's time alone (``ffw-fast bench gpu --only "masked
layers"`` measures both; ``benchmarks/results/gpu-nvidia-h200.json`` has the first, ``-profile.txt`` the second):

                                           called                    in a graph
    layer, batch, dtype                    dense  pre-gated  fused   dense  pre-gated  fused
    100x2352, 64, float32                    188        389    657    30.5       36.6  148.7
    100x2352, 64, bfloat16                   201        465    681    12.7       27.7   58.3
    100x100, 64, float32                     256        377    900    27.1       30.7   26.8
    100x100, 256, float32                    235        433   1360    16.8       21.2   33.6
    10x100, 64, float32                      367        737   1180    23.8       27.0   19.7
    512x256x3x3 on 2x2, 64, float32          290        581    850    69.9       78.4  309.3
    128x64x1x1/2 on 8x8, 64, float32         289        567   1540    39.9       43.6   32.3
    128x64x1x1/2 on 8x8, 256, float32        410        689   1500    54.5       58.6   45.6

So layers are pre-gated. FFW_FAST_MASKED_LAYERS, an environment variable, is for those who capture small layers in CUDA
graphs: ``auto`` (default) and ``pregated`` gate first, ``fused`` fuses wherever the operator takes the layer (without a
Triton kernel its plain-PyTorch one does the work). The loop of ``ffw_fast.extract`` does not come here: its gated
weights are written by the optimizer's pass, so pre-gating costs it nothing.
"""

import os

import torch
from torch import Tensor, nn

CHOICES = ("auto", "fused", "pregated")
VARIABLE = "FFW_FAST_MASKED_LAYERS"


def requested() -> str:
    """The value of FFW_FAST_MASKED_LAYERS; ``ValueError`` with the known ones if it is none of them."""
    name = os.environ.get(VARIABLE) or "auto"
    if name not in CHOICES:
        raise ValueError(f"{VARIABLE} must be one of {', '.join(CHOICES)}, got {name!r}")
    return name


choice = requested()


def fuses(layer: nn.Linear | nn.Conv2d, x: Tensor) -> bool:
    """Whether a masked layer is fused over x: where that is asked for, and the operator takes the layer.

    It does not take float64, autocast, mixed dtypes, weights or biases that are trained, an image without a batch, or
    paddings other than a number of zeros.
    """
    if choice != "fused":
        return False
    weight, bias = layer.weight, layer.bias
    frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
    same = x.dtype == weight.dtype and (bias is None or bias.dtype == weight.dtype)
    autocasts = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
    return frozen and same and x.dtype != torch.float64 and not autocasts and _takes_images(layer, x)


def _takes_images(layer: nn.Linear | nn.Conv2d, x: Tensor) -> bool:
    if isinstance(layer, nn.Linear):
        return True
    return x.dim() == 4 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
