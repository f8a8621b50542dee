"""The CUDA kernels under sanitizers, and mutated: a ladder that catches nothing proves nothing."""

import re
import shutil
import subprocess

import pytest

from tests.cuda import toolchain

ORDERS = (0, 1, 2)  # of the threads: forward, backward, shuffled
PARTS = {  # of the driver, for files with barriers
    "linear_head.cuh": "HEAD",
    "mutual_information.cuh": "INFORMATION",
    "objective.cuh": "OBJECTIVE",
}
BARRIER = "__syncthreads();"
BARRIERS = [  # file and number in it
    (path.name, number)
    for path in sorted((toolchain.CSRC / "cuda").glob("*.cuh"))
    for number in range(path.read_text().count(BARRIER))
]


def run(driver, *words):
    return subprocess.run([driver, *map(str, words)], capture_output=True, text=True, timeout=300)


def assert_right(driver, *words):
    done = run(driver, *words)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def driver(needs_compiler, tmp_path_factory):
    return toolchain.build_driver(tmp_path_factory.mktemp("driver") / "driver", "-O1")


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_of_threads(driver, order):
    assert_right(driver, "all", order)


@pytest.mark.slow
@pytest.mark.parametrize("order", range(3, 10))
def test_more_orders(driver, order):
    assert_right(driver, "all", order)


