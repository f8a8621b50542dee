"""Everything that a GPU has to say, in one command: build, kernel tests, operators and the workloads of Table 8.

``ffw-fast bench gpu`` needs a CUDA device and a checkout of the repository. Every section runs in a process of its own
with a time limit, so that a failure in one (an illegal access ruins a whole process) leaves the others; together they
stay under ten minutes. Figures are written to ``benchmarks/results/gpu-DEVICE.json`` after every section. ``--dry``
runs the same code on the CPU at small sizes, and writes nothing but what ``--json`` names.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ffw_fast.benchmarks import jobs, machine, roofline
from ffw_fast.benchmarks.table8 import EPOCHS, Parts, feature_width, settings_of
from rich.table import Table
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ffw_fast import ops, philox
from ffw_fast.backend import backend_info
from ffw_fast.gates import GateKind
from ffw_fast.inputs import Problem
from ffw_fast.loop import Loop
from ffw_fast.optim import BETAS, EPS, WEIGHT_DECAY
from ffw_fast.tables import print_table

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-3  # of the largest number, between a kernel and the plain-PyTorch one; no speed is told beyond it
LIMITS = {"build": 150, "tests": 130, "operators": 180, "workloads": 130}  # seconds; together under ten minutes


def device_of(dry: bool) -> torch.device:
    return torch.device("cpu" if dry else "cuda")


def seconds(run: Callable[[], Any], dry: bool, repeats: int = 20) -> float:
    """Median time of a call, the device's work included."""

    def finished() -> None:
        run()
        if not dry:
            torch.cuda.synchronize()

    return machine.seconds(finished, 2 if dry else repeats, warmup=1 if dry else 3)


# Sections: each gives what is written down ----------------------------------------------------------------------------


def build(dry: bool) -> dict[str, Any]:
    """Compile ``csrc`` with the CUDA kernels in place; dry: only say by which command."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    if not dry:
        environment = {**os.environ, "FFW_FAST_BUILD": "cuda"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return {"command": "FFW_FAST_BUILD=cuda " + " ".join(command), "run": not dry}


def tests(dry: bool) -> dict[str, Any]:
    """All tests that a GPU adds; dry: only collect them."""
    paths = ["tests/cuda/test_gpu.py", "tests/test_step_graph.py", "tests/kernels/cases"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
    if dry:
        command.append("--collect-only")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines()
    return {"passed": done.returncode == 0, "summary": lines[-1] if lines else "", "output": done.stdout[-6000:]}


@dataclass(frozen=True)
class Operator:
    """A call of an operator and the bytes that it moves at least; ``detail`` tells it from others of the name."""

    name: str
    arguments: tuple[Any, ...]
    bytes: float
    detail: str = ""


def operators_of(count: int, device: torch.device) -> list[Operator]:
    """Elementwise operators over ``count`` gates, and those of the heads on a batch of 100."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    weight, scores, grad = normal(count), normal(count), normal(count)
    one, draw = torch.ones((), device=device), philox.make_draw(1, device=device)
    logits, labels = normal(100, 2, 10), torch.randint(10, (100, 2), device=device)
    _, joint = ops.DEFAULTS["mutual_information"](logits, labels)
    state = (weight.clone(), scores.clone(), torch.zeros_like(scores), torch.zeros_like(scores))
    adam = (*state, torch.zeros((), dtype=torch.float64, device=device), weight, grad, one, one, one, 1e-3 * one)
    settings = (draw, draw, *BETAS, EPS, WEIGHT_DECAY)
    gates = [
        Operator(name, (*arguments, int(kind), *rest), size * count, kind.name.lower())
        for kind in (GateKind.FFW, GateKind.BERNOULLI)
        for name, arguments, rest, size in (
            ("gate_weight", (weight, scores, one, draw), (), 12),
            ("gate_weight_backward", (grad, weight, scores, one, draw), (), 16),
            ("gated_adam_step_", (*adam, *settings), (True,), 36),
        )
    ]
    x, gate = normal(64, 256), (normal(256, 256), normal(256, 256), one, draw, 0)
    backward = (torch.ones(2, device=device), logits, labels, joint)
    return [
        *gates,
        Operator("mutual_information", (logits, labels), 4 * logits.numel()),
        Operator("mutual_information_backward", backward, 8 * logits.numel()),
        Operator("masked_linear", (x, *gate, None, True), 4 * (2 * x.numel() + 2 * gate[0].numel())),
    ]


def _copies(arguments: tuple[Any, ...]) -> list[Any]:
    return [value.clone() if isinstance(value, Tensor) else value for value in arguments]


def _largest_error(operator: Operator) -> float:
    """Of results and changed arguments, against the plain-PyTorch kernel; relative to the largest number."""
    mine, theirs = _copies(operator.arguments), _copies(operator.arguments)
    results = getattr(torch.ops.ffw_fast, operator.name)(*mine), ops.DEFAULTS[operator.name](*theirs)
    leaves = [tree_leaves(values) for values in zip(results, (mine, theirs), strict=True)]
    pairs = zip(*leaves, strict=True)
    return max(_error(a, b) for a, b in pairs if isinstance(a, Tensor))


def _error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-12)).item()


