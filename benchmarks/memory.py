"""How much memory something takes at its peak."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile


def allocated_peak(run: Callable[[], Any]) -> int:
    """Bytes that a call holds of PyTorch's CPU allocator at its peak, beside what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def resident() -> int:
    """Bytes of this process in memory now."""
    return _status("VmRSS")


def peak_resident() -> int:
    """Bytes of this process in memory at most, since it was started."""
    return _status("VmHWM")


def _status(field: str) -> int:
    """A field of the kernel's account of this process. ``OSError`` where there is none, which is not on Linux."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(f"{field}:")[1].split()[0])
