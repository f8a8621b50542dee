"""What the Triton kernels become: compiled ahead of time, without a GPU, and held against budgets.

Each case runs a launcher on tensors of a real layer's sizes. The launch is caught, compiled for each
architecture with the very arguments, tile and options that a GPU would get, and its machine code is read:
registers, shared memory, spills, the width of memory accesses, tensor-core instructions, double precision,
subroutines. Occupancy is reckoned from the architecture's limits. None of this is a speed.

``python -m ffw_fast.benchmarks.triton_code`` prints the table and fails where a budget is not kept.
"""

import argparse
import functools
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from ffw_fast.benchmarks import sass
from ffw_fast.benchmarks.command import add_json, write_record
from ffw_fast.benchmarks.sass import LIMITS, Limits
from ffw_fast.kernels import tiles
from ffw_fast.kernels.gate_weight import gate_weight, gate_weight_backward
from ffw_fast.kernels.gated_adam import gated_adam_step_
from ffw_fast.kernels.linear_head import fit_linear_head_
from ffw_fast.kernels.masked_conv2d import masked_conv2d, masked_conv2d_input_grad, masked_conv2d_score_grad
from ffw_fast.kernels.masked_linear import masked_linear, masked_linear_input_grad, masked_linear_score_grad
from ffw_fast.kernels.mutual_information import mutual_information, mutual_information_backward
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from ffw_fast.gates import GateKind

CUOBJDUMP = (
    Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
)  # knows what Triton's assembler makes
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
         torch.int64: "i64", torch.int32: "i32"}  # fmt: skip


# Catching launches ------------------------------------------------------------------------------------------


@dataclass
class Launch:
    """One launch of a kernel: its arguments by name, and its options."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Within it kernels are not run; their launches gather in the list."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, *positional: Any, grid: tuple[int, ...], warmup: bool, **named: Any) -> None:
        arguments = dict(zip(kernel.arg_names, positional, strict=False))
        arguments |= {name: value for name, value in named.items() if name in kernel.arg_names}
        options = {name: value for name, value in named.items() if name not in kernel.arg_names}
        launches.append(Launch(kernel, grid, arguments, options))

    run, JITFunction.run = JITFunction.run, record
    try:
        yield launches
    finally:
        JITFunction.run = run


def compile_launch(launch: Launch, architecture: int):
    """The kernel as Triton's launcher would specialise it: alignments, multiples of 16 and ones are known."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        free = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not free):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
            divisible = value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            signature[parameter.name], divisible = "fp32", False
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0 and not free
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options)


# Reading machine code ---------------------------------------------------------------------------------------


@dataclass
class Code:
    """What a kernel's machine code says.

    Attributes:
        registers: a thread's.
        shared: bytes a block.
        spills: instructions on local memory.
        load_bits, store_bits: the widest access to global memory.
        tensor_core: the tensor cores' instructions.
        doubles: instructions in double precision.
        subroutines: such as an exact division.
        blocks: how many blocks one multiprocessor holds.
    """

    registers: int
    stack: int
    shared: int
    warps: int
    spills: int
    load_bits: int
    store_bits: int
    tensor_core: list[str]
    doubles: int
    subroutines: int
    blocks: int

    def occupancy(self, limits: Limits) -> float:
        """Share of the multiprocessor's warps that can be resident."""
        return self.blocks * self.warps / limits.warps


def read_code(compiled: Any, architecture: int) -> Code:
    """Disassemble a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (code,) = sass.read(Path(file.name), CUOBJDUMP).values()
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    return Code(
        registers=code.registers,
        stack=code.stack,
        shared=shared,
        warps=warps,
        spills=code.spills,
        load_bits=code.load_bits,
        store_bits=code.widest(r"STG\b"),
        tensor_core=sorted({opcode for opcode in code.opcodes if re.match(r"(HMMA\.\d|HGMMA)", opcode)}),
        doubles=code.doubles,
        subroutines=code.subroutines,
        blocks=sass.resident_blocks(LIMITS[architecture], code.registers, shared, warps),
    )


# Budgets ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """What a kernel's machine code must keep; spills, a stack and subroutines are never allowed.

    Attributes:
        blocks: how many blocks a multiprocessor must hold.
        load_bits, store_bits: how wide the widest access to global memory must be at least.
        tensor_core: pattern that all tensor-core instructions match, of which there must be one; None: none
        may be.
        doubles: whether double precision is allowed.
    """

    blocks: int
    load_bits: int = 32
    store_bits: int = 32
    tensor_core: str | None = None
    doubles: bool = False

    def broken_by(self, code: Code) -> list[str]:
        """What is not kept, in words."""
        pattern = self.tensor_core
        tensor_core = bool(code.tensor_core) and all(re.search(pattern or "", name) for name in code.tensor_core)
        claims = {
            f"{code.spills} spills, {code.stack} bytes of stack": not (code.spills or code.stack),
            f"{code.subroutines} subroutines": not code.subroutines,
            f"{code.doubles} double-precision instructions": self.doubles or not code.doubles,
            f"{code.blocks} blocks, {self.blocks} planned": code.blocks >= self.blocks,
            f"loads of {code.load_bits} bits": code.load_bits >= self.load_bits,
            f"stores of {code.store_bits} bits": code.store_bits >= self.store_bits,
            f"tensor cores: {', '.join(code.tensor_core) or 'none'}": tensor_core == (pattern is not None),
        }
        return [claim for claim, kept in claims.items() if not kept]


_wide = functools.partial(Budget, load_bits=128, store_bits=128)
TF32, HALF = r"\.F32\.TF32", r"\.F32(\.BF16)?$"
OPERANDS = ((torch.float32, "ieee", None), (torch.float32, "tf32", TF32), (torch.bfloat16, "ieee", HALF))


@dataclass
class Case:
    """A launcher's call, and the budget of each kernel that it launches."""

    name: str
    call: Callable[[], Any]
    budgets: dict[str, Budget]


