"""Builds the compiled kernels: ``ffw_fast/_cpu`` and, where CUDA is at hand, ``ffw_fast/_cuda``.

Both are plain shared libraries over PyTorch's stable ABI, so one build serves every Python >= 3.11 and PyTorch >= 2.10.
PyTorch is never imported here: only its headers and the name of its library are needed, and an isolated build finds
those in the environment that it builds for. The environment variable FFW_FAST_BUILD says what to build:

- ``auto`` (default): ``_cpu``, and ``_cuda`` if PyTorch has CUDA, nvcc is found and there are sources. Where that fails
  the package is installed without it.
- ``cpu``: ``_cpu`` alone; ``cuda``: both. A failure is an error.
- ``none``: nothing.
"""

import os
import shutil
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

OLDEST_TORCH = (2, 10)
STABLE_ABI = f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"
CHOICES = ("auto", "cpu", "cuda", "none")
CHOICE = os.environ.get("FFW_FAST_BUILD") or "auto"
OPTIONAL = CHOICE == "auto"
CUDA_ARCHITECTURES = ("80", "90")  # the last one also as PTX, for what comes after it


def find_torch() -> Path | None:
    """Folder of a recent enough PyTorch: in this environment or, in an isolated build, in the one behind it."""
    behind = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for found in metadata.distributions(name="torch", path=[*sys.path, *behind]):
        if found.metadata["Version"] is None:  # what a removal left
            continue
        if tuple(int(part) for part in found.version.split(".")[:2]) >= OLDEST_TORCH:
            return Path(str(found.locate_file("torch")))
    return None


def find_nvcc() -> str | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def sources(folder: str, suffix: str) -> list[str]:
    return sorted(str(path) for path in Path("csrc", folder).glob(f"*{suffix}"))


def library(name: str, files: list[str], torch: Path, **options) -> Extension:
    headers = [str(path) for path in Path("csrc").rglob("*") if path.suffix in (".h", ".inl", ".cuh")]
    folders = [str(torch / "lib")]
    return Extension(
        f"ffw_fast.{name}",
        files,
        depends=headers,
        library_dirs=folders,
        optional=OPTIONAL,
        py_limited_api=True,
        **options,
    )


def extensions(torch: Path | None) -> list[Extension]:
    if CHOICE not in CHOICES:
        raise SystemExit(f"FFW_FAST_BUILD must be one of {', '.join(CHOICES)}, got {CHOICE!r}")
    if CHOICE == "none":
        return []
    if torch is None:
        message = f"ffw_fast: no PyTorch >= {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} found, whose headers the kernels need"
        if not OPTIONAL and "egg_info" not in sys.argv:  # there pip only asks what to fetch: see setup_requires
            raise SystemExit(message)
        print(f"{message}; installing without compiled kernels", file=sys.stderr)
        return []
    flags = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", STABLE_ABI, f"-isystem{torch / 'include'}"]
    # Sampled masks are the same bits everywhere only if nothing is contracted; the other two let GCC vectorise.
    flags += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    found = [library("_cpu", sources("cpu", ".cpp"), torch, extra_compile_args=flags, libraries=["torch_cpu"])]
    has_cuda = (torch / "lib" / "libtorch_cuda.so").exists() and find_nvcc() and sources("cuda", ".cu")
    if CHOICE == "cuda" or (CHOICE == "auto" and has_cuda):
        found.append(library("_cuda", sources("cuda", ".cu"), torch, include_dirs=[str(torch / "include")]))
    return found


class BuildLibraries(build_ext):
    """``build_ext`` that hands ``_cuda`` to nvcc, and leaves no library of an earlier build where this one fails."""

    def run(self) -> None:
        is_in_place = self.inplace
        super().run()
        for ext in self.extensions if is_in_place else ():
            if not Path(self.build_lib, self.get_ext_filename(ext.name)).exists():
                Path(self.get_ext_filename(ext.name)).unlink(missing_ok=True)

    def build_extension(self, ext: Extension) -> None:
        try:
            if ext.name.endswith("_cuda"):
                self.build_with_nvcc(ext)
            else:
                super().build_extension(ext)
        except BaseException:
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            raise

    def build_with_nvcc(self, ext: Extension) -> None:
        nvcc, target = find_nvcc(), Path(self.get_ext_fullpath(ext.name))
        if nvcc is None or not ext.sources:
            raise SystemExit("ffw_fast: FFW_FAST_BUILD=cuda needs nvcc (set CUDA_HOME) and the sources in csrc/cuda")
        target.parent.mkdir(parents=True, exist_ok=True)
        newest = CUDA_ARCHITECTURES[-1]
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHITECTURES]
        codes.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
        flags = ["-shared", "-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", STABLE_ABI, "-DUSE_CUDA"]
        flags.append("--threads=0")  # all architectures at a time, on as many cores as there are
        paths = [f"-I{folder}" for folder in ext.include_dirs] + [f"-L{folder}" for folder in ext.library_dirs]
        self.spawn([nvcc, *flags, *codes, *paths, *ext.sources, "-ltorch_cpu", "-ltorch_cuda", "-o", str(target)])

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # they are no Python modules


torch = find_torch()
setup(
    packages=find_packages(include=["ffw_fast", "ffw_fast.*"])
    + [f"ffw_fast.{name}" for name in find_packages(include=["kernels", "kernels.*", "benchmarks"])],
    py_modules=["ffw_fast_command"],
    package_dir={"ffw_fast.kernels": "kernels", "ffw_fast.benchmarks": "benchmarks"},
    ext_modules=extensions(torch),
    cmdclass={"build_ext": BuildLibraries},
    # An isolated build fetches PyTorch only where the environment that it builds for has none.
    setup_requires=[f"torch>={OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}"] if torch is None and CHOICE != "none" else [],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
