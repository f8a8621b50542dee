import json

import pytest
import torch
from torch import nn

from ffw_fast.sizes import compare_sizes, sizes_table


def networks():
    large = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16, 4)).eval()
    small = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 16, 4)).eval()
    with torch.no_grad():
        large[0].weight[:2] = 0
    return {"with zeros": large, "compact": small}


@pytest.fixture(scope="module")
def sizes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ffw_fast.sizes.LATENCY_SECONDS", 0.05)
        return compare_sizes(networks(), torch.randn(5, 3, 6, 6))


def test_parameters_and_multiplications_are_counted(sizes):
    large, small = (sizes["networks"][name] for name in ("with zeros", "compact"))
    assert large["parameters"] == 8 * 27 + 2 * 8 + 4 * 128 + 4
    assert large["nonzero"] == large["parameters"] - 2 * 27 - 8  # the batch norm's bias is 0
    assert large["macs"] == 16 * 8 * 27 + 4 * 128  # sixteen positions
    assert small["macs"] == large["macs"] / 2
    assert sizes["batch_size"] == 5
    assert sizes["device"] == "cpu"


def test_time_and_bytes_are_measured(sizes):
    for size in sizes["networks"].values():
        assert 0 < size["latency_seconds"] < 10
    large, small = sizes["networks"].values()
    assert large["file_bytes"] - small["file_bytes"] == pytest.approx(4 * (4 * 27 + 4 * 4 + 4 * 64), abs=64)


def test_the_table_tells_every_size_and_the_ratio(sizes):
    assert json.loads(json.dumps(sizes)) == sizes
    table = sizes_table(sizes)
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    assert [str(column.header) for column in table.columns] == ["", "with zeros", "compact", "first / last"]
    assert columns[1][0] == "748"
    assert columns[3][2] == "2.00"
    assert "latency of 5 samples, ms" in columns[0]
