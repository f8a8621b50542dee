"""What ``ffw-fast bench gpu`` does on a CUDA machine, section by section; ``dry``: the same on the CPU at small sizes.

A section is a generator of rows, each a dict that JSON can hold. Whoever runs it writes down every row as it comes, so
that a kernel that hangs or ruins the process costs the rows after it alone.
"""

import copy
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata, util
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from ffw_fast.benchmarks import jobs, machine, roofline
from ffw_fast.benchmarks.operators import forward_or_both, layer_tensors
from ffw_fast.benchmarks.step_profile import profile_step
from ffw_fast.benchmarks.table8 import EPOCHS, Parts, measure_reference, new_loop
from ffw_fast.benchmarks.whole import train_biased
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ffw_fast import extract, fusion, ops, philox, triton_backend
from ffw_fast.backend import backend_info, find_nvcc, without_folders
from ffw_fast.convolutions import repeatable_convolutions
from ffw_fast.gates import GateKind
from ffw_fast.modules import MASKED_CLASSES
from ffw_fast.optim import BETAS, EPS, WEIGHT_DECAY
from ffw_fast.workloads import WORKLOADS

Rows = Iterator[dict[str, Any]]

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-3  # of the largest number, between a kernel and the plain-PyTorch one; no speed is told beyond it
CUDA_TESTS = ("tests/cuda/test_gpu.py", "tests/test_step_graph.py", "tests/convolutions/test_tensor_core.py")
TRITON_TESTS = ("tests/kernels/cases",)
TEST_SECONDS = 60  # a test that takes longer hangs
CAPTURED = 10  # calls in one CUDA graph
WORKERS = 8  # processes that share the device, most of whose time goes into compiling Triton's kernels
WHOLE: dict[str, tuple[str, float, int]] = {  # precision, gamma of the adaptive schedule, the paper's unbiased images
    "multi-color-mnist": ("fp32", 1.0, 6000),
    "biased-mnist": ("bf16", 3.0, 36000),
}
SANITIZED = "1029 or heads or mutual_information or objective"  # the sanitizers slow a kernel down many times


def device_of(dry: bool) -> torch.device:
    return torch.device("cpu" if dry else "cuda")


def seconds(run: Callable[[], Any], dry: bool, repeats: int = 20) -> float:
    """Median time of a call, the device's work included; by the device's own clock where there is one."""
    if dry:
        return machine.seconds(run, 2)
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return median(times)


def seconds_in_graph(run: Callable[[], Any]) -> float:
    """The device's time for a call: of several that are captured in one CUDA graph, which leaves the CPU out."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what a capture may not do, such as compiling a kernel, is done before
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CAPTURED):
            run()
    return seconds(graph.replay, dry=False) / CAPTURED


# The build and what is there ------------------------------------------------------------------------------------------


def build(dry: bool) -> Rows:
    """Compile ``csrc`` with the CUDA kernels in place; dry: only say by which command."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--parallel", "2"]
    row: dict[str, Any] = {"command": f"FFW_FAST_BUILD=cuda {_as_typed(command)}", "run": not dry}
    if not dry:
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "FFW_FAST_BUILD": "cuda"}, check=False)
        row["passed"] = done.returncode == 0
    yield row


def _as_typed(command: list[str]) -> str:
    """As one would type it: programs by their names."""
    return " ".join(Path(word).name if Path(word).is_absolute() else word for word in command)


def here(dry: bool) -> Rows:
    """Device, driver, versions and tools, what is missing and what that costs; then what the device can do."""
    yield {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "nvcc": _output(find_nvcc() or "nvcc", "--version"),
        "driver": _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
        "capability": None if dry else ".".join(map(str, torch.cuda.get_device_capability())),
        "tf32": {"matmul": triton_backend.matmul_precision(), "convolution": triton_backend.convolution_precision()},
        "missing": missing(),
        "machine": machine.describe(),
        "backend": without_folders(backend_info()),
    }
    yield {"copy_bytes_per_second": copy_rate(dry)}
    for name, dtype in {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}.items():
        yield {f"{name}_flops_per_second": _matrix_rate(dtype, name == "tf32", dry)}


