"""The rules that pick tiles."""

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need the package triton")

from ffw_fast.kernels import tiles

HALF = torch.zeros(1, dtype=torch.bfloat16)


def choose(rows, columns, tensor=HALF, precision="ieee", operation="linear"):
    return tiles.choose_tile(operation, tensor, precision, rows, columns)


def test_large_outputs_get_the_large_tile():
    large, small = tiles.ARCHITECTURES[80].tiles["linear half"]
    assert choose(128 * 108, 64) == large
    assert choose(128 * 107, 64) == small
    assert choose(1, 1) == small


def test_table_is_chosen_by_architecture_operation_and_precision():
    with tiles.assume_architecture(90):
        assert choose(10**5, 64) == tiles.ARCHITECTURES[90].tiles["linear half"][0]
    single = torch.zeros(1)
    for precision in tiles.PRECISIONS:
        expected = tiles.ARCHITECTURES[80].tiles[f"conv {precision}"][0]
        assert choose(10**5, 10**3, single, precision, "conv") == expected


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="fp8"):
        choose(1, 1, precision="fp8")


@pytest.mark.parametrize(("tiles_there", "depth", "expected"), [(1000, 10**6, 1), (1, 100, 1), (54, 10**6, 4)])
def test_splits(tiles_there, depth, expected):
    assert tiles.choose_splits(HALF, tiles_there, depth, 16) == expected


def test_splits_are_bounded_and_long_enough():
    assert tiles.choose_splits(HALF, 1, 10**9, 16) == 64
    assert tiles.choose_splits(HALF, 1, 16 * 8 * 5, 16) == 5
