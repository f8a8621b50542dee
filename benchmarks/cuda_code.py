"""The machine code of the CUDA kernels against budgets; needs nvcc, no GPU.

``python -m ffw_fast.benchmarks.cuda_code`` compiles ``csrc/cuda`` for sm_80 and sm_90 and prints, for every kernel:
registers, shared memory a block, local memory, 16-byte loads and stores, FP64 instructions and subroutines, and how
many blocks an A100 holds at a time. It ends with an error where a budget is not kept. Nothing here is a speed.
"""

import argparse
import os
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from ffw_fast.benchmarks import sass
from ffw_fast.benchmarks.sass import LIMITS, Sass

from ffw_fast.backend import find_nvcc

CSRC = Path(__file__).parents[1] / "csrc" / "cuda"
STRICT = "-warn-spills,-warn-lmem-usage,-warn-double-usage,-Werror"
A100 = LIMITS[80]

_INSTANCES = """
#include "gate.cuh"
#include "gated_adam.cuh"
#include "linear_head.cuh"
#include "mutual_information.cuh"
#include "objective.cuh"
namespace ffw::cuda {
template void launch_gate_weight(GateWeightArguments<float, float>, Kind, cudaStream_t);
template void launch_gate_weight(GateWeightArguments<__half, float>, Kind, cudaStream_t);
template void launch_gate_weight(GateWeightArguments<__nv_bfloat16, float>, Kind, cudaStream_t);
template void launch_gate_weight_backward(GateWeightBackwardArguments<float, float>, Kind, cudaStream_t);
template void launch_gate_weight_backward(GateWeightBackwardArguments<__half, float>, Kind, cudaStream_t);
template void launch_gate_weight_backward(GateWeightBackwardArguments<__nv_bfloat16, float>, Kind, cudaStream_t);
template void launch_gated_adam(GatedAdamArguments<float, float>, Kind, cudaStream_t);
template void launch_gated_adam(GatedAdamArguments<__half, float>, Kind, cudaStream_t);
template void launch_gated_adam(GatedAdamArguments<__nv_bfloat16, float>, Kind, cudaStream_t);
template void launch_fit_linear_head(HeadArguments<float>, cudaStream_t);
template void launch_mutual_information(InformationArguments<float>, cudaStream_t);
template void launch_mutual_information(InformationArguments<__half>, cudaStream_t);
template void launch_mutual_information(InformationArguments<__nv_bfloat16>, cudaStream_t);
template void launch_mutual_information_backward(const InformationBackwardArguments<float>&, cudaStream_t);
template void launch_mutual_information_backward(const InformationBackwardArguments<__half>&, cudaStream_t);
template void launch_mutual_information_backward(const InformationBackwardArguments<__nv_bfloat16>&, cudaStream_t);
template void launch_objective(ObjectiveArguments<float>, cudaStream_t);
template void launch_objective(ObjectiveArguments<__half>, cudaStream_t);
template void launch_objective(ObjectiveArguments<__nv_bfloat16>, cudaStream_t);
}
"""


@dataclass(frozen=True)
class Budget:
    """What a kernel may use: blocks an A100 must hold at a time, and the 16-byte accesses that it must have."""

    threads: int
    blocks: int
    shared: int = 0
    loads: int = 0
    stores: int = 0

    @property
    def warps(self) -> int:
        return self.threads // sass.WARP


def _objective_shared_memory() -> int:
    """Bytes the block of ``objective`` takes for Multi-Color MNIST's minibatch."""
    samples, targets, heads, classes = 100, 10, 2, 10
    a_head, a_task = classes | 1, targets | 1  # rows begin in different banks
    numbers = heads * classes * (a_head + 4) + 2 * 32 + samples * (heads * a_head + a_task)
    return 4 * (numbers + (samples + 1) * heads)


_ADAM_SHARED = 48 + 48 + 8 * 4 + 4  # GatedAdamShared<float>, at most
BUDGETS = {
    "gate_weight float": Budget(256, 5, loads=2, stores=1),
    "gate_weight half": Budget(256, 5, loads=3, stores=1),
    "gate_weight bfloat16": Budget(256, 5, loads=3, stores=1),
    "gate_weight_backward float": Budget(256, 5, loads=3, stores=1),
    "gate_weight_backward half": Budget(256, 4, loads=4, stores=2),
    "gate_weight_backward bfloat16": Budget(256, 4, loads=4, stores=2),
    "gated_adam float": Budget(256, 3, _ADAM_SHARED, loads=5, stores=4),
    "gated_adam half": Budget(256, 2, _ADAM_SHARED, loads=8, stores=7),
    "gated_adam bfloat16": Budget(256, 2, _ADAM_SHARED, loads=8, stores=7),
    # One block a head: it has a multiprocessor to itself, and all the shared memory that it can use.
    "fit_linear_head shared": Budget(512, 1, 163 * 1024, loads=3),
    "fit_linear_head parameters_shared": Budget(512, 1, 163 * 1024, loads=10),
    "fit_linear_head weight_shared": Budget(512, 1, 163 * 1024, loads=9),
    "fit_linear_head global": Budget(512, 1, 163 * 1024, loads=13),
    "mutual_information float": Budget(256, 2, 12 * 1024),
    "mutual_information half": Budget(256, 2, 12 * 1024),
    "mutual_information bfloat16": Budget(256, 2, 12 * 1024),
    "mutual_information_backward float": Budget(256, 4, 4 * 4 * 10),
    "mutual_information_backward half": Budget(256, 4, 4 * 4 * 10),
    "mutual_information_backward bfloat16": Budget(256, 4, 4 * 4 * 10),
    # One block altogether.
    "objective float": Budget(1024, 1, _objective_shared_memory()),
    "objective half": Budget(1024, 1, _objective_shared_memory()),
    "objective bfloat16": Budget(1024, 1, _objective_shared_memory()),
}


