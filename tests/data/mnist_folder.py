"""Small folders in the layout of full MNIST."""

import gzip
import struct
from pathlib import Path

import torch
from torch import Tensor


def idx_bytes(data: Tensor) -> bytes:
    """A uint8 tensor in the IDX format."""
    header = bytes((0, 0, 8, data.ndim)) + struct.pack(f">{data.ndim}I", *data.shape)
    return header + data.contiguous().numpy().tobytes()


def write_mnist(folder: Path, train: int = 100, test: int = 50, *, compressed: bool = False) -> dict[str, Tensor]:
    """Writes four IDX files of random digits, all different; returns their content by name."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(train + test)
    content = {}
    for pool, count in (("train", train), ("t10k", test)):
        images = torch.randint(0, 256, (count, 28, 28), generator=generator)
        ink = torch.rand((count, 28, 28), generator=generator) < 0.3
        content[f"{pool}-images-idx3-ubyte"] = (images * ink).to(torch.uint8)
        content[f"{pool}-labels-idx1-ubyte"] = (torch.arange(count) % 10).to(torch.uint8)
    for name, data in content.items():
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(data)))
        else:
            (folder / name).write_bytes(idx_bytes(data))
    return content
