"""What the machine can do, measured in the same run as everything that is held against it, and what it is."""

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Self

import torch

from ffw_fast.convolutions.fft import low_precision_rate
from ffw_fast.version import __version__

MATRIX = 1536
COPY_BYTES = 256 * 2**20
MOST_TURNS = 500  # of sides that are measured by turns, however short they are


@dataclass(frozen=True)
class Rates:
    """Rates of this machine: FLOP/s of matrix products by dtype, and bytes/s read plus written of a copy."""

    fp32: float
    bf16: float  # 0 where it was not measured
    copy: float

    def matrix(self, precision: str) -> float:
        return self.bf16 if precision == "bf16" else self.fp32

    def best(self, other: Self) -> Self:
        """Of two measurements the higher rates: a disturbance only ever lowers them."""
        return type(self)(max(self.fp32, other.fp32), max(self.bf16, other.bf16), max(self.copy, other.copy))

    def __str__(self) -> str:
        bf16 = f", {self.bf16 / 1e9:.0f} bf16" if self.bf16 else ""
        return f"matrix rate {self.fp32 / 1e9:.0f} GFLOP/s fp32{bf16}; copy {self.copy / 1e9:.1f} GB/s"


def seconds(run: Callable[[], Any], repeats: int, warmup: int = 1) -> float:
    """Median time of a call."""
    return median(times(run, repeats, warmup))


def times(run: Callable[[], Any], repeats: int, warmup: int = 1) -> list[float]:
    """Times of calls, after some that are not counted."""
    for _ in range(warmup):
        run()
    result = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        result.append(time.perf_counter() - started)
    return result


def take_turns(sides: Sequence[Callable[[], Any]], seconds: float, fewest: int) -> list[list[float]]:
    """Times of each side, which take turns, so that a disturbance meets all, until the seconds have passed.

    Args:
        fewest: turns, however long they take.
    """
    taken: list[list[float]] = [[] for _ in sides]
    ends = time.perf_counter() + seconds
    while len(taken[0]) < fewest or (time.perf_counter() < ends and len(taken[0]) < MOST_TURNS):
        for side, own in zip(sides, taken, strict=True):
            own += times(side, 1, warmup=0)
    return taken


def measure_rates(repeats: int = 7, bf16: bool = True) -> Rates:
    """The best of several runs: a floor is what the machine can do, not what it did while it was disturbed.

    Args:
        bf16: whether to measure bfloat16, too, which takes seconds where the processor has no instructions for it.
    """
    work = 2 * MATRIX**3
    bf16_repeats = repeats if has_fast_bf16() else 1
    return Rates(
        fp32=work / min(min(times(product, repeats)) for product in _products(torch.float32)),
        bf16=work / min(min(times(product, bf16_repeats)) for product in _products(torch.bfloat16)) if bf16 else 0,
        copy=copy_rate(COPY_BYTES, repeats),
    )


def _products(dtype: torch.dtype) -> list[Callable[[], Any]]:
    """The same matrix product by each library that PyTorch has for it."""
    a, b = (torch.randn(MATRIX, MATRIX).to(dtype) for _ in range(2))
    found: list[Callable[[], Any]] = [lambda: a @ b]
    if torch.backends.mkldnn.is_available() and (dtype == torch.float32 or has_fast_bf16()):
        found.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    return found


def has_fast_bf16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware, so that ``precision="bf16"`` can pay."""
    return torch.backends.mkldnn.is_available() and low_precision_rate() > 1


def copy_rate(size: int, repeats: int = 7) -> float:
    """Bytes/s read plus written of a copy of so many bytes; small ones are copied within the caches."""
    source = torch.randn(max(1, size // 4))
    target = torch.empty_like(source)
    return 2 * 4 * len(source) / min(times(lambda: target.copy_(source), repeats))


def describe() -> dict[str, Any]:
    """The machine, the libraries and the instruction sets in use: part of every record."""
    return {
        "processor": _processor(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        "ffw_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            fields = dict(line.split(":", 1) for line in file if ":" in line)
        stripped = {key.strip(): value.strip() for key, value in fields.items()}
        return f"{stripped['model name']} (family {stripped['cpu family']}, model {stripped['model']})"
    except (OSError, KeyError):
        return platform.processor()


def record(rates: Rates) -> dict[str, Any]:
    """``describe`` and the measured rates."""
    return {**describe(), "rates": asdict(rates)}
