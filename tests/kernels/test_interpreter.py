"""Runs ``cases/`` under Triton's interpreter, each file in a process of its own.

The variable that turns the interpreter on must be set before Triton is imported and holds for a whole
process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = sorted(path.name for path in (Path(__file__).parent / "cases").glob("test_*.py"))


@pytest.mark.parametrize("name", CASES)
def test_in_the_interpreter(name):
    pytest.importorskip("triton", reason="the Triton kernels need the package triton")
    result = run(name, "not slow")
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_longer_ones_in_the_interpreter(name):
    pytest.importorskip("triton", reason="the Triton kernels need the package triton")
    result = run(name, "slow")
    nothing_there = result.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    assert result.returncode == 0 or nothing_there, result.stdout[-6000:] + result.stderr[-2000:]


def run(name: str, marked: str) -> subprocess.CompletedProcess:
    path = Path(__file__).parent / "cases" / name
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", marked, str(path)]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment = inherited | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
