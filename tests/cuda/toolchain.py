"""Compiles the CUDA kernels' own sources for the CPU, under ``emulation.h``."""

import os
import shutil
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
KERNELS = ("gate", "gated_adam", "linear_head", "mutual_information", "objective")
FLAGS = ("-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror")
FLAGS += ("-Wno-unknown-pragmas", "-Wno-unused-function")


def compiler() -> str | None:
    """A GCC that knows 16-bit floats, which the emulation of ``__half`` takes from it."""
    name = shutil.which(os.environ.get("CXX", "g++"))
    if name is None:
        return None
    probe = subprocess.run(
        [name, "-std=c++17", "-x", "c++", "-fsyntax-only", "-"], input="_Float16 x;", text=True, capture_output=True
    )
    return name if probe.returncode == 0 else None


def _run(*command: str | Path, **options) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stderr}"


def build_driver(target: Path, *flags: str, csrc: Path = CSRC) -> Path:
    """``driver.cpp`` with the kernels of that source tree."""
    name = compiler()
    assert name is not None
    _run(name, *FLAGS, *flags, "-I", csrc / "cuda", "-include", HERE / "emulation.h", HERE / "driver.cpp", "-o", target)
    return target


def build_operators(target: Path) -> Path:
    """All ``csrc/cuda/*.cu`` as one library of operators on CPU tensors, namespace ``ffw_emulated``."""
    name, folder = compiler(), Path(torch.__file__).parent
    assert name is not None
    source = "".join(f'#include "{kernel}.cu"\n' for kernel in (*KERNELS, "double"))
    _run(
        *(name, *FLAGS, "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
        *("-isystem", folder / "include", "-I", CSRC / "cuda", "-include", HERE / "emulated_operators.h"),
        *("-x", "c++", "-", "-o", target, "-L", folder / "lib", "-ltorch_cpu"),
        input=source,
    )
    return target
