"""How much memory there is for data that would rather be kept than read again."""

import os
from collections.abc import Iterator
from math import inf
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
MEMBERSHIP = Path("/proc/self/cgroup")  # the control groups of this process, which a container or a scheduler limits
GROUPS = Path("/sys/fs/cgroup")
# Of a group: its limit, what it uses, and the part of that which the system takes back when it is wanted.
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = ("memory.max", "memory.current", "inactive_file")
SHARE = 0.5  # of what is available; networks, features and the other set want some too


def memory_budget() -> int:
    """Bytes that one set of samples may take in memory."""
    return int(SHARE * max(0, min([_available_on_machine(), *_available_in_groups()])))


def _available_on_machine() -> float:
    if MEMINFO.exists():
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        return 1024 * int(fields["MemAvailable"].split()[0])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2  # no system but Linux tells what is free


def _available_in_groups() -> Iterator[float]:
    """What is left of the limit of each of this process's groups and of those around it."""
    for line in MEMBERSHIP.read_text().splitlines() if MEMBERSHIP.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = GROUPS, VERSION_2
        elif "memory" in controllers.split(","):
            root, names = GROUPS / "memory", VERSION_1
        else:
            continue
        group = root / path.lstrip("/")
        for place in (group, *group.parents):
            yield _available_in(place, *names)


def _available_in(group: Path, limit: str, used: str, reclaimable: str) -> float:
    """Infinite where the folder is no group that has a limit; the path may be one that a container does not see."""
    try:
        values = [(group / name).read_text() for name in (limit, used, "memory.stat")]
    except OSError:
        return inf
    counts = dict(line.split() for line in values[2].splitlines())
    return float(values[0].replace("max", "inf")) - int(values[1]) + int(counts.get(reclaimable, 0))


def describe_bytes(count: float) -> str:
    """A number of bytes as a person reads it: ``730 kB``, ``1.2 MB``, ``24.5 GB``."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:.0f} bytes"
        count /= 1000
    return f"{count:.1f} GB"
