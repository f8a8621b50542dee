"""The benchmark for GPUs in its dry mode: the same code on the CPU, and what a failure leaves."""

import json
import os
import sys
import time
from dataclasses import replace

import pytest
import torch
from ffw_fast.benchmarks import gpu, gpu_sections, jobs

from ffw_fast import ops
from tests import conftest


@pytest.fixture
def in_process(monkeypatch):
    """Sections run in this process, ``build`` fails; tests are left out."""

    def run(name, dry, limit):
        done = {"seconds": 0.0, "problem": None, "figures": [], "output": ""}
        if name == "build":
            return {**done, "problem": "no compiler"}
        return done if name.endswith("tests") else {**done, "figures": list(gpu.SECTIONS[name].run(dry))}

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
    assert all(row["ours error"] <= gpu_sections.TOLERANCE for row in operators)
    assert all(row["ours"] > 0 and row["eager"] > 0 and row["floor"] > 0 for row in operators)
    rows = sections["workloads"]["figures"]
    assert [row["workload"] for row in rows] == [job.name for job in jobs.TINY_JOBS]
    assert all(row["gate_step"] > 0 and row["projected_on_a100"] > 0 and row["graph"] == "no" for row in rows)
    sides = {"dense", "pregated", "fused"}  # and no graph, which only a device has
    assert all(row.keys() == {"layer", "batch", "dtype", *sides} for row in sections["masked layers"]["figures"])
    assert all(row[side] > 0 for row in sections["masked layers"]["figures"] for side in sides)
    assert sections["here"]["figures"][0]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert "build: no compiler" in printed and "gated_adam_step_ bernoulli" in printed


def test_no_speed_is_told_of_a_wrong_result(monkeypatch):
    monkeypatch.setattr(gpu_sections, "_error", lambda a, b: 1.0)
    assert all("ours" not in row and row["eager"] > 0 for row in gpu_sections.operators(True))


def test_what_counts_as_a_wrong_result():
    a, b = torch.ones(3), torch.tensor([1.0, 1.0, 1.5])
    assert gpu_sections._error(a, a) == 0
    assert gpu_sections._error(a, b) == pytest.approx(1 / 3)
    assert not gpu_sections._error(a, torch.tensor([1.0, torch.nan, 1.0])) <= gpu_sections.TOLERANCE
    many = torch.ones(1_000_000)
    flipped = many.clone()
    flipped[7] = 0
    assert gpu_sections._error(flipped, many) == 0
    flipped[9] = 0
    assert gpu_sections._error(flipped, many) == 1


def test_an_operator_that_fails_leaves_the_others(monkeypatch):
    def fails(*_arguments):
        raise RuntimeError("an illegal memory access\nand more")

    monkeypatch.setattr(gpu_sections, "_largest_error", fails)
    rows = list(gpu_sections.operators(True))
    assert {row["ours"] for row in rows} == {"RuntimeError: an illegal memory access"}
    assert all(row["eager"] > 0 for row in rows)


def test_a_section_has_a_process_and_a_limit_of_its_own():
    result = gpu.run_section("build", dry=True, limit=300)
    assert result["problem"] is None
    assert result["figures"][0]["run"] is False
    result = gpu.run_section("build", dry=True, limit=0.01)
    assert "not done after" in result["problem"] and result["figures"] == []


HANGS = """
import json, pathlib, subprocess, sys, time
print("so far", flush=True)
pathlib.Path(sys.argv[sys.argv.index("--json") + 1]).write_text(json.dumps([{"row": 1}]))
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[0]).with_name("child").write_text(str(child.pid))
time.sleep(600)
"""


def test_what_hangs_is_ended_with_its_children_and_leaves_its_rows(monkeypatch, tmp_path):
    program = tmp_path / "python"
    program.write_text(f"#!{sys.executable}\n{HANGS}")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    result = gpu.run_section("operators", dry=True, limit=5)
    assert result["problem"] == "not done after 5 s"
    assert result["figures"] == [{"row": 1}] and result["output"] == "so far\n"
    assert has_ended((tmp_path / "child").read_text())


def has_ended(pid: str) -> bool:
    for _ in range(100):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_a_section_that_fails_says_why(monkeypatch, tmp_path):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho more\necho no device of that name\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    assert gpu.run_section("operators", dry=True, limit=60)["problem"] == "no device of that name"


def test_the_time_of_all_sections_is_under_ten_minutes(monkeypatch):
    assert gpu.TOTAL < 600
    limits = []
    clock = iter(range(0, 10_000, 100))
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(gpu, "SECTIONS", {str(i): replace(gpu.SECTIONS["build"], limit=150) for i in range(7)})
    monkeypatch.setattr(gpu, "run_section", lambda name, dry, limit: limits.append(limit) or {})
    results = gpu.run_all(True, None, list(gpu.SECTIONS))
    assert limits == [150, 150, 150, 150, 60]
    assert results["6"]["problem"] == "no time was left"


def test_what_is_missing_is_told(monkeypatch):
    monkeypatch.setattr(gpu_sections.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu_sections.shutil, "which", lambda name: None)
    found = " ".join(gpu_sections.missing())
    assert all(name in found for name in ("triton", "C compiler", "pytest-xdist", "compute-sanitizer"))


@pytest.mark.parametrize(("ruined", "left"), [(False, []), (True, [1])])
def test_a_worker_whose_device_is_ruined_makes_room(monkeypatch, ruined, left):
    def synchronize():
        if ruined:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    codes = []
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(os, "_exit", codes.append)
    conftest.pytest_runtest_logfinish()
    monkeypatch.undo()
    assert codes == left


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_what_to_do():
    with pytest.raises(SystemExit, match="--dry"):
        gpu.main([])


@pytest.mark.slow
def test_the_kernel_tests_are_collected():
    for tests in (gpu_sections.cuda_tests, gpu_sections.triton_tests):
        (row,) = tests(dry=True)
        assert row["passed"] and "collected" in row["summary"], row
