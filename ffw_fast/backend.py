"""Which kernels do the work: loads the compiled libraries, and says why not where it could not.

The operators of ``ffw_fast.ops`` always work, by plain-PyTorch kernels. A compiled library only adds faster ones, so a
missing or broken library is never an error, unless the environment variable FFW_FAST_BACKEND asks for it:

- ``auto`` (default): compiled kernels where they load.
- ``cpp``: the compiled CPU kernels; an ``ImportError`` with the diagnosis if they do not load.
- ``torch``: the plain-PyTorch kernels only.
"""

import ctypes
import os
import shutil
import warnings
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import torch

from ffw_fast import fft_conv, ops  # noqa: F401  (defines the operators, which must come before their implementations)

BACKENDS = ("auto", "cpp", "torch")
_BACKEND_VARIABLE = "FFW_FAST_BACKEND"
_REBUILD = "FFW_FAST_BUILD={} pip install --no-build-isolation --force-reinstall --no-deps -v ."
_OPERATORS = (
    "gate_weight",
    "gate_weight_backward",
    "gated_adam_step_",
    "mutual_information",
    "mutual_information_backward",
    "fit_linear_head_",
    "fft_conv2d",
    "fft_conv2d_backward",
)


@dataclass
class _Library:
    """A compiled library and what became of it.

    Attributes:
        device: ``cpu`` or ``cuda``; the library is ``_cpu`` or ``_cuda`` beside this file.
        path: where it is, None if it was not built.
        loaded: whether its kernels are registered.
        problem: why not, None if it is loaded or loading it has not been tried.
    """

    device: str
    path: Path | None = None
    loaded: bool = False
    problem: str | None = None

    def load(self) -> None:
        self.path = next(iter(sorted(Path(__file__).parent.glob(f"_{self.device}.*"))), None)
        if self.path is None:
            self.problem = (
                f"the compiled {self.device} kernels are missing: they were left out of the build, or it failed; "
                f"to build them, in a checkout or an unpacked sdist: {_REBUILD.format(self.device)}"
            )
            return
        try:
            torch.ops.load_library(self.path)
            self.loaded = True
        except Exception as error:  # whatever is wrong with the file, the package works without it
            self.problem = (
                f"the compiled {self.device} kernels in {self.path} do not load with PyTorch {torch.__version__}: "
                f"{error}; to build them anew: {_REBUILD.format(self.device)}"
            )


_cpu = _Library("cpu")
_cuda = _Library("cuda")
_load_was_called = False


def requested_backend() -> str:
    """The value of FFW_FAST_BACKEND; ``ValueError`` with the known ones if it is none of them."""
    name = os.environ.get(_BACKEND_VARIABLE) or "auto"
    if name not in BACKENDS:
        raise ValueError(f"{_BACKEND_VARIABLE} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def load() -> None:
    """Load the compiled kernels; called once, when ``ffw_fast`` is imported.

    Warns once where the CPU kernels do not load, and says why.

    Raises:
        ValueError: FFW_FAST_BACKEND has an unknown value.
        ImportError: FFW_FAST_BACKEND is ``cpp`` and the kernels do not load.
    """
    global _load_was_called
    backend = requested_backend()
    if _load_was_called:
        return
    _load_was_called = True
    if backend == "torch":
        _cpu.problem = _cuda.problem = f"{_BACKEND_VARIABLE}=torch"
        return
    _cpu.load()
    if torch.version.cuda is None:
        _cuda.problem = "this PyTorch is built without CUDA"
    else:
        _cuda.load()
    if _cpu.loaded:
        return
    if backend == "cpp":
        raise ImportError(f"{_BACKEND_VARIABLE}=cpp, but {_cpu.problem}")
    warnings.warn(f"ffw_fast runs on its slower plain-PyTorch kernels: {_cpu.problem}", RuntimeWarning, stacklevel=3)


def backend_info() -> dict:
    """Which kernels are compiled, loaded and used, and why not where not; versions and machine.

    Returns:
        A dict that can be written as JSON: ``backend`` (what was asked for), ``torch``, ``triton``, ``compiler``,
        ``nvcc``, and for each of ``cpu`` and ``cuda`` a dict with ``used`` (``cpp``, ``cuda``, ``torch`` or None),
        ``compiled``, ``loaded``, ``library``, ``why_not`` and ``operators`` (those with compiled kernels). ``cpu`` also
        has ``instruction_set`` of the compiled kernels, ``torch_capability`` and ``threads``; ``cuda`` has ``devices``.
    """
    cpu = _describe(_cpu, compiled_name="cpp", available=True)
    cpu["instruction_set"] = _instruction_set()
    cpu["torch_capability"] = torch.backends.cpu.get_cpu_capability()
    cpu["threads"] = torch.get_num_threads()
    cuda = _describe(_cuda, compiled_name="cuda", available=torch.cuda.is_available())
    cuda["devices"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "backend": requested_backend(),
        "torch": torch.__version__,
        "triton": metadata.version("triton") if util.find_spec("triton") else None,
        "compiler": _first_program(os.environ.get("CXX"), "c++", "g++", "clang++"),
        "nvcc": _first_program("nvcc", "/usr/local/cuda/bin/nvcc"),
        "cpu": cpu,
        "cuda": cuda,
    }


def _describe(library: _Library, compiled_name: str, available: bool) -> dict:
    key = library.device.upper()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    operators = [name for name in _OPERATORS if has_kernel(f"ffw_fast::{name}", key)]
    return {
        "used": None if not available else compiled_name if operators else "torch",
        "compiled": library.path is not None,
        "loaded": library.loaded,
        "library": str(library.path) if library.path else None,
        "why_not": library.problem,
        "operators": operators,
    }


def _instruction_set() -> str | None:
    if not _cpu.loaded:
        return None
    name = ctypes.CDLL(str(_cpu.path)).ffw_fast_cpu_capability
    name.restype = ctypes.c_char_p
    return name().decode()


def _first_program(*names: str | None) -> str | None:
    return next((found for name in names if name and (found := shutil.which(name))), None)
