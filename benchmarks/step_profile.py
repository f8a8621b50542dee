"""Where the time of a training step goes: every kernel of it by the time that it takes, on the CPU or on a GPU.

Steps are of ``ffw_fast``'s own loop, on random images of the sizes of Table 8. By PyTorch's profiler: on a GPU the
device's kernels, also of steps that are replayed as a CUDA graph; on the CPU operators, without those that they call.
The step is timed once more without the profiler: what is missing in the sum of its kernels is waiting, and the rest of
Python.
"""

import os
from typing import Any

import torch
from ffw_fast.benchmarks.command import add_json, bench_parser, write_record
from ffw_fast.benchmarks.jobs import JOBS, Job, chosen_jobs, random_samples
from ffw_fast.benchmarks.machine import describe, seconds
from ffw_fast.benchmarks.table8 import new_loop
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from ffw_fast.convolutions import repeatable_convolutions
from ffw_fast.tables import print_table

PRECISIONS = ("fp32", "bf16")
KERNELS = 12  # the slowest, that are told one by one
NAME = 90  # characters of a kernel's that are told

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines, of every start and end


@repeatable_convolutions()  # as an extraction runs
def profile_step(job: Job, precision: str, device: torch.device, steps: int = 20) -> dict[str, Any]:
    """A step of the job in seconds, and its kernels with name, calls and seconds a step, the slowest first."""
    samples = random_samples(job, steps * job.batch_size).to(device)
    loop = new_loop(job, precision, samples, samples)
    loop.train_gates()  # warms up, and captures the graph
    step = seconds(loop.train_gates, 3, warmup=0) / steps  # it reads the losses back at its end
    on_device = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_device else ProfilerActivity.CPU]) as profiler:
        loop.train_gates()
    kernels = []
    for event in profiler.key_averages():
        microseconds = event.self_device_time_total if on_device else event.self_cpu_time_total
        if microseconds > 0:
            kernels.append({"kernel": event.key, "calls": event.count / steps, "seconds": microseconds / 1e6 / steps})
    kernels.sort(key=lambda row: -row["seconds"])
    busy = sum(row["seconds"] for row in kernels)
    return {"workload": job.name, "precision": precision, "step": step, "busy": busy, "kernels": kernels}


def profile_table(profiled: dict[str, Any]) -> Table:
    step, busy, kernels = (profiled[name] for name in ("step", "busy", "kernels"))
    title = f"{profiled['workload']}, {profiled['precision']}: {1e3 * step:.3g} ms a step, {1e3 * busy:.3g} in kernels"
    table = Table("kernel", title=title)
    for column in ("calls a step", "us a step", "share of all kernels"):
        table.add_column(column, justify="right")
    rest = {
        "kernel": f"{len(kernels) - KERNELS} others",
        "calls": sum(row["calls"] for row in kernels[KERNELS:]),
        "seconds": sum(row["seconds"] for row in kernels[KERNELS:]),
    }
    for row in [*kernels[:KERNELS], *([rest] if kernels[KERNELS:] else [])]:
        share = f"{row['seconds'] / busy:.1%}"
        table.add_row(row["kernel"][:NAME], f"{row['calls']:.3g}", f"{1e6 * row['seconds']:.3g}", share)
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = bench_parser("step_profile", __doc__)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="parts of names (default: all)")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["fp32"], help="default: fp32")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--steps", type=int, default=20, help="that are profiled (default: 20)")
    add_json(parser, "all kernels, with machine and versions,")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        raise ValueError(f"steps must be at least 1, got {options.steps}")
    profiled = []
    for job in chosen_jobs(options.only, JOBS[::-1]):
        for precision in options.precision:
            profiled.append(profile_step(job, precision, torch.device(options.device), options.steps))
            print_table(profile_table(profiled[-1]))
    write_record(options.json, {"machine": describe(), "steps": profiled})


if __name__ == "__main__":
    main()
