"""Masked layers against dense ones: every layer of the networks once, and a ratio for each."""

import json

import pytest
import torch
from ffw_fast.benchmarks import masked_layers
from ffw_fast.benchmarks.jobs import JOBS, TINY_JOBS, layers_of

from ffw_fast import ops


def test_a_ratio_for_every_layer(tmp_path, capsys):
    masked_layers.main(["--tiny", "--seconds", "0", "--json", str(tmp_path / "ratios.json")])
    rows = json.loads((tmp_path / "ratios.json").read_text())["rows"]
    assert [row["layer"] for row in rows] == [layer.shape for job in TINY_JOBS for layer in layers_of(job)]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["masked_seconds"] / row["dense_seconds"])
        assert row["turns"] == masked_layers.FEWEST
    assert rows[0]["layer"] in capsys.readouterr().out


def test_no_ratio_for_a_wrong_result(monkeypatch):
    monkeypatch.setattr(ops, "gate_weight_backward", lambda grad, weight, *_: torch.zeros_like(weight))
    with pytest.raises(AssertionError, match="result 1 differs"):
        masked_layers.measure_layer(layers_of(TINY_JOBS[0])[0], 4, 0)


def test_layers_of_the_networks():
    names = {job.name: [layer.shape for layer in layers_of(job)] for job in JOBS if "CelebA" not in job.name}
    assert names["Multi-Color MNIST"] == ["100x2352 on 2352", "100x100 on 100", "10x100 on 100"]
    assert names["Biased-MNIST"][-2:] == ["128x64x7x7 on 64x28x28", "10x128 on 128"]
    assert len(names["Corrupted CIFAR-10"]) == 12
    first, *others = layers_of(JOBS[0])
    assert first.is_first
    assert not any(layer.is_first for layer in others)
    assert first.flops == 2 * 16 * 3 * 7 * 7 * 28 * 28