def missing() -> list[str]:
    """What this machine lacks of all that the sections use, and what goes undone without it."""
    headers = Path(sysconfig.get_path("include"), "Python.h")
    wanted = {
        "nvcc (set CUDA_HOME): no CUDA C++ kernels, Triton serves what they would": find_nvcc(),
        "triton: no kernels of masked layers, PyTorch serves them": util.find_spec("triton"),
        "a C compiler, by which Triton builds its launchers": shutil.which("cc") or shutil.which("gcc"),
        f"{headers}, which Triton's launchers include": headers.exists(),
        "pytest: no tests are run": util.find_spec("pytest"),
        "hypothesis: no tests are run": util.find_spec("hypothesis"),
        "pytest-xdist: tests run in one process, which may take too long": util.find_spec("xdist"),
        "pytest-timeout: a test that hangs ends its section": util.find_spec("pytest_timeout"),
        "compute-sanitizer: memory accesses and races are not checked": sanitizer(),
    }
    return [what for what, found in wanted.items() if not found]


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def _version(package: str) -> str | None:
    return metadata.version(package) if util.find_spec(package) else None


def _output(*command: str) -> str | None:
    """The last line that a program prints; None where it is missing."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]


def copy_rate(dry: bool) -> float:
    """Bytes/s, read plus written, of a copy that no cache holds."""
    source = torch.randn(2**16 if dry else 2**28, device=device_of(dry))
    target = torch.empty_like(source)
    return 2 * 4 * len(source) / seconds(lambda: target.copy_(source), dry)


def _matrix_rate(dtype: torch.dtype, tf32: bool, dry: bool) -> float:
    side, matmul = 64 if dry else 8192, torch.backends.cuda.matmul
    a, b = (torch.randn(side, side, device=device_of(dry)).to(dtype) for _ in range(2))
    before, matmul.allow_tf32 = matmul.allow_tf32, tf32
    try:
        return 2 * side**3 / seconds(lambda: a @ b, dry, repeats=5)
    finally:
        matmul.allow_tf32 = before


# The tests ------------------------------------------------------------------------------------------------------------


def cuda_tests(dry: bool) -> Rows:
    """Those of the CUDA C++ kernels and of the step's graph; dry: only collect them."""
    return _pytest(CUDA_TESTS, dry)


def triton_tests(dry: bool) -> Rows:
    """Those of the Triton kernels, every launch compiled for this device; dry: only collect them."""
    return _pytest(TRITON_TESTS, dry)


def _pytest(paths: tuple[str, ...], dry: bool) -> Rows:
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *paths]
    if dry:
        command.append("--collect-only")
    else:
        command += ["-n", str(WORKERS)] if util.find_spec("xdist") else []
        limit = [f"--timeout={TEST_SECONDS}", "--timeout-method=thread"]  # it ends the process: nothing else can
        command += limit if util.find_spec("pytest_timeout") else []
    yield _run_tests(command, {"TRITON_INTERPRET": "1"} if dry else {})  # else none are collected without a device


def _run_tests(command: list[str], settings: dict[str, str]) -> dict[str, Any]:
    """Prints what the tests print as it comes, for a section that does not end in time."""
    # The tests poison memory by deterministic algorithms, for which older versions of PyTorch ask this of cuBLAS.
    settings = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "2", **settings}
    failed, last = [], ""
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
            if re.match(r"(FAILED|ERROR) ", line):  # in the closing summary
                failed.append(line.strip())
    return {"command": _as_typed(command), "passed": process.returncode == 0, "summary": last, "failed": failed}


def sanitized(dry: bool) -> Rows:
    """The CUDA C++ kernels' small tests under NVIDIA's own checks of memory accesses and of races."""
    program = sanitizer()
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", CUDA_TESTS[0], "-k", SANITIZED]
    for tool in ("memcheck", "racecheck"):
        if program is None or dry:
            yield {"command": f"{tool}: {'dry' if dry else 'there is no compute-sanitizer'}"}
        else:
            yield _run_tests([program, "--tool", tool, "--error-exitcode", "9", *tests], {})


# The operators --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operator:
    """A call of an operator and the bytes that it moves at least; ``detail`` tells it from others of the name."""

    name: str
    arguments: tuple[Any, ...]
    bytes: float
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.detail}".strip()