@dataclass
class Result:
    """One kernel of one case on one architecture."""

    case: str
    kernel: str
    architecture: int
    budget: Budget
    code: Code
    broken: list[str] = field(default_factory=list)


def check_case(case: Case, architecture: int) -> list[Result]:
    """Compile what a case launches, and hold it against its budgets."""
    with recorded_launches() as launches, tiles.assume_architecture(architecture):
        case.call()
    names = {launch.kernel.__name__ for launch in launches}
    if names != set(case.budgets):
        raise ValueError(f"{case.name} launches {sorted(names)}, budgets are given for {sorted(case.budgets)}")
    results = []
    for name, launch in {launch.kernel.__name__: launch for launch in launches}.items():
        code = read_code(compile_launch(launch, architecture), architecture)
        budget = case.budgets[name]
        results.append(Result(case.name, name, architecture, budget, code, budget.broken_by(code)))
    return results


# Cases: layers of the networks that the package is for ------------------------------------------------------


def _gate(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, scores: torch.dtype | None = None, last=False):
    weight = torch.zeros(shape, dtype=dtype)
    if last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    return (
        weight,
        torch.zeros_like(weight, dtype=scores or dtype),
        torch.ones(()),
        torch.zeros(3, dtype=torch.int64),
    )


def _elementwise_cases() -> Iterator[Case]:
    half = (torch.bfloat16, torch.float32)
    for kind, dtypes in (
        (GateKind.FFW, ()),
        (GateKind.BERNOULLI, ()),
        (GateKind.CONCRETE, ()),
        (GateKind.FFW, half),
    ):
        name = f"{kind.name.lower()} {'bf16' if dtypes else 'fp32'}"
        gate = _gate((4096,), *dtypes)
        weight, scores, temperature, draw = gate
        yield Case(
            f"gate_weight, {name}", functools.partial(gate_weight, *gate, kind),
            {"gate_weight_kernel": _wide(8)},
        )  # fmt: skip
        yield Case(
            f"gate_weight_backward, {name}", functools.partial(gate_weight_backward, weight, *gate, kind),
            {"gate_weight_backward_kernel": _wide(8)},
        )  # fmt: skip
        state = (weight.clone(), scores, scores.clone(), scores.clone(), torch.zeros((), dtype=torch.float64))
        scalars = (temperature, temperature, torch.ones(()), torch.ones(()), draw, draw)
        yield Case(
            f"gated_adam_step_, {name}",
            functools.partial(
                gated_adam_step_, *state, weight, weight, *scalars, 0.9, 0.999, 1e-8, 1e-4, kind, True
            ),
            {"gated_adam_kernel": _wide(6), "add_partials_kernel": Budget(1, doubles=True)},
        )  # fmt: skip


def _linear_cases() -> Iterator[Case]:
    for dtype, precision, pattern in OPERANDS:
        gate = _gate((100, 2352), dtype)
        x, out = torch.zeros(256, 2352, dtype=dtype), torch.zeros(256, 100, dtype=dtype)
        name = "bf16" if dtype == torch.bfloat16 else precision
        bias = torch.zeros(100, dtype=dtype)
        budget = Budget(2, load_bits=128, store_bits=16, tensor_core=pattern)
        yield Case(
            f"linear 2352-100, {name}",
            functools.partial(masked_linear, x, *gate, 0, bias, True, precision), {"linear_kernel": budget},
        )  # fmt: skip
        yield Case(
            f"its input gradient, {name}",
            functools.partial(masked_linear_input_grad, out, *gate, 0, out, precision),
            {"linear_input_grad_kernel": Budget(2, load_bits=64, tensor_core=pattern)},
        )  # fmt: skip
        yield Case(
            f"its score gradient, {name}",
            functools.partial(masked_linear_score_grad, out, x, *gate, 0, out, precision, splits=1),
            {"linear_score_grad_kernel": Budget(2, load_bits=64, tensor_core=pattern)},
        )  # fmt: skip


