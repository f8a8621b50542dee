"""Which kernels do the work: loads the compiled libraries, and says why not where it could not.

The operators of ``ffw_fast.ops`` always work, by plain-PyTorch kernels. On CPU tensors C++ kernels take their place
where they are compiled; on CUDA tensors CUDA C++ kernels where those are compiled, else Triton kernels where the
package triton is installed. A missing or broken library is never an error, unless the environment variable
FFW_FAST_BACKEND asks for it:

- ``auto`` (default): all that loads, in that order.
- ``cpp``: as ``auto``, but an ``ImportError`` with the diagnosis if the compiled CPU kernels do not load.
- ``cuda``: likewise if the compiled CUDA kernels do not load.
- ``triton``: Triton kernels on CUDA tensors, also where CUDA C++ is compiled; an ``ImportError`` if that cannot be.
  With TRITON_INTERPRET=1 they run on CPU tensors, in Triton's interpreter: slow, and for tests.
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

from ffw_fast import fusion, ops, tanh, triton_backend  # noqa: F401  (tanh and fft define operators, as ops does)
from ffw_fast.convolutions import fft  # noqa: F401

BACKENDS = ("auto", "cpp", "cuda", "triton", "torch")
_BACKEND_VARIABLE = "FFW_FAST_BACKEND"
_REBUILD = "FFW_FAST_BUILD={} pip install --no-build-isolation --force-reinstall --no-deps -v ."
_OPERATORS = (*ops.DEFAULTS, "fft_conv2d", "fft_conv2d_backward", "tanh_")


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
_triton_problem: str | None = None  # why Triton kernels are not registered, None if they are
_load_was_called = False


def requested_backend() -> str:
    """The value of FFW_FAST_BACKEND; ``ValueError`` with the known ones if it is none of them."""
    name = os.environ.get(_BACKEND_VARIABLE) or "auto"
    if name not in BACKENDS:
        raise ValueError(f"{_BACKEND_VARIABLE} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def load() -> None:
    """Load the compiled kernels and register those of Triton; called once, when ``ffw_fast`` is imported.

    Warns once where the CPU kernels do not load, and says why.

    Raises:
        ValueError: FFW_FAST_BACKEND has an unknown value.
        ImportError: FFW_FAST_BACKEND is ``cpp``, ``cuda`` or ``triton``, and those kernels cannot be used.
    """
    global _load_was_called, _triton_problem
    backend = requested_backend()
    if _load_was_called:
        return
    _load_was_called = True
    if backend == "torch":
        _cpu.problem = _cuda.problem = _triton_problem = f"{_BACKEND_VARIABLE}=torch"
        return
    interpreting = backend == "triton" and triton_backend.is_interpreting()
    if interpreting:
        _cpu.problem = _cuda.problem = f"{_BACKEND_VARIABLE}=triton with TRITON_INTERPRET=1"
        _triton_problem = _register_triton("cpu")
    else:
        _cpu.load()
        _load_for_cuda(backend)
    required = {"cpp": _cpu.problem, "cuda": _cuda.problem, "triton": _triton_problem}.get(backend)
    if required is not None:
        raise ImportError(f"{_BACKEND_VARIABLE}={backend}, but {required}")
    if not (_cpu.loaded or interpreting):
        reason = f"ffw_fast runs on its slower plain-PyTorch kernels: {_cpu.problem}"
        warnings.warn(reason, RuntimeWarning, stacklevel=3)


def _load_for_cuda(backend: str) -> None:
    """CUDA C++ where it is compiled and Triton not asked for; Triton for all that is left."""
    global _triton_problem
    if torch.version.cuda is None:
        _cuda.problem = _triton_problem = "this PyTorch is built without CUDA"
        return
    if backend == "triton":
        _cuda.problem = f"{_BACKEND_VARIABLE}=triton"
    else:
        _cuda.load()
    _triton_problem = _register_triton("cuda")


def _register_triton(device: str) -> str | None:
    """Let Triton serve what has no compiled kernel on that device; why not, where it cannot."""
    if (problem := triton_backend.why_not()) is None:
        triton_backend.register(device, leave_out=[name for name in _OPERATORS if _has_kernel(name, device)])
    return problem


def _has_kernel(operator: str, device: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"ffw_fast::{operator}", device.upper())


def backend_info() -> dict:
    """Which kernels are compiled, loaded and used, and why not where not; versions and machine.

    Returns:
        A dict that can be written as JSON: ``backend`` and ``masked_layers`` (what was asked for; the latter is told in
        ``ffw_fast.fusion``), ``torch``, ``triton``, ``compiler``, ``nvcc``, and for each of ``cpu`` and ``cuda`` a dict
        with ``used`` (the best of ``cpp``, ``cuda``, ``triton`` and ``torch`` that is in use, None without such a
        device), ``compiled``, ``loaded``, ``library``, ``why_not`` (of the compiled library) and ``operators``
        (operator -> which kernel serves it). ``cpu`` also has ``instruction_set`` of the compiled kernels,
        ``torch_capability`` and ``threads``; ``cuda`` has ``devices`` and ``triton_why_not``.
    """
    cpu = _describe(_cpu, compiled_name="cpp", available=True)
    cpu["instruction_set"] = _instruction_set()
    cpu["torch_capability"] = torch.backends.cpu.get_cpu_capability()
    cpu["threads"] = torch.get_num_threads()
    cuda = _describe(_cuda, compiled_name="cuda", available=torch.cuda.is_available())
    cuda["triton_why_not"] = _triton_problem
    cuda["devices"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "backend": requested_backend(),
        "masked_layers": fusion.choice,
        "torch": torch.__version__,
        "triton": metadata.version("triton") if util.find_spec("triton") else None,
        "compiler": _first_program(os.environ.get("CXX"), "c++", "g++", "clang++"),
        "nvcc": find_nvcc(),
        "cpu": cpu,
        "cuda": cuda,
    }


def find_nvcc() -> str | None:
    """The nvcc that ``setup.py`` would build with, which looks for it in the same order."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    return _first_program(*(os.path.join(home, "bin", "nvcc") for home in homes if home), "nvcc")


def without_folders(info: dict) -> dict:
    """Libraries and compilers by their names: a record is shared, and folders of this machine tell others nothing."""
    devices = {name: {**info[name], "library": _name(info[name]["library"])} for name in ("cpu", "cuda")}
    return {**info, **devices, **{program: _name(info[program]) for program in ("compiler", "nvcc")}}


def _name(path: str | None) -> str | None:
    return path and Path(path).name


def _describe(library: _Library, compiled_name: str, available: bool) -> dict:
    served = {name: _server(name, library.device, compiled_name) for name in _OPERATORS}
    best = next(name for name in (compiled_name, "triton", "torch") if name in served.values())
    return {
        "used": best if available else None,
        "compiled": library.path is not None,
        "loaded": library.loaded,
        "library": str(library.path) if library.path else None,
        "why_not": library.problem,
        "operators": served,
    }


def _server(operator: str, device: str, compiled_name: str) -> str:
    """Which kernel serves an operator on a type of device."""
    if operator in triton_backend.registered.get(device, ()):
        return "triton"
    return compiled_name if _has_kernel(operator, device) else "torch"


def _instruction_set() -> str | None:
    if not _cpu.loaded:
        return None
    name = ctypes.CDLL(str(_cpu.path)).ffw_fast_cpu_capability
    name.restype = ctypes.c_char_p
    return name().decode()


def _first_program(*names: str | None) -> str | None:
    return next((found for name in names if name and (found := shutil.which(name))), None)
