"""Uniform numbers for sampled gates: counter-based Philox4x32-10, in plain PyTorch.

A number depends only on (seed, draw, element index), never on the device, the number of threads or the order of
evaluation. ``draw`` is an int64 tensor of three entries: the seed, the number of the draw, and the index of the
tensor's first element (a multiple of 4) in the network's flat list of gates. Element ``i`` takes lane ``i % 4`` of
the block whose counter is ``i // 4`` (low and high word) and ``draw`` (low and high word).

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


def make_draw(seed: int = 0, number: int = 0, first_element: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """The int64 tensor ``[seed, number, first_element]`` that keys one tensor's uniform numbers."""
    if first_element % 4:
        raise ValueError(f"the first element of a draw must be a multiple of 4, got {first_element}")
    return torch.tensor([seed, number, first_element], dtype=torch.int64, device=device)


def uniform(count: int, draw: Tensor) -> Tensor:
    """``count`` float32 numbers in (0, 1): the odd multiples of ``2**-24``, so that ``u`` and ``1 - u`` are exact."""
    blocks = torch.arange((count + 3) // 4, dtype=torch.int64, device=draw.device) + draw[2] // 4
    words = philox4x32(blocks, draw[1], draw[0]).flatten()[:count]
    return ((words >> 9) * 2 + 1).to(torch.float32) * 2.0**-24


def philox4x32(block: Tensor, draw: Tensor, seed: Tensor) -> Tensor:
    """Four 32-bit words a block, int64 of shape (blocks, 4). Words are kept in int64, whose products wrap as needed."""
    counter = [_low(block), _high(block), _low(draw).expand_as(block), _high(draw).expand_as(block)]
    key = [_low(seed), _high(seed)]
    for _ in range(ROUNDS):
        products = (counter[0] * MULTIPLIERS[0], counter[2] * MULTIPLIERS[1])
        counter = [
            _high(products[1]) ^ counter[1] ^ key[0],
            _low(products[1]),
            _high(products[0]) ^ counter[3] ^ key[1],
            _low(products[0]),
        ]
        key = [_low(word + step) for word, step in zip(key, KEY_STEPS, strict=True)]
    return torch.stack(counter, dim=-1)


def _low(word: Tensor) -> Tensor:
    return word & WORD


def _high(word: Tensor) -> Tensor:
    return (word >> 32) & WORD
