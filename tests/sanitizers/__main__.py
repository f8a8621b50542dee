"""The C++ operators' tests under sanitizers: ``python -m tests.sanitizers address`` or ``thread`` (``make sanitize``).

Builds the CPU kernels anew with the flags that ship and the sanitizer's, beside a copy of the package in
``build/sanitize``, and runs the operators' tests there with the sanitizer's library loaded before all others. The first
thing that a sanitizer finds ends the process, so that the tests fail.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

TESTS = ["tests/test_ops.py", "tests/test_awkward_tensors.py", "tests/convolutions/test_fft.py"]
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LINKED = {"address": "-fsanitize=address,undefined", "thread": "-fsanitize=thread"}
COMPILED = {"address": "-fno-sanitize-recover=all -fno-omit-frame-pointer", "thread": f"-include {HERE / 'threads.h'}"}
LIBRARIES = {"address": ("asan", "ubsan"), "thread": ("tsan",)}
OPTIONS = {
    # Python and PyTorch free little of what they allocate at their end, and their own reads are not instrumented.
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:strict_init_order=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
    "TSAN_OPTIONS": f"halt_on_error=1:ignore_noninstrumented_modules=1:suppressions={HERE / 'tsan.txt'}",
}


def build(kind: str) -> Path:
    """The folder with a copy of the package whose kernels are instrumented."""
    folder = ROOT / "build" / "sanitize" / kind
    flags = {"CFLAGS": f"{LINKED[kind]} {COMPILED[kind]}", "LDFLAGS": LINKED[kind]}
    environment = os.environ | flags | {"FFW_FAST_BUILD": "cpu"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder)]
    subprocess.run([*command, "--build-temp", f"{folder}-objects"], cwd=ROOT, env=environment, check=True)
    for name in ("ffw_fast", "tests"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def library(name: str) -> str:
    """The path of a sanitizer's library, as the compiler knows it."""
    command = [os.environ.get("CXX", "g++"), f"-print-file-name=lib{name}.so"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_absolute():
        raise SystemExit(f"the compiler has no lib{name}.so")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=LINKED)
    parser.add_argument("pytest", nargs="*", help=f"what pytest is given (default: {' '.join(TESTS)})")
    options = parser.parse_args()
    folder = build(options.kind)
    preloaded = " ".join(map(library, LIBRARIES[options.kind]))
    environment = {
        **os.environ,
        **OPTIONS,
        "LD_PRELOAD": preloaded,
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "1",  # OpenMP's own threads are of no use here, and each costs shadow memory
        "FFW_FAST_BACKEND": "cpp",
    }
    chosen = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:benchmark", *(options.pytest or TESTS)]
    command = [sys.executable, "-m", "pytest", *chosen]
    return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
