"""How much memory there is for data that would rather be kept than read again."""

import os
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")  # of a container: what it may use and what it uses
SHARE = 0.5  # of what is available; networks, features and the other set want some too


def memory_budget() -> int:
    """Bytes that one set of samples may take in memory."""
    return int(SHARE * min(_available_on_machine(), _available_in_group()))


def _available_on_machine() -> float:
    if MEMINFO.exists():
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        return 1024 * int(fields["MemAvailable"].split()[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2  # no system but Linux tells what is free


def _available_in_group() -> float:
    try:
        limit, used = ((GROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return float("inf")
    return float("inf") if limit == "max" else int(limit) - int(used)


def describe_bytes(count: float) -> str:
    """A number of bytes as a person reads it: ``730 kB``, ``1.2 MB``, ``24.5 GB``."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:.0f} bytes"
        count /= 1000
    return f"{count:.1f} GB"
