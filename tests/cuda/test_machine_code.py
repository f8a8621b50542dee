"""nvcc's machine code against its budgets, and the CUDA library as setup.py builds it. No GPU is needed."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ffw_fast.benchmarks import cuda_code

from ffw_fast.backend import find_nvcc
from tests.cuda.conftest import OPERATORS
from tests.cuda.toolchain import CSRC

ROOT = Path(__file__).parents[2]

# What the library may ask of others: PyTorch's stable C functions, and the C and C++ runtimes.
ALLOWED = re.compile(r"(aoti_torch_|torch_)\w+|_ITM_\w+|__gmon_start__|.*@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+")


@pytest.fixture(scope="module")
def needs_nvcc():
    if find_nvcc() is None:
        pytest.skip("needs nvcc")


@pytest.fixture(scope="module")
def needs_cuobjdump(needs_nvcc):
    if cuda_code.find_cuobjdump() is None:
        pytest.skip("needs cuobjdump, of the CUDA toolkit or of Triton's wheel")


def assert_budgets(tmp_path, architecture):
    cubin = tmp_path / "kernels.cubin"
    cuda_code.compile_kernels(cubin, architecture)  # spills, local memory and FP64 are errors of the compiler here
    kernels = cuda_code.read_kernels(cubin, architecture)
    print(cuda_code.table(kernels))
    assert {kernel.name for kernel in kernels} == set(cuda_code.BUDGETS)
    assert len(kernels) == 3 * 3 * 4 + 4 + 2 * 3 + 3 * 2
    problems = {f"{kernel.name} {kernel.variant}": kernel.problems() for kernel in kernels if kernel.problems()}
    assert not problems


def test_budgets_on_an_a100(needs_cuobjdump, tmp_path):
    assert_budgets(tmp_path, 80)


@pytest.mark.slow
def test_budgets_on_hopper(needs_cuobjdump, tmp_path):
    assert_budgets(tmp_path, 90)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        ("cuda/gate.cuh", "*= gate_value", "/= gate_value", "subroutines"),
        ("cuda/gate.cuh", "*= gate_value", "*= 1.1 * gate_value", "double precision"),
        ("cuda/gate.cuh", "a.aligned && start + n <= a.count", "false", "16-byte loads"),
    ],
)
def test_a_broken_budget_is_seen(needs_cuobjdump, tmp_path, file, old, new, problem):
    csrc = shutil.copytree(CSRC, tmp_path / "csrc")
    source = (csrc / file).read_text()
    assert old in source
    (csrc / file).write_text(source.replace(old, new))
    cubin = tmp_path / "kernels.cubin"
    if problem == "double precision":
        with pytest.raises(RuntimeError, match=problem):
            cuda_code.compile_kernels(cubin, 80, csrc / "cuda")
        return
    cuda_code.compile_kernels(cubin, 80, csrc / "cuda")
    found = [text for kernel in cuda_code.read_kernels(cubin, 80) for text in kernel.problems()]
    assert any(problem in text for text in found), found


LOAD = """
import ctypes, sys
ctypes.CDLL(sys.argv[2], mode=ctypes.RTLD_GLOBAL)
import torch
from ffw_fast import ops
from ffw_fast.backend import find_nvcc
torch.ops.load_library(sys.argv[1])
for name in sys.argv[3:]:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ffw_fast::{name}", "CUDA"), name
"""


@pytest.mark.slow
def test_the_library_links_and_registers_every_operator(needs_nvcc, tmp_path):
    """Built as setup.py does; PyTorch's CUDA library, where there is none, is one function that is never called."""
    torch_folder, library = Path(torch.__file__).parent, tmp_path / "_cuda.so"
    nvcc = find_nvcc()
    flags = ("-shared", "-std=c++17", "-O3", "-arch=sm_80", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA")
    sources = sorted(map(str, (CSRC / "cuda").glob("*.cu")))
    target = ("-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{torch_folder}/include", f"-L{torch_folder}/lib")
    subprocess.run([nvcc, *flags, *target, *sources, "-ltorch_cpu", "-o", library], check=True)

    listed = subprocess.run(["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True)
    undefined = [line.split()[-1].replace("@@", "@") for line in listed.stdout.splitlines()]
    assert [name for name in undefined if not ALLOWED.fullmatch(name)] == []

    stub = tmp_path / "stub.so"
    code = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }'
    subprocess.run(["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", stub], check=True, input=code, text=True)
    subprocess.run([sys.executable, "-c", LOAD, library, stub, *OPERATORS], check=True, cwd=ROOT)
