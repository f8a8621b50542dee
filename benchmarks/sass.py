"""The machine code (SASS) of GPU kernels as ``cuobjdump`` tells it, and how many blocks a multiprocessor holds."""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

WARP = 32  # threads
REGISTER_UNIT = 256  # registers are given to warps in such units
WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}  # bits, by modifiers of an access


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor has."""

    registers: int = 65536
    warps: int = 64
    blocks: int = 32
    shared: int = 164 * 1024
    reserved: int = 1024  # shared memory that the system keeps for each block


LIMITS = {80: Limits(), 90: Limits(shared=228 * 1024)}  # of an A100 and an H100


def resident_blocks(limits: Limits, registers: int, shared: int, warps: int) -> int:
    """How many blocks a multiprocessor holds at a time, of so many registers a thread and bytes and warps a block."""
    a_warp = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = limits.registers // a_warp // warps
    by_shared = limits.shared // (shared + limits.reserved)
    return min(by_registers, by_shared, limits.warps // warps, limits.blocks)


@dataclass(frozen=True)
class Sass:
    """One kernel's machine code.

    Attributes:
        registers: a thread's.
        stack: bytes a thread, with all other local memory.
        opcodes: of all instructions in their order, with modifiers: ``LDG.E.128.CONSTANT``.
    """

    registers: int
    stack: int
    opcodes: list[str]

    def count(self, pattern: str) -> int:
        """How many instructions there are whose opcode the pattern matches from its beginning."""
        return sum(re.match(pattern, opcode) is not None for opcode in self.opcodes)

    def widest(self, pattern: str) -> int:
        """Bits of the widest access among those instructions; 0 where there is none."""
        return max((_bits(opcode) for opcode in self.opcodes if re.match(pattern, opcode)), default=0)

    @property
    def spills(self) -> int:
        """Accesses to local memory."""
        return self.count(r"(LDL|STL)\b")

    @property
    def load_bits(self) -> int:
        """The widest load from global memory."""
        return self.widest(r"(LDG|LDGSTS)\b")

    @property
    def doubles(self) -> int:
        """Instructions in double precision, conversions included."""
        return self.count(r"(D(ADD|MUL|FMA|SETP|MNMX)|DMMA)\b|.*(\.F64|RCP64|RSQ64)")

    @property
    def subroutines(self) -> int:
        """Bodies that end in a return, as of divisions; calls do not tell, since one may leave a loop.

        Not counted: the body of a shuffle or of a vote, which stands beside its inline form for warps that have
        diverged (no barrier, shuffle or vote is reached by a part of a warp).
        """
        returns = [at for at, opcode in enumerate(self.opcodes) if re.match(r"RET\b", opcode)]
        return sum(not re.search("SHFL|VOTE", " ".join(self.opcodes[max(0, at - 4) : at])) for at in returns)


def _bits(opcode: str) -> int:
    """Of what a thread reads or writes by it."""
    modifiers = opcode.split(".")
    return max((bits for modifier, bits in WIDTHS.items() if modifier in modifiers), default=32)


def read(cubin: Path, cuobjdump: str | Path) -> dict[str, Sass]:
    """The kernels of a compiled file by their (mangled) names."""
    usage = dict(re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", run_tool(cuobjdump, "-res-usage", cubin)))
    found = {}
    for section in run_tool(cuobjdump, "-sass", cubin).split("Function : ")[1:]:
        name, listing = section.split("\n", 1)
        used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage[name.strip()])}
        found[name.strip()] = Sass(used["REG"], used["STACK"] + used["LOCAL"], opcodes_of(listing))
    return found


def opcodes_of(listing: str) -> list[str]:
    """Opcodes of the instructions that ``cuobjdump -sass`` lists, without predicates and operands."""
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]+)", listing)


def run_tool(*command: str | Path, **options) -> str:
    """What a tool prints. ``RuntimeError`` with all of its words where it fails."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout
