"""The benchmark for GPUs in its dry mode: the same code on the CPU, and what a failure leaves."""

import json
import sys

import pytest
import torch
from ffw_fast.benchmarks import gpu, jobs

from ffw_fast import ops


@pytest.fixture
def in_process(monkeypatch):
    """Sections run in this process, ``build`` fails."""

    def run(name, dry, limit):
        if name == "build":
            return {"seconds": 0.0, "problem": "no compiler", "figures": None}
        return {"seconds": 0.0, "problem": None, "figures": None if name == "tests" else gpu.SECTIONS[name](dry)}

    monkeypatch.setattr(gpu, "run_section", run)


def test_dry_run_survives_a_failed_section(in_process, tmp_path, capsys):
    target = tmp_path / "gpu.json"
    gpu.main(["--dry", "--json", str(target)])
    written = json.loads(target.read_text())
    assert written["dry"] is True
    sections = written["sections"]
    assert sections["build"]["problem"] == "no compiler"
    operators = sections["operators"]["figures"]
    assert {row["operator"].split()[0] for row in operators} <= set(ops.DEFAULTS)
    assert all(row["error"] <= gpu.TOLERANCE and row["ours"] > 0 and row["eager"] > 0 for row in operators)
    rows = sections["workloads"]["figures"]
    assert [row["workload"] for row in rows] == [job.name for job in jobs.TINY_JOBS]
    assert all(row["gate_step"] > 0 and row["projected_on_a100"] > 0 for row in rows)
    printed = capsys.readouterr().out
    assert "build: no compiler" in printed and "gated_adam_step_ bernoulli" in printed


def test_no_speed_is_told_of_a_wrong_result(monkeypatch):
    monkeypatch.setattr(gpu, "_error", lambda a, b: 1.0)
    assert all("ours" not in row for row in gpu.operators(True))


def test_a_section_has_a_process_and_a_limit_of_its_own():
    result = gpu.run_section("build", dry=True, limit=300)
    assert result["problem"] is None
    assert result["figures"]["run"] is False
    result = gpu.run_section("build", dry=True, limit=0.01)
    assert "not done after" in result["problem"] and result["figures"] is None


def test_the_time_of_all_sections_is_under_ten_minutes():
    assert gpu.LIMITS.keys() == gpu.SECTIONS.keys()
    assert sum(gpu.LIMITS.values()) < 600


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_what_to_do():
    with pytest.raises(SystemExit, match="--dry"):
        gpu.main([])


@pytest.mark.slow
def test_the_kernel_tests_are_collected():
    result = gpu.tests(dry=True)
    assert result["passed"], result["output"]
    assert "collected" in result["summary"] or "test" in result["summary"], sys.version