def operators_of(count: int, device: torch.device) -> list[Operator]:
    """Elementwise operators over ``count`` gates, those of the heads on a batch of 100, and a layer of each kind."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    weight, scores, grad = normal(count), normal(count), normal(count)
    one, draw = torch.ones((), device=device), philox.make_draw(1, device=device)
    logits, labels = normal(100, 2, 10), torch.randint(10, (100, 2), device=device)
    _, joint = ops.DEFAULTS["mutual_information"](logits, labels)
    batch = (normal(100, 10), torch.randint(10, (100,), device=device), logits, labels)
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
    image, filters = normal(16, 32, 14, 14), (normal(64, 32, 3, 3), normal(64, 32, 3, 3), one, draw, 0)
    backward = (torch.ones(2, device=device), logits, labels, joint)
    return [
        *gates,
        Operator("objective", (*batch, None, None, 0.7, 5.0, 0.5), 8 * (batch[0].numel() + logits.numel())),
        Operator("mutual_information", (logits, labels), 4 * logits.numel()),
        Operator("mutual_information_backward", backward, 8 * logits.numel()),
        _head(device),
        Operator("masked_linear", (x, *gate, None, True), 4 * (2 * x.numel() + 2 * gate[0].numel())),
        Operator(
            "masked_conv2d", (image, *filters, None, (1, 1), (1, 1), (1, 1), 1, True),
            4 * (3 * image.numel() + 2 * filters[0].numel()),
        ),
    ]  # fmt: skip


def _head(device: torch.device) -> Operator:
    """Two epochs of the two heads of Multi-Color MNIST."""
    samples, width, epochs = 2000, 100, 2
    features, labels = torch.randn(samples, width), torch.randint(10, (samples, 2))
    order = torch.stack([torch.randperm(samples) for _ in range(epochs)])
    state = (0.1 * torch.randn(2, 10, width), torch.zeros(2, 10), torch.zeros(2, 10, width), torch.zeros(2, 10))
    plateau = torch.tensor([torch.inf, 0, 0], dtype=torch.float64)
    tensors = (tensor.to(device) for tensor in (*state, plateau, features, labels, order))
    return Operator("fit_linear_head_", (*tensors, 100, 0.1, 0.9, 1e-4, 1e-3, 5), 2 * 4 * epochs * features.numel())


def _copies(arguments: tuple[Any, ...]) -> list[Any]:
    return [value.clone() if isinstance(value, Tensor) else value for value in arguments]


def _largest_error(call: Callable[..., Any], operator: Operator) -> float:
    """Of results and changed arguments, against the plain-PyTorch kernel; relative to the largest number."""
    mine, theirs = _copies(operator.arguments), _copies(operator.arguments)
    results = call(*mine), ops.DEFAULTS[operator.name](*theirs)
    leaves = [tree_leaves(values) for values in zip(results, (mine, theirs), strict=True)]
    pairs = zip(*leaves, strict=True)
    return max(_error(a, b) for a, b in pairs if isinstance(a, Tensor))


def _error(a: Tensor, b: Tensor) -> float:
    """The largest but for one in a million: a sampled gate at the edge of its score flips with the score's rounding."""
    difference = (a.double() - b.double()).abs().flatten()
    if difference.isnan().any():
        return math.nan
    largest = difference.topk(1 + difference.numel() // 1_000_000).values[-1]
    return (largest / b.double().abs().max().clamp_min(1e-12)).item()


def operators(dry: bool) -> Rows:
    """Each operator by what serves it and by Triton, beside its plain-PyTorch kernel and the floor of its bytes."""
    device = device_of(dry)
    served, rate = backend_info()[device.type]["operators"], copy_rate(dry)
    for operator in operators_of(5000 if dry else 11_000_000, device):
        row = {"operator": str(operator), "kernel": served[operator.name], "floor": operator.bytes / rate}
        sides = {"ours": getattr(torch.ops.ffw_fast, operator.name)}
        by_triton = operator.name in triton_backend.KERNELS and triton_backend.why_not() is None
        if not dry and served[operator.name] == "cuda" and by_triton:
            sides["triton"] = partial(triton_backend.run, operator.name)
        for side, call in sides.items():
            row |= _checked_time(side, call, operator, dry)
        row |= _time("eager", ops.DEFAULTS[operator.name], operator, dry)
        yield row


def compiled(dry: bool) -> Rows:
    """The plain-PyTorch kernel of each operator by torch.compile; dry: none, which would spend a minute."""
    for operator in () if dry else operators_of(11_000_000, device_of(dry)):
        call = torch.compile(ops.DEFAULTS[operator.name])
        yield {"operator": str(operator), **_time("compiled", call, operator, dry)}


def _checked_time(side: str, call: Callable[..., Any], operator: Operator, dry: bool) -> dict[str, Any]:
    """Error and time of one side; no time where the result is wrong, and the reason where it fails."""
    try:
        error = _largest_error(call, operator)
    except Exception as problem:
        return {side: told(problem)}
    return {f"{side} error": error, **(_time(side, call, operator, dry) if error <= TOLERANCE else {})}


def _time(side: str, call: Callable[..., Any], operator: Operator, dry: bool) -> dict[str, Any]:
    """The device's time of a call; of plain-PyTorch kernels that read back, which no graph can, as they are called."""
    run = partial(call, *_copies(operator.arguments))
    reads_back = operator.name == "fit_linear_head_" and side in ("eager", "compiled")
    try:
        return {side: seconds(run, dry) if dry or reads_back else seconds_in_graph(run)}
    except Exception as problem:  # a failure leaves the other sides
        return {side: told(problem)}


def told(problem: Exception) -> str:
    """An exception's class and the first line of what it says."""
    return f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"


# The workloads --------------------------------------------------------------------------------------------------------


def workloads(dry: bool) -> Rows:
    """What the rows of Table 8 cost on this device, here, by the reference and as projected; the cheapest first."""
    for job in jobs.TINY_JOBS if dry else jobs.JOBS[::-1]:
        reference = measure_reference(job, job.network().eval(), 6, "fp32", device_of(dry).type)
        reference_epoch = reference.reference_epoch(job)
        for precision in ("fp32",) if dry else ("fp32", "bf16"):
            row = {"workload": job.name, "precision": precision, "paper_seconds": job.paper_seconds}
            projected = roofline.project(job, "bf16" if precision == "bf16" else "tf32")
            try:
                parts, graph = measure(job, precision, dry)
                epoch = parts.fast_epoch(job)
                row |= {"graph": graph, **asdict(parts), "job_seconds": EPOCHS * epoch}
                row |= {"reference_gate_step": reference.gate_step, "reference_epoch": reference_epoch}
                row["ratio_to_reference"] = reference_epoch / epoch
            except Exception as problem:  # such as too little memory
                row["graph"] = told(problem)
            yield {**row, "projected_on_a100": projected.graph}


@repeatable_convolutions()  # as an extraction runs
def measure(job: jobs.Job, precision: str, dry: bool) -> tuple[Parts, str]:
    """The parts of an epoch on a training set of the job's size; and whether the step is a CUDA graph."""
    device = device_of(dry)
    samples, val = (jobs.random_samples(job, count).to(device) for count in (job.train, job.val))
    loop = new_loop(job, precision, samples, val)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop.train_gates()  # warms up, and captures the graph
    graph = "yes" if loop.step_graph.is_captured else "; ".join(str(one.message) for one in caught) or "no"
    step = machine.seconds(loop.train_gates, 2, warmup=0) / job.steps  # it reads the losses back at its end
    feature = seconds(lambda: loop.features(samples.x), dry, 3) / len(samples.y)
    features = torch.randn(len(samples.y), loop.heads.weight.shape[2], device=device)
    started_at, start = loop.heads.epochs, time.perf_counter()
    loop.heads.fit(features, samples.b)
    head = (time.perf_counter() - start) / (loop.heads.epochs - started_at)
    return Parts(step, feature, head), graph


def step_kernels(dry: bool) -> Rows:
    """Where the time of a step of each workload goes, kernel by kernel."""
    for job in jobs.TINY_JOBS if dry else jobs.JOBS[::-1]:
        for precision in ("fp32",) if dry else ("fp32", "bf16"):
            try:
                yield profile_step(job, precision, device_of(dry))
            except Exception as problem:  # a failure leaves the other workloads
                yield {"workload": job.name, "precision": precision, "problem": told(problem)}


def whole(dry: bool) -> Rows:
    """Extractions from start to end on the shipped digits, the biased network given, by both schedules."""
    for name, (precision, gamma, size) in list(WHOLE.items())[: 1 if dry else None]:
        small = {"max_epochs": 2, "vanilla_epochs": 1, "train_size": 200, "unbiased_size": 200}
        sizes = small if dry else {"max_epochs": 300, "vanilla_epochs": None, "unbiased_size": size}
        biased = train_biased(name, 1, **sizes, device=device_of(dry).type)
        row = {"workload": biased.title, "precision": precision, "paper_seconds": WORKLOADS[name].paper_seconds}
        yield {**row, "schedule": "", **_shown(biased.measured(biased.model))}
        for schedule, weight in (("adaptive", gamma), ("published", biased.settings.gamma)):
            found = biased.extract_by(extract, schedule=schedule, gamma=weight, precision=precision)
            took = {name: found[name] for name in ("seconds", "epochs")}
            yield {**row, "schedule": schedule, "gamma": weight, **took, **_shown(found["pruned"])}


def _shown(measured: dict[str, Any]) -> dict[str, Any]:
    return {name: measured[name] for name in ("task_accuracy", "bias_accuracy", "sparsity")}


# Masked layers --------------------------------------------------------------------------------------------------------


def masked_layers(dry: bool) -> Rows:
    """Forward and backward of masked layers, the weight gated before or while it is read, beside dense ones.

    Called as usual, where launches take longer than the device does, and on a device in a CUDA graph too.
    """
    layers = layers_to_mask()
    for layer, batch, dtype in product(layers[:1] if dry else layers, (64, 256), (torch.float32, torch.bfloat16)):
        row = {"layer": layer.shape, "batch": batch, "dtype": str(dtype).removeprefix("torch.")}
        dense = copy.deepcopy(layer.dense).to(device_of(dry), dtype).requires_grad_(False)
        masked: Any = MASKED_CLASSES[type(dense)].from_dense(dense)
        nn.init.normal_(masked.scores, std=0.1)
        dense.weight.requires_grad_()
        x, grad = (tensor.detach().to(dense.weight) for tensor in layer_tensors(layer, batch, "both"))
        x.requires_grad_(not layer.is_first)
        for side, choice in {"dense": "auto", "pregated": "pregated", "fused": "fused"}.items():
            network, trained = (dense, dense.weight) if side == "dense" else (masked, masked.scores)
            run = forward_or_both(partial(network, x), (trained, x), grad, "both")
            row[side] = _time_with(choice, partial(seconds, run, dry))
            if not dry:
                row[f"{side} in a graph"] = _time_with(choice, partial(seconds_in_graph, run))
        yield row


def layers_to_mask() -> list[jobs.Layer]:
    """All of the perceptron, and convolutions with few and with many pixels to a weight."""
    convolutions = [layer for job in jobs.JOBS[:3:2] for layer in jobs.layers_of(job) if not layer.is_first]
    return [*jobs.layers_of(jobs.JOBS[3]), *sorted(convolutions, key=lambda layer: layer.outputs[-1])[1::5]]


def _time_with(choice: str, measure: Callable[[], float]) -> float | str:
    """The time of a layer while masked ones do as they are told by ``FFW_FAST_MASKED_LAYERS``."""
    before, fusion.choice = fusion.choice, choice
    try:
        return measure()
    except Exception as problem:
        return told(problem)
    finally:
        fusion.choice = before


@dataclass(frozen=True)
class Section:
    """What is run, and the seconds that it may take."""

    run: Callable[[bool], Rows]
    limit: float


SECTIONS = {  # what matters most comes first: what is late is cut off
    "build": Section(build, 120),
    "here": Section(here, 40),
    "cuda tests": Section(cuda_tests, 80),
    "operators": Section(operators, 70),
    "workloads": Section(workloads, 80),
    "whole": Section(whole, 140),
    "step kernels": Section(step_kernels, 30),
    "masked layers": Section(masked_layers, 60),
    "triton tests": Section(triton_tests, 100),
    "sanitized": Section(sanitized, 50),
    "compiled": Section(compiled, 40),
}
