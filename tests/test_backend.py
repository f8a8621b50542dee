"""Loading the compiled kernels, and what is said where that fails. Each case in a process of its own."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ffw_fast.backend
from ffw_fast.backend import backend_info, find_nvcc, requested_backend

PACKAGE = Path(ffw_fast.backend.__file__).parent

# Runs on a copy of the package's Python files in the current folder, so that the library can be missing or broken.
REPORT = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from ffw_fast import backend
    backend.load()
    backend.load()
import torch
from ffw_fast import ops, philox
ones = torch.ones(8)
gated = ops.gate_weight(ones, -ones, torch.tensor(1.0), philox.make_draw(), 0)
print(json.dumps({
    "info": backend.backend_info(), "gated": gated[0].item(), "file": backend.__file__,
    "warnings": [str(warning.message) for warning in caught if "ffw_fast" in str(warning.message)],
}))
"""


def run(folder: Path, backend: str | None = None) -> subprocess.CompletedProcess:
    """The report of a fresh process that has the package from that folder."""
    environment = {key: value for key, value in os.environ.items() if key != "FFW_FAST_BACKEND"}
    environment |= {"PYTHONPATH": str(folder)} | ({"FFW_FAST_BACKEND": backend} if backend else {})
    command = [sys.executable, "-c", REPORT]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


def report(folder: Path, backend: str | None = None) -> dict:
    done = run(folder, backend)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert Path(result["file"]).parent.parent == folder
    assert result["gated"] == pytest.approx(2 / (1 + 2.718281828), rel=1e-6)  # whatever kernel did it
    return result


@pytest.fixture
def python_only(tmp_path):
    """A folder with the package's Python files and no library."""
    (tmp_path / "ffw_fast").mkdir()
    for name in ("backend", "ops", "gates", "philox", "plateau"):
        (tmp_path / "ffw_fast" / f"{name}.py").write_text((PACKAGE / f"{name}.py").read_text())
    (tmp_path / "ffw_fast" / "__init__.py").touch()
    return tmp_path


def test_info_of_this_process(compiled):
    info = backend_info()
    assert json.loads(json.dumps(info)) == info
    assert info["cpu"]["used"] == "cpp"
    assert info["cpu"]["why_not"] is None
    assert info["cpu"]["instruction_set"] in ("baseline", "avx2", "avx512")
    assert "gate_weight" in info["cpu"]["operators"]
    assert {"fit_linear_head_", "fft_conv2d"} < set(info["cpu"]["operators"])
    assert info["cuda"]["loaded"] or info["cuda"]["why_not"]


def test_missing_library_warns_once_and_works(python_only):
    result = report(python_only)
    cpu = result["info"]["cpu"]
    assert cpu["used"] == "torch"
    assert not cpu["compiled"]
    assert "FFW_FAST_BUILD=cpu pip install" in cpu["why_not"]
    assert len(result["warnings"]) == 1
    assert "slower plain-PyTorch kernels" in result["warnings"][0]


def test_broken_library_warns_once_and_works(python_only):
    library = python_only / "ffw_fast" / "_cpu.abi3.so"
    library.write_bytes(b"not a library")
    result = report(python_only)
    cpu = result["info"]["cpu"]
    assert cpu["used"] == "torch"
    assert cpu["compiled"]
    assert not cpu["loaded"]
    assert str(library) in cpu["why_not"]
    assert len(result["warnings"]) == 1


def test_torch_can_be_forced(python_only, compiled):
    (python_only / "ffw_fast" / "_cpu.abi3.so").symlink_to(compiled["library"])
    assert report(python_only)["info"]["cpu"]["used"] == "cpp"
    result = report(python_only, "torch")
    assert result["info"]["cpu"]["used"] == "torch"
    assert result["info"]["cpu"]["why_not"] == "FFW_FAST_BACKEND=torch"
    assert result["warnings"] == []


def test_compiled_kernels_can_be_forced(python_only, compiled):
    done = run(python_only, "cpp")
    assert done.returncode != 0
    assert "ImportError: FFW_FAST_BACKEND=cpp, but the compiled cpu kernels are missing" in done.stderr
    (python_only / "ffw_fast" / "_cpu.abi3.so").symlink_to(compiled["library"])
    assert report(python_only, "cpp")["info"]["cpu"]["used"] == "cpp"


def test_unknown_backend(monkeypatch):
    monkeypatch.setenv("FFW_FAST_BACKEND", "fast")
    with pytest.raises(ValueError, match="FFW_FAST_BACKEND must be one of auto, cpp, cuda, triton, torch, got 'fast'"):
        requested_backend()


@pytest.mark.parametrize("home", ["CUDA_HOME", "CUDA_PATH", "PATH"])
def test_the_nvcc_that_is_named_is_the_one_that_builds(home, tmp_path, monkeypatch):
    setup = Path(__file__).parents[1] / "setup.py"
    if not setup.exists():
        pytest.skip("needs a source checkout")
    (function,) = (part for part in ast.parse(setup.read_text()).body if getattr(part, "name", None) == "find_nvcc")
    names: dict = {"os": os, "shutil": shutil, "Path": Path}
    exec(compile(ast.Module([function], []), str(setup), "exec"), names)

    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(home, str(tmp_path if home != "PATH" else nvcc.parent))
    assert find_nvcc() == names["find_nvcc"]()
    assert home == "PATH" or find_nvcc() == str(nvcc)
