"""Random flips and crops of a minibatch of images, from a generator of their own."""

import torch
import torch.nn.functional as F
from torch import Tensor


def flip_at_random(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (n, c, h, w), each mirrored left to right with probability one half."""
    coins = torch.rand(len(images), generator=generator, device="cpu") < 0.5
    return torch.where(coins.to(images.device).view(-1, 1, 1, 1), images.flip(-1), images)


def crop_at_random(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Images (n, c, h, w) with ``padding`` black pixels put around, cut to their size again at a random place."""
    count, channels, height, width = images.shape
    down, right = torch.randint(2 * padding + 1, (2, count), generator=generator, device="cpu")
    rows = (down.unsqueeze(1) + torch.arange(height, device="cpu")).to(images.device).view(count, 1, height, 1)
    columns = (right.unsqueeze(1) + torch.arange(width, device="cpu")).to(images.device).view(count, 1, 1, width)
    image = torch.arange(count, device=images.device).view(count, 1, 1, 1)
    channel = torch.arange(channels, device=images.device).view(1, channels, 1, 1)
    return F.pad(images, [padding] * 4)[image, channel, rows, columns]
