"""The kernels of a training step, by PyTorch's profiler."""

import json

import pytest
import torch
from ffw_fast.benchmarks import step_profile
from ffw_fast.benchmarks.jobs import TINY_JOBS

from ffw_fast.tables import print_table


def test_the_kernels_are_those_of_a_step(capsys):
    profiled = step_profile.profile_step(TINY_JOBS[1], "fp32", torch.device("cpu"), steps=4)
    calls = {row["kernel"]: row["calls"] for row in profiled["kernels"]}
    assert calls["ffw_fast::gated_adam_step_"] == 1
    assert calls["ffw_fast::objective"] == 1
    seconds = [row["seconds"] for row in profiled["kernels"]]
    assert seconds == sorted(seconds, reverse=True)
    assert profiled["busy"] == pytest.approx(sum(seconds))
    assert profiled["step"] > 0
    print_table(step_profile.profile_table(profiled))
    printed = capsys.readouterr().out
    assert "Tiny perceptron, fp32" in printed
    assert f"{len(seconds) - step_profile.KERNELS} others" in printed


def test_the_command_writes_all_kernels(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(step_profile, "JOBS", TINY_JOBS)
    target = tmp_path / "profile.json"
    step_profile.main(["--only", "perceptron", "--steps", "2", "--json", str(target)])
    written = json.loads(target.read_text())
    assert [row["workload"] for row in written["steps"]] == ["Tiny perceptron"]
    assert written["machine"]["torch"] == torch.__version__
    assert "us a step" in capsys.readouterr().out


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        step_profile.main(["--steps", "0"])
