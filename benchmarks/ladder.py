"""All GPU kernels in one table, Triton and CUDA C++ together: what their machine code says, and whether budgets hold.

``python -m ffw_fast.benchmarks.ladder`` compiles every kernel for sm_80 and sm_90 and needs no GPU; nvcc for the CUDA
C++ ones. Occupancy is reckoned from the limits of a multiprocessor. None of this is a speed. It ends with an error
where a budget is not kept; ``make gpu-check`` runs it last.
"""

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from ffw_fast.benchmarks import cuda_code
from ffw_fast.benchmarks.sass import LIMITS
from rich.table import Table

from ffw_fast.backend import find_nvcc
from ffw_fast.tables import print_table


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture; sizes in bytes a block, occupancy as a share of the warps."""

    kernel: str
    architecture: int
    registers: int
    shared: int
    spills: int
    load_bits: int
    tensor_core: str
    occupancy: float
    planned: float
    broken: list[str]


def triton_rows(architectures: tuple[int, ...]) -> Iterator[Row]:
    """Every case of ``triton_code``."""
    from ffw_fast.benchmarks import triton_code

    for case in triton_code.all_cases():
        for number in architectures:
            for result in triton_code.check_case(case, number):
                code, limits = result.code, LIMITS[number]
                yield Row(
                    f"{result.kernel} ({case.name})", number, code.registers, code.shared, code.spills, code.load_bits,
                    " ".join(code.tensor_core), code.occupancy(limits),
                    result.budget.blocks * code.warps / limits.warps, result.broken,
                )  # fmt: skip


def cuda_rows(architectures: tuple[int, ...]) -> Iterator[Row]:
    """Every kernel of ``csrc/cuda``; occupancy is an A100's."""
    with tempfile.TemporaryDirectory() as folder:
        for number in architectures:
            cubin = Path(folder, f"sm_{number}.cubin")
            cuda_code.compile_kernels(cubin, number)
            for kernel in cuda_code.read_kernels(cubin, number):
                budget, code = cuda_code.BUDGETS[kernel.name], kernel.code
                share = budget.warps / cuda_code.A100.warps
                yield Row(
                    f"{kernel.name} {kernel.variant}".strip() + " (CUDA C++)", number, code.registers, budget.shared,
                    code.spills, code.load_bits, "", kernel.blocks * share, budget.blocks * share,
                    kernel.problems(),
                )  # fmt: skip


def table_of(rows: list[Row]) -> Table:
    """One line a kernel and architecture."""
    table = Table(title="GPU kernels, compiled without a GPU: their machine code and its budgets (nothing is a speed)")
    table.add_column("kernel")
    for title in ("sm", "registers", "shared", "spills", "widest load", "tensor core", "occupancy", "planned"):
        table.add_column(title, justify="right")
    table.add_column("budget")
    for row in rows:
        table.add_row(
            row.kernel, str(row.architecture), str(row.registers), str(row.shared), str(row.spills),
            f"{row.load_bits} bits", row.tensor_core or "-", f"{row.occupancy:.0%}", f">= {row.planned:.0%}",
            "; ".join(row.broken) or "kept",
        )  # fmt: skip
    return table


def missing() -> dict[str, str]:
    """Which kernels cannot be looked at here, and why."""
    found = {}
    if util.find_spec("triton") is None:
        found["Triton"] = "the package triton is missing: pip install 'ffw_fast[triton]'"
    if find_nvcc() is None or cuda_code.find_cuobjdump() is None:
        found["CUDA C++"] = "nvcc or cuobjdump is missing: they come with the CUDA toolkit"
    return found


def main() -> int:
    """Print the table; 1 if a budget is not kept, 2 if there is nothing to look at."""
    architectures, left_out = tuple(LIMITS), missing()
    rows = [] if "Triton" in left_out else list(triton_rows(architectures))
    rows += [] if "CUDA C++" in left_out else list(cuda_rows(architectures))
    for kind, reason in left_out.items():
        print(f"no {kind} kernels: {reason}", file=sys.stderr)
    if not rows:
        return 2
    print_table(table_of(rows))
    broken = sum(bool(row.broken) for row in rows)
    print(f"{len(rows)} kernels; {broken or 'no'} budget{'' if broken == 1 else 's'} broken")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
