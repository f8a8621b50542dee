"""What is compiled once for all tests of the CUDA kernels."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from ffw_fast import ops
from tests.cuda import toolchain

A100_SHARED_MEMORY = 163 * 1024


@pytest.fixture(scope="session")
def needs_compiler() -> None:
    if toolchain.compiler() is None:
        pytest.skip("needs g++ 12 or later, to compile the CUDA sources for the CPU")


@pytest.fixture(scope="session")
def emulated_library(needs_compiler, tmp_path_factory):
    """The operators of ``csrc/cuda/*.cu`` on CPU tensors, under ``torch.ops.ffw_emulated``; its settings by ctypes."""
    path = toolchain.build_operators(tmp_path_factory.mktemp("emulated") / "operators.so")
    definitions = torch.library.Library("ffw_emulated", "DEF")
    for name in OPERATORS:
        schema = str(getattr(torch.ops.ffw_fast, name).default._schema)
        definitions.define(schema.removeprefix("ffw_fast::"))
    torch.ops.load_library(path)
    return definitions, ctypes.CDLL(str(path))


OPERATORS = (
    "gate_weight",
    "gate_weight_backward",
    "gated_adam_step_",
    "mutual_information",
    "mutual_information_backward",
    "objective",
    "fit_linear_head_",
)


@pytest.fixture
def emulated(emulated_library, poisoned):
    """The emulated operators, and ``set(order, shared_memory)``; memory that they allocate is NaN."""
    settings = emulated_library[1].ffw_emulation_set
    settings.argtypes = [ctypes.c_uint, ctypes.c_size_t]

    def configure(order: int = 2, shared_memory: int = A100_SHARED_MEMORY) -> None:
        settings(order, shared_memory)

    configure()
    yield SimpleNamespace(set=configure, **{name: getattr(torch.ops.ffw_emulated, name).default for name in OPERATORS})
    configure()


@pytest.fixture(scope="session")
def defaults() -> SimpleNamespace:
    """The plain-PyTorch kernels of the same operators, whatever is compiled."""
    kernels = {name: getattr(ops, f"{name.rstrip('_')}_default{'_' * name.endswith('_')}") for name in OPERATORS}
    return SimpleNamespace(**kernels)