def _conv_cases() -> Iterator[Case]:
    layers = {  # shapes of input, weight and output, settings, whether channels come last
        "conv 64-128 7x7 on 28x28": (
            (100, 64, 28, 28), (128, 64, 7, 7), (100, 128, 28, 28), {"padding": 3}, False,
        ),
        "conv 128-256 3x3/2 on 16x16": (
            (128, 128, 16, 16), (256, 128, 3, 3), (128, 256, 8, 8), {"stride": 2, "padding": 1}, False,
        ),
        "conv 128-256 3x3/2 on 16x16, channels last": (
            (128, 128, 16, 16), (256, 128, 3, 3), (128, 256, 8, 8), {"stride": 2, "padding": 1}, True,
        ),
    }  # fmt: skip
    for layer, (x_shape, weight_shape, out_shape, settings, last) in layers.items():
        for dtype, precision, pattern in OPERANDS:
            gate = _gate(weight_shape, dtype, last=last)
            memory_format = torch.channels_last if last else torch.contiguous_format
            x = torch.zeros(x_shape, dtype=dtype).contiguous(memory_format=memory_format)
            out = torch.zeros(out_shape, dtype=dtype).contiguous(memory_format=memory_format)
            name = "bf16" if dtype == torch.bfloat16 else precision
            bias = torch.zeros(weight_shape[0], dtype=dtype)
            narrow = 128 if last else 16 if dtype == torch.bfloat16 else 32
            budget = Budget(2, load_bits=narrow, store_bits=16, tensor_core=pattern)
            yield Case(
                f"{layer}, {name}",
                functools.partial(masked_conv2d, x, *gate, 0, bias, **settings, relu=True, precision=precision),
                {"conv2d_kernel": budget},
            )
            yield Case(
                f"{layer}: input gradient, {name}",
                functools.partial(masked_conv2d_input_grad, out, x.shape, *gate, 0, **settings, output=out,
                                  precision=precision),
                {"conv2d_input_grad_kernel": budget},
            )  # fmt: skip
            yield Case(
                f"{layer}: score gradient, {name}",
                functools.partial(masked_conv2d_score_grad, out, x, *gate, 0, **settings, output=out,
                                  precision=precision, splits=4),
                {"conv2d_score_grad_kernel": budget, "add_splits_kernel": Budget(8, load_bits=128)},
            )  # fmt: skip


def _head_cases() -> Iterator[Case]:
    logits, labels = torch.zeros(100, 1, 10), torch.zeros(100, 1, dtype=torch.int64)
    yield Case(
        "mutual_information, 10 classes", functools.partial(mutual_information, logits, labels),
        {"mutual_information_kernel": Budget(1)},
    )  # fmt: skip
    yield Case(
        "mutual_information_backward, 10 classes",
        functools.partial(mutual_information_backward, torch.ones(1), logits, labels, torch.ones(1, 10, 10)),
        {"mutual_information_backward_kernel": Budget(1)},
    )
    for width in (128, 512):
        weight, bias = torch.zeros(1, 10, width), torch.zeros(1, 10)
        labels, order = torch.zeros(200, 1, dtype=torch.int64), torch.zeros(1, 200, dtype=torch.int64)
        plateau = torch.zeros(3, dtype=torch.float64)
        arguments = (weight, bias, weight, bias, plateau, torch.zeros(200, width), labels, order)
        yield Case(
            f"fit_linear_head_, {width} features",
            functools.partial(fit_linear_head_, *arguments, 100, 0.1, 0.9, 1e-4, 1e-3, 5),
            {"head_epoch_kernel": Budget(1), "head_plateau_kernel": Budget(1, doubles=True)},
        )


def all_cases() -> list[Case]:
    """Every kernel, in the kinds and precisions that matter; the tensors have sizes, no memory."""
    with torch.device("meta"):
        return [*_elementwise_cases(), *_linear_cases(), *_conv_cases(), *_head_cases()]


# The command ------------------------------------------------------------------------------------------------


def table_of(results: list[Result]) -> Table:
    """The results, for a terminal."""
    table = Table(title="Triton kernels, compiled ahead of time (no GPU was used; nothing here is a speed)")
    for title in ("case", "kernel", "arch"):
        table.add_column(title, no_wrap=title == "arch")
    for title in ("regs", "shared", "spills", "load", "store"):
        table.add_column(title, justify="right")
    for title in ("tensor cores", "blocks", "warps", "budget"):
        table.add_column(title)
    for result in results:
        code = result.code
        table.add_row(
            result.case, result.kernel, f"sm_{result.architecture}", str(code.registers), str(code.shared),
            str(code.spills), str(code.load_bits), str(code.store_bits), " ".join(code.tensor_core) or "-",
            f"{code.blocks} (>= {result.budget.blocks})",
            f"{code.occupancy(LIMITS[result.architecture]):.0%}",
            "; ".join(result.broken) or "kept",
        )  # fmt: skip
    return table


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 if a budget is not kept."""
    parser = argparse.ArgumentParser(prog="triton_code", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--arch", type=int, nargs="*", default=sorted(LIMITS), choices=sorted(LIMITS))
    add_json(parser, "the results")
    options = parser.parse_args(arguments)
    results = []
    for case in all_cases():
        for number in options.arch:
            results += check_case(case, number)
    Console(width=None if sys.stdout.isatty() else 220).print(table_of(results))
    write_record(options.json, [asdict(result) for result in results])
    return int(any(result.broken for result in results))


if __name__ == "__main__":
    sys.exit(main())