@dataclass
class Kernel:
    """What the machine code of one kernel holds."""

    name: str  # with its types, as in BUDGETS
    variant: str  # the gate's kind, where joints are kept, or nothing
    architecture: int
    code: Sass

    @property
    def loads(self) -> int:
        """Of 16 bytes, from global memory."""
        return self.code.count(r"LDG(STS)?\.E(\.\w+)*?\.128\b")

    @property
    def stores(self) -> int:
        """Of 16 bytes, to global memory."""
        return self.code.count(r"STG\.E(\.\w+)*?\.128\b")

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor of an A100 holds at a time."""
        budget = BUDGETS[self.name]
        return sass.resident_blocks(A100, self.code.registers, budget.shared, budget.warps)

    def problems(self) -> list[str]:
        """The budgets that are not kept."""
        budget, code = BUDGETS[self.name], self.code
        found = {
            f"{code.stack} bytes of stack": code.stack > 0,
            f"{code.spills} accesses to local memory": code.spills > 0,
            f"{code.doubles} FP64 instructions": code.doubles > 0,
            f"{code.subroutines} subroutines": code.subroutines > 0,
            f"{self.loads} 16-byte loads, not {budget.loads}": self.loads < budget.loads,
            f"{self.stores} 16-byte stores, not {budget.stores}": self.stores < budget.stores,
            f"{self.blocks} blocks a multiprocessor, not {budget.blocks}": self.blocks < budget.blocks,
        }
        return [text for text, holds in found.items() if holds]


def find_cuobjdump() -> str | None:
    """The disassembler, of the CUDA toolkit or of Triton's wheel."""
    nvcc, triton = find_nvcc(), util.find_spec("triton")
    folders = [str(Path(nvcc).parent)] if nvcc else []
    if triton is not None and triton.origin:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(folders))


def compile_kernels(target: Path, architecture: int, csrc: Path = CSRC) -> None:
    """All kernels but those of ``double.cu``; spills, local memory and double precision are errors."""
    nvcc = find_nvcc()
    assert nvcc is not None
    flags = ("-std=c++17", "-O3", "-cubin", f"-arch=sm_{architecture}", "-Xptxas", STRICT, "-I", csrc)
    sass.run_tool(nvcc, *flags, "-x", "cu", "-", "-o", target, input=_INSTANCES)


_KINDS = ("ffw", "hard", "bernoulli", "concrete")
_PLACEMENTS = ("shared", "parameters_shared", "weight_shared", "global")
_JOINTS = ("global joints", "shared joints")
_TYPES = (("13__nv_bfloat16", "bfloat16"), ("6__half", "half"), ("f", "float"))


def _names(mangled: str) -> tuple[str, str]:
    """Name in BUDGETS and variant, from the mangled name of ffw::cuda::..._kernel<...>."""
    match = re.match(r"_ZN3ffw4cuda\d+(\w+?)_kernelI(.*?)EEvNS0_", mangled)
    assert match is not None, mangled
    base, types = match.groups()
    kind = re.search(r"4KindE(\d)", types)
    placement = re.search(r"9PlacementE(\d)", types)
    if placement:
        return f"{base} {_PLACEMENTS[int(placement[1])]}", ""
    joints = re.search(r"Lb([01])", types)
    rest = types[kind.end() :].removeprefix("E") if kind else types
    stored = next(name for code, name in _TYPES if rest.startswith(code))
    variant = _JOINTS[int(joints[1])] if joints else _KINDS[int(kind[1])] if kind else ""
    return f"{base} {stored}", variant


def read_kernels(cubin: Path, architecture: int) -> list[Kernel]:
    """Every kernel in a compiled file, in the order of ``BUDGETS``."""
    cuobjdump = find_cuobjdump()
    assert cuobjdump is not None
    kernels = [Kernel(*_names(mangled), architecture, code) for mangled, code in sass.read(cubin, cuobjdump).items()]
    return sorted(kernels, key=lambda kernel: (list(BUDGETS).index(kernel.name), kernel.variant))


def table(kernels: list[Kernel]) -> str:
    """One line a kernel."""
    heads = ("kernel", "sm", "registers", "shared", "local", "LDG.128", "STG.128", "FP64", "routines")
    rows: list[tuple[str, ...]] = [(*heads, "blocks/SM", "budget")]
    for k in kernels:
        kept = "; ".join(k.problems()) or "kept"
        sizes = (k.code.registers, BUDGETS[k.name].shared, k.code.stack)
        counts = (k.loads, k.stores, k.code.doubles, k.code.subroutines)
        planned = f"{k.blocks} (>= {BUDGETS[k.name].blocks})"
        rows.append((f"{k.name} {k.variant}".strip(), *map(str, (k.architecture, *sizes, *counts)), planned, kept))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--architecture", type=int, choices=sorted(LIMITS), action="append", help="default: all of them"
    )
    architectures = parser.parse_args().architecture or sorted(LIMITS)
    for what, found in (("nvcc", find_nvcc()), ("cuobjdump", find_cuobjdump())):
        if found is None:
            print(f"{what} is missing: it comes with the CUDA toolkit, cuobjdump also with Triton", file=sys.stderr)
            return 2
    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        for architecture in architectures:
            cubin = Path(folder, f"sm_{architecture}.cubin")
            compile_kernels(cubin, architecture)
            kernels += read_kernels(cubin, architecture)
    print(table(kernels))
    return 1 if any(kernel.problems() for kernel in kernels) else 0


if __name__ == "__main__":
    sys.exit(main())