@pytest.mark.slow
def test_more_elements_than_one_pass_of_the_grid_takes(driver):
    assert_right(driver, "grid", 2)


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_address_sanitizer(needs_compiler, tmp_path_factory, order):
    folder = tmp_path_factory.getbasetemp()
    driver = folder / "driver-asan"
    if not driver.exists():
        toolchain.build_driver(driver, "-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    assert_right(driver, "all", order)


@pytest.mark.slow
def test_thread_sanitizer(needs_compiler, tmp_path):
    flags = ("-O1", "-g", "-fsanitize=thread", "-pthread", "-DFFW_EMULATION_THREADS")
    driver = toolchain.build_driver(tmp_path / "driver", *flags)
    assert_right(driver, "all", 0, "tiny")


# Faults --------------------------------------------------------------------------------------------------------------


def mutated_sources(folder, file, mutate):
    """A copy of the kernels' sources with one file changed."""
    csrc = folder / "csrc"
    shutil.copytree(toolchain.CSRC / "cuda", csrc / "cuda")
    shutil.copy(toolchain.CSRC / "gate.h", csrc)
    path = csrc / "cuda" / file
    mutated = mutate(path.read_text())
    assert mutated != path.read_text(), "the text to mutate is not there any more"
    path.write_text(mutated)
    return csrc


def catches(csrc, part, *flags, what="all"):
    """What the driver says of mutated sources, None if it finds nothing wrong."""
    driver = toolchain.build_driver(csrc / "driver", "-O0", "-w", f"-DFFW_DRIVER_ONLY_{part}", *flags, csrc=csrc)
    for order in ORDERS:
        done = run(driver, what, order)
        if done.returncode != 0:
            return done.stdout + done.stderr
    return None


def thread_sanitizer_catches(csrc, part):
    """For races that do not change a number that is compared."""
    flags = ("-O0", "-w", "-fsanitize=thread", "-pthread", "-DFFW_EMULATION_THREADS", f"-DFFW_DRIVER_ONLY_{part}")
    done = run(toolchain.build_driver(csrc / "driver", *flags, csrc=csrc), "all", 0, "tiny")
    return done.stdout + done.stderr if done.returncode != 0 else None


def without_barrier(number):
    def mutate(source):
        places = [match.span() for match in re.finditer(re.escape(BARRIER), source)]
        begin, end = places[number]
        return source[:begin] + source[end:]

    return mutate


def test_all_barriers_are_known():
    assert len(BARRIERS) == 18


@pytest.mark.slow
@pytest.mark.parametrize(("file", "number"), BARRIERS)
def test_a_missing_barrier_is_caught(needs_compiler, tmp_path, file, number):
    part = PARTS.get(file, "ADAM")  # the barrier of device.cuh stands in block_sum
    csrc = mutated_sources(tmp_path, file, without_barrier(number))
    assert catches(csrc, part) or thread_sanitizer_catches(csrc, part)


def test_one_missing_barrier_is_caught(needs_compiler, tmp_path):
    assert "expected" in catches(mutated_sources(tmp_path, "linear_head.cuh", without_barrier(1)), "HEAD")


FAULTS = {  # file, what is replaced by what, the driver's part, and what more the compiler or the driver must know
    "reads behind the ragged edge": (
        "device.cuh",
        ("start + i < count ? widen(array[start + i]) : T(0)", "widen(array[start + i])"),
        *("GATE", "-fsanitize=address"),
    ),
    "writes behind the ragged edge": ("device.cuh", ("if (start + i < count) narrow", "narrow"), "GATE"),
    "a whole pack where there is a part": (
        "gated_adam.cuh",
        ("a.aligned && start + n <= a.count", "a.aligned && start < a.count"),
        "ADAM",
    ),
    "padding counts as movement": ("gated_adam.cuh", ("if (start + i < a.count) moved", "moved"), "ADAM"),
    "the same random numbers twice": (
        "device.cuh",
        ("start / 4 + quad", "start / 4"),
        *("ADAM", "-DFFW_DRIVER_16_BIT"),
    ),
    "the new gate at the old temperature": (
        "gated_adam.cuh",
        ("gate_value<kind>(m[i], next_inverse", "gate_value<kind>(m[i], inverse"),
        "ADAM",
    ),
    "a gradient of the wrong sign": ("gated_adam.cuh", ("T gradient = g[i]", "T gradient = -g[i]"), "ADAM"),
    "too short a stride of the grid": ("gated_adam.cuh", ("blockDim.x * n;", "blockDim.x;"), "ADAM"),
    "too long a stride of the grid": ("gate.cuh", ("blockDim.x * n;", "blockDim.x * n * 2;"), "GATE", "grid"),
    "swapped lanes": ("linear_head.cuh", ("lane & half", "!(lane & half)"), "HEAD"),
    "a wrong stride of the errors": (
        "linear_head.cuh",
        ("memory.errors + row * stride + class_begin", "memory.errors + row * a.classes + class_begin"),
        "HEAD",
    ),
    "every chunk decays the momentum": ("linear_head.cuh", ("chunk.first, chunk.last", "true, chunk.last"), "HEAD"),
    "the next chunk over this one": ("linear_head.cuh", ("buffer ^ 1, next.rows", "buffer, next.rows"), "HEAD"),
    "copies that nobody waits for": ("linear_head.cuh", ("wait_for_copies();\n", ";\n"), "HEAD"),
    "padding that is not cleared": ("linear_head.cuh", ("+ width + i % padding] = 0", "+ width] = 0"), "HEAD"),
    "a head reads another's labels": ("linear_head.cuh", ("a.heads + blockIdx.x)", "a.heads)"), "HEAD"),
    "too little shared memory": (
        "linear_head.cuh",
        ("+ 2 * static_cast<size_t>(classes)", "+ static_cast<size_t>(classes)"),
        *("HEAD", "-fsanitize=address"),
    ),
    "a barrier that not all threads reach": (
        "linear_head.cuh",
        ("stopped = state->stopped;", "stopped = threadIdx.x == 0 && state->stopped;"),
        "HEAD",
    ),
    "swapped marginals": (
        "mutual_information.cuh",
        ("sums[entry / a.classes], sums", "sums[entry % a.classes], sums"),
        "INFORMATION",
    ),
    "a joint forgets all chunks but the last": (
        "mutual_information.cuh",
        ("if (inside && !first) sum += row[prediction];", ""),
        "OBJECTIVE",
    ),
    "samples count that do not": (
        "objective.cuh",
        ("if (a.aligned[target] == label) return", "if (false) return"),
        "OBJECTIVE",
    ),
    "a head reads another's probabilities": (
        "objective.cuh",
        ("memory.head_rows + head * stride, chunk", "memory.head_rows, chunk"),
        "OBJECTIVE",
    ),
    "the gradients of a chunk that is not there any more": (
        "objective.cuh",
        ("if (!is_there) prepare", "if (false) prepare"),
        "OBJECTIVE",
    ),
    "too little shared memory for the heads' labels": (
        "objective.cuh",
        ("sizeof(int) * (chunk + 1) * heads", "sizeof(int) * chunk * heads"),
        *("OBJECTIVE", "-fsanitize=address"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(needs_compiler, tmp_path, name):
    file, (old, new), part, *more = FAULTS[name]
    flags = [word for word in more if word.startswith("-")]
    csrc = mutated_sources(tmp_path, file, lambda source: source.replace(old, new, 1))
    found = catches(csrc, part, *flags, what="grid" if "grid" in more else "all")
    assert found is not None
    print(
        f"{name}: {next(line for line in found.splitlines() if line and 'WARNING' not in line and '====' not in line)}"
    )
