"""What annealing costs: a ratio for every kind of gate that has a temperature, of sides that differ in nothing else."""

import json

import pytest
import torch
from ffw_fast.benchmarks import annealing
from ffw_fast.benchmarks.jobs import TINY_JOBS

from ffw_fast.gates import GateKind


def test_a_ratio_for_every_kind(tmp_path, capsys):
    annealing.main(["--tiny", "--seconds", "0", "--json", str(tmp_path / "ratios.json")])
    rows = json.loads((tmp_path / "ratios.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == ["ffw", "bernoulli", "concrete"]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["with_seconds"] / row["without_seconds"])
        assert row["turns"] == annealing.FEWEST
    assert "bernoulli" in capsys.readouterr().out


def test_both_sides_do_the_same_work():
    plain, annealed = (annealing.make_optimizer(TINY_JOBS[0], GateKind.FFW) for _ in range(2))
    (first,), (second,) = (optimizer._gates.values() for optimizer in (plain, annealed))
    before = first.movement.clone()
    annealing.step(plain, None)
    annealing.step(annealed, annealing.ANNEAL_RATE)
    assert torch.equal(first.scores, second.scores)
    assert second.temperature == pytest.approx(1.0)
    assert first.movement == before, "not measured"
    assert second.movement != before