def operators(dry: bool) -> list[dict[str, Any]]:
    """Each operator beside its plain-PyTorch kernel, eager and compiled, and the roofline."""
    served = backend_info()["cpu" if dry else "cuda"]["operators"]
    rows = []
    for operator in operators_of(5000 if dry else 11_000_000, device_of(dry)):
        default, arguments = ops.DEFAULTS[operator.name], _copies(operator.arguments)
        row = {"operator": f"{operator.name} {operator.detail}".strip(), "kernel": served[operator.name]}
        row["error"] = _largest_error(operator)
        sides = {"ours": getattr(torch.ops.ffw_fast, operator.name), "eager": default}
        if not dry:  # which would spend a minute on compiling
            sides["compiled"] = torch.compile(default, mode="max-autotune")
        if row["error"] <= TOLERANCE:
            for side, call in sides.items():
                try:
                    row[side] = seconds(partial(call, *arguments), dry)
                except Exception as error:  # a compiler's failure leaves the other sides
                    row[side] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        rows.append({**row, "a100_floor": operator.bytes / roofline.BYTES_PER_SECOND})
    return rows


def workloads(dry: bool) -> list[dict[str, Any]]:
    """The parts of each row of Table 8 on this device, what they add up to, and the projection."""
    rows = []
    for job in jobs.TINY_JOBS if dry else jobs.JOBS:
        for precision in ("fp32",) if dry else ("fp32", "bf16"):
            parts = measure(job, precision, dry)
            projected = roofline.project(job, "bf16" if precision == "bf16" else "tf32")
            rows.append({
                "workload": job.name, "precision": precision, **asdict(parts),
                "job_seconds": EPOCHS * parts.fast_epoch(job), "projected_on_a100": projected.graph,
                "paper_seconds": job.paper_seconds,
            })  # fmt: skip
    return rows


def measure(job: jobs.Job, precision: str, dry: bool) -> Parts:
    """A training step as the loop runs it, features and a head epoch."""
    device, model, steps = device_of(dry), job.network(), 2 if dry else 20
    samples = jobs.random_samples(job, 4 * job.batch_size).to(device)
    width = feature_width(job, model)
    loop = Loop(Problem(settings_of(job, precision), model.to(device), samples, samples, width))
    rows = torch.arange(job.batch_size, device=device)
    batch = (samples.x[rows], samples.y[rows], samples.b[rows])
    for _ in range(1 if dry else 5):  # warm up, and capture the graph
        loop.step_graph(*batch)
    step = seconds(lambda: loop.step_graph(*batch), dry, steps)
    feature = seconds(lambda: loop.network.features(samples.x), dry, 5) / len(samples.y)
    features = torch.randn(len(samples.y), loop.heads.weight.shape[2], device=device)
    started_at, start = loop.heads.epochs, time.perf_counter()
    loop.heads.fit(features, samples.b)
    head = (time.perf_counter() - start) / (loop.heads.epochs - started_at) * job.train / len(samples.y)
    return Parts(step, feature, head)


SECTIONS: dict[str, Callable[[bool], Any]] = {
    "build": build,
    "tests": tests,
    "operators": operators,
    "workloads": workloads,
}


# The command ----------------------------------------------------------------------------------------------------------


def run_section(name: str, dry: bool, limit: float) -> dict[str, Any]:
    """The section's figures, or why there are none; it runs in a process of its own."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "figures.json")
        command = [sys.executable, "-m", "ffw_fast.benchmarks.gpu", "--section", name, "--json", str(target)]
        command += ["--dry"] if dry else []
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
            problem = None if target.exists() else (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        except subprocess.TimeoutExpired:
            problem = f"not done after {limit:.0f} s"
        figures = json.loads(target.read_text()) if target.exists() else None
    return {"seconds": time.perf_counter() - started, "problem": problem, "figures": figures}


def show(results: dict[str, dict[str, Any]]) -> None:
    """Tables of what there is, and a line for each section."""
    for name, result in results.items():
        print(f"{name}: {result['problem'] or 'done'} ({result['seconds']:.0f} s)")
        figures = result["figures"]
        if name == "tests" and figures:
            print(f"  {figures['summary']}")
        if isinstance(figures, list) and figures:
            print_table(_table(name, figures))


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{title} (times in s)")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        values = [row.get(column, "-") for column in columns]
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in values))
    return table


def default_target() -> Path:
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower()
    return ROOT / "benchmarks" / "results" / f"gpu-{name}.json"


def main(arguments: list[str] | None = None) -> None:
    """Run all sections, or one; ``SystemExit`` where there is no CUDA device and this is no dry run."""
    parser = argparse.ArgumentParser(prog="ffw-fast bench gpu", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--dry", action="store_true", help="the same on the CPU at small sizes; no figure counts")
    parser.add_argument("--section", choices=SECTIONS, help="one of them, in this process")
    parser.add_argument("--json", type=Path, help="where the figures go (default: benchmarks/results/gpu-DEVICE.json)")
    options = parser.parse_args(arguments)
    if not options.dry and not torch.cuda.is_available():
        raise SystemExit("ffw-fast bench gpu needs a CUDA device (this PyTorch sees none); --dry runs it on the CPU")
    target = options.json or (None if options.dry else default_target())
    if options.section:
        write(target, SECTIONS[options.section](options.dry))
        return
    results: dict[str, dict[str, Any]] = {}
    for name in SECTIONS:
        print(f"{name} ...", flush=True)
        results[name] = run_section(name, options.dry, LIMITS[name])
        about = {"dry": options.dry, "machine": machine.describe(), "backend": backend_info()}
        write(target, {**about, "sections": results})
    show(results)
    if target:
        print(f"written to {target}")


def write(target: Path | None, figures: Any) -> None:
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
