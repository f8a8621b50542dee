"""Tile shapes: one short table per architecture, and the rules that pick from it.

The shapes are reasoned, not measured: they leave at least two blocks on an A100's multiprocessor (64 K
registers and 164 KB of shared memory) and keep the tensor cores' operands in few shared-memory passes.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

ELEMENTWISE_BLOCK = 1024  # elements a program: two 16-byte accesses of float32 a thread at 4 warps
ELEMENTWISE_WARPS = 4
PRECISIONS = ("tf32", "ieee")  # what float32 matmuls may be computed in


@dataclass(frozen=True)
class Tile:
    """Shape of a matmul tile: rows and columns of the output, step of the reduction, and how it is run."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def count(self, rows: int, columns: int) -> int:
        """How many of them cover an output of ``rows`` by ``columns``."""
        return triton.cdiv(rows, self.rows) * triton.cdiv(columns, self.columns)

    def launch_options(self) -> dict:
        """The keyword arguments of a launch that stand for this tile."""
        return {
            "BLOCK_M": self.rows,
            "BLOCK_N": self.columns,
            "BLOCK_K": self.depth,
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": False,  # gates are the same bits everywhere only if nothing is contracted
        }


@dataclass(frozen=True)
class Architecture:
    """What the rules need to know of a device, and its tiles from large to small for each use."""

    multiprocessors: int
    tiles: dict[str, tuple[Tile, ...]]


# "half": float16 and bfloat16, "tf32": float32 on the tensor cores, "ieee": float32 by multiply-adds.
# Convolutions have
# tiles of their own: the places of a gathered patch take the registers that a larger tile would need.
ARCHITECTURES = {
    80: Architecture(
        108,
        {
            "linear half": (Tile(128, 64, 16, 8, 3), Tile(64, 32, 32, 4, 3)),
            "linear tf32": (Tile(128, 64, 16, 8, 3), Tile(64, 32, 32, 4, 3)),
            "linear ieee": (Tile(64, 64, 16, 8, 2), Tile(32, 32, 16, 4, 2)),
            "conv half": (Tile(64, 64, 32, 8, 2), Tile(64, 32, 16, 4, 3)),
            "conv tf32": (Tile(64, 64, 16, 4, 3), Tile(64, 32, 16, 4, 3)),
            "conv ieee": (Tile(64, 32, 16, 4, 2), Tile(32, 32, 16, 4, 2)),
        },
    ),
    90: Architecture(
        132,
        {
            "linear half": (Tile(128, 64, 32, 8, 2), Tile(64, 32, 64, 4, 3)),
            "linear tf32": (Tile(64, 64, 32, 4, 3), Tile(64, 32, 32, 4, 3)),
            "linear ieee": (Tile(64, 64, 16, 8, 2), Tile(32, 32, 16, 4, 2)),
            "conv half": (Tile(64, 64, 32, 4, 3), Tile(64, 32, 16, 4, 3)),
            "conv tf32": (Tile(64, 64, 32, 4, 3), Tile(64, 32, 16, 4, 3)),
            "conv ieee": (Tile(64, 32, 16, 4, 2), Tile(32, 32, 16, 4, 2)),
        },
    ),
}

_assumed_architecture = 80  # of tensors that are on no GPU: the interpreter, and compilation ahead of time


@contextmanager
def assume_architecture(number: int) -> Iterator[None]:
    """Within it, launches for tensors that are on no GPU take the tiles of that architecture."""
    global _assumed_architecture
    before, _assumed_architecture = _assumed_architecture, number
    try:
        yield
    finally:
        _assumed_architecture = before


@functools.cache
def _number_of_device(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return max((number for number in ARCHITECTURES if number <= 10 * major + minor), default=min(ARCHITECTURES))


def architecture_of(tensor: Tensor) -> Architecture:
    """The table's newest architecture that is not newer than the tensor's device."""
    return ARCHITECTURES[_number_of_device(tensor.get_device()) if tensor.is_cuda else _assumed_architecture]


def operand_class(operation: str, dtype: torch.dtype, precision: str) -> str:
    """The table's key of an operation, such as ``linear tf32``; ``ValueError`` for an unknown precision."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    return f"{operation} {precision if dtype == torch.float32 else 'half'}"


def choose_tile(operation: str, tensor: Tensor, precision: str, rows: int, columns: int) -> Tile:
    """The tile for an output of ``rows`` by ``columns``: the largest that leaves no multiprocessor idle.

    Args:
        operation: "linear" or "conv".
        tensor: an operand; its device and dtype choose the row of the table.
        precision: of float32 operands, "tf32" or "ieee".
    """
    architecture = architecture_of(tensor)
    candidates = architecture.tiles[operand_class(operation, tensor.dtype, precision)]
    for tile in candidates:
        if tile.count(rows, columns) >= architecture.multiprocessors:
            return tile
    return candidates[-1]


def choose_splits(tensor: Tensor, tiles: int, depth: int, step: int) -> int:
    """Into how many parts a reduction of length ``depth`` is split so that every multiprocessor has work.

    Each part keeps at least 8 steps, so that its partial sums are worth the memory that they pass through.
    """
    wanted = triton.cdiv(2 * architecture_of(tensor).multiprocessors, max(tiles, 1))
    return max(1, min(wanted, depth // (8 * step), 64))
