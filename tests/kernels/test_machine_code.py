"""Budgets on the machine code of the Triton kernels, compiled ahead of time: no GPU is needed."""

import dataclasses
import functools
import os
import platform

import pytest

pytest.importorskip("triton", reason="the Triton kernels need the package triton")

from ffw_fast.benchmarks import triton_code
from ffw_fast.benchmarks.sass import LIMITS
from ffw_fast.kernels import tiles

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton compiles nothing in a process that interprets", allow_module_level=True)
if platform.system() != "Linux":
    pytest.skip("Triton's assembler and disassembler exist for Linux only", allow_module_level=True)

CASES = {case.name: case for case in triton_code.all_cases()}
QUICK = (  # one of each kind of kernel, on an A100
    "gated_adam_step_, concrete fp32",
    "its score gradient, bf16",
    "conv 128-256 3x3/2 on 16x16, channels last: input gradient, tf32",
    "fit_linear_head_, 128 features",
)


@pytest.mark.parametrize("name", QUICK)
def test_budgets(name):
    check(name, 80)


@pytest.mark.parametrize(("fused", "expected"), [(False, False), (True, True)])
def test_what_decides_a_mask_is_not_contracted(fused, expected):
    with triton_code.recorded_launches() as launches:
        CASES["gate_weight, bernoulli fp32"].call()
    (launch,) = launches
    assert launch.options["enable_fp_fusion"] is False
    launch.options["enable_fp_fusion"] = fused
    assert ("fma.rn.f32" in triton_code.compile_launch(launch, 80).asm["ptx"]) is expected


def test_every_launch_forbids_contraction():
    with triton_code.recorded_launches() as launches:
        for case in CASES.values():
            case.call()
    assert all(launch.options["enable_fp_fusion"] is False for launch in launches)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sorted(LIMITS))
@pytest.mark.parametrize("name", CASES)
def test_all_budgets(name, architecture):
    check(name, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sorted(LIMITS))
@pytest.mark.parametrize("name", [name for name in CASES if "linear " in name or "its" in name or "conv" in name])
def test_every_tile_of_the_table(name, architecture):
    """Also those that this case's size does not choose. Few loads are wide where a tile is small."""
    case = CASES[name]
    operands = "half" if name.endswith("bf16") else name.rpartition(" ")[2]
    key = f"{'conv' if 'conv' in name else 'linear'} {operands}"
    for tile in tiles.ARCHITECTURES[architecture].tiles[key]:
        chosen = dataclasses.replace(case, call=functools.partial(case.call, tile=tile))
        for result in triton_code.check_case(chosen, architecture):
            assert not [claim for claim in result.broken if not claim.startswith("loads")]


def check(name, architecture):
    results = triton_code.check_case(CASES[name], architecture)
    broken = {result.kernel: result.broken for result in results if result.broken}
    assert not broken
    table = triton_code.table_of(results)
    assert table.row_count == len(results)


def test_broken_budgets_are_told():
    code = triton_code.Code(
        registers=255, stack=8, shared=0, warps=8, spills=2, load_bits=32, store_bits=128,
        tensor_core=["HMMA.16816.F32"], doubles=1, subroutines=1, blocks=1,
    )  # fmt: skip
    broken = triton_code.Budget(2, load_bits=128).broken_by(code)
    assert len(broken) == 6
    assert not triton_code.Budget(1, tensor_core="HMMA", doubles=True).broken_by(
        triton_code.Code(64, 0, 0, 4, 0, 32, 32, ["HMMA.16816.F32"], 1, 0, 8)
    )
