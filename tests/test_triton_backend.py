"""Which operators Triton serves, and that the served operators give the results of the plain-PyTorch ones."""

import importlib
import inspect
import json
import os
import subprocess
import sys
from importlib import util
from types import SimpleNamespace

import pytest
import torch

import ffw_fast.backend
from ffw_fast import ops, triton_backend
from tests.operator_inputs import adam_inputs

pytestmark = pytest.mark.skipif(not util.find_spec("triton"), reason="needs the package triton")


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a process of its own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FFW_FAST")}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=kept | environment, check=False)


def test_every_operator_has_a_triton_kernel_or_is_composed_of_such():
    assert set(triton_backend.KERNELS) == set(ops.DEFAULTS) - {"objective"}


@pytest.mark.parametrize("name", triton_backend.KERNELS)
def test_launchers_take_the_operators_arguments_in_their_order(name):
    kernel = triton_backend.KERNELS[name]
    launcher = getattr(importlib.import_module(f"ffw_fast.kernels.{kernel.module}"), name)
    schema = [argument.name for argument in getattr(torch.ops.ffw_fast, name).default._schema.arguments]
    parameters = list(inspect.signature(launcher).parameters)
    assert parameters[: len(schema)] == schema
    rest = set(parameters[len(schema) :])
    assert ("precision" in rest) == (kernel.precision is not None)
    assert rest <= {"precision", "tile", "splits"}


def test_precision_follows_pytorch(monkeypatch):
    linear, conv = triton_backend.KERNELS["masked_linear"], triton_backend.KERNELS["masked_conv2d"]
    assert (linear.precision(), conv.precision()) == ("ieee", "tf32")  # PyTorch's defaults
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision="tf32"))
    monkeypatch.setattr(torch.backends.cudnn, "conv", SimpleNamespace(fp32_precision="ieee"))
    assert (linear.precision(), conv.precision()) == ("tf32", "ieee")


def test_what_is_left_to_pytorch():
    def accepts(name, *arguments):
        return triton_backend.KERNELS[name].accepts(*arguments)

    single, double = torch.zeros(8), torch.zeros(8, dtype=torch.float64)
    assert accepts("gate_weight", single, single)
    assert not accepts("gate_weight", double, double)
    rest = [torch.zeros(()), single, single]
    assert accepts("gated_adam_step_", *[single] * 4, *rest)
    assert not accepts("gated_adam_step_", torch.zeros(16)[::2], *[single] * 3, *rest)
    labels = torch.zeros(4, 1, dtype=torch.int64)
    assert accepts("mutual_information", torch.zeros(4, 1, 64), labels)
    assert not accepts("mutual_information", torch.zeros(4, 1, 65), labels)
    assert not accepts("mutual_information_backward", torch.zeros(1), torch.zeros(0, 1, 3), labels)
    head = [torch.zeros(1, 5, 8), torch.zeros(1, 5)] * 2
    assert accepts("fit_linear_head_", *head, torch.zeros(3), torch.zeros(9, 8))
    assert not accepts("fit_linear_head_", *head, torch.zeros(3), torch.zeros(9, 8, dtype=torch.float64))
    assert not accepts("fit_linear_head_", *head, torch.zeros(6)[::2], torch.zeros(9, 8))


def test_buffers_that_share_memory_are_refused_before_a_kernel_sees_them():
    changed, rest = adam_inputs(32)
    with pytest.raises(ValueError, match="gated and exp_avg share memory"):
        triton_backend.run("gated_adam_step_", changed[0], changed[1], changed[0], *changed[3:], *rest, 0, False)


REGISTERED = """
import json, sys, torch
import ffw_fast
from ffw_fast import ops, triton_backend
has = torch._C._dispatch_has_kernel_for_dispatch_key
before = has("ffw_fast::gate_weight", "CUDA")
triton_backend.register("cuda", leave_out=["fit_linear_head_"])
served = [name for name in triton_backend.KERNELS if has(f"ffw_fast::{name}", "CUDA")]
print(json.dumps([before, served, "triton" in sys.modules]))
"""


@pytest.mark.skipif(torch.version.cuda is not None, reason="Triton is registered from the start")
def test_registration_leaves_out_what_is_compiled_and_does_not_import_triton():
    done = python(REGISTERED)
    assert done.returncode == 0, done.stderr
    expected = [name for name in triton_backend.KERNELS if name != "fit_linear_head_"]
    assert json.loads(done.stdout) == [False, expected, False]


@pytest.fixture
def load(monkeypatch):
    """Loads the backend anew, without a registration; what Triton would have been registered for."""

    def run(backend: str, cuda: str | None = "13.0", interpret: str = "0") -> dict[str, list[str]]:
        asked = {}
        monkeypatch.setenv("FFW_FAST_BACKEND", backend)
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(triton_backend, "register", lambda device, leave_out: asked.update({device: leave_out}))
        for name, value in (("_load_was_called", False), ("_triton_problem", None)):
            monkeypatch.setattr(ffw_fast.backend, name, value)
        for device in ("cpu", "cuda"):
            monkeypatch.setattr(ffw_fast.backend, f"_{device}", ffw_fast.backend._Library(device))
        ffw_fast.backend.load()
        return asked

    return run


NO_CUDA_LIBRARY = pytest.mark.skipif(ffw_fast.backend._cuda.loaded, reason="CUDA kernels are compiled here")


@NO_CUDA_LIBRARY
@pytest.mark.parametrize("backend", ["auto", "triton", "cpp"])
def test_triton_serves_cuda_where_nothing_is_compiled(compiled, load, backend):
    assert load(backend) == {"cuda": []}
    info = ffw_fast.backend_info()
    assert info["cuda"]["triton_why_not"] is None
    assert info["cpu"]["loaded"]
    expected = "FFW_FAST_BACKEND=triton" if backend == "triton" else "compiled cuda kernels are missing"
    assert expected in info["cuda"]["why_not"]


def test_triton_serves_the_cpu_in_the_interpreter_only_where_forced(load):
    assert load("triton", cuda=None, interpret="1").keys() == {"cpu"}
    assert not ffw_fast.backend_info()["cpu"]["loaded"]
    assert load("auto", cuda=None, interpret="1") == {}


def test_plain_pytorch_registers_nothing(load):
    assert load("torch") == {}
    assert ffw_fast.backend_info()["cuda"]["triton_why_not"] == "FFW_FAST_BACKEND=torch"


@NO_CUDA_LIBRARY
@pytest.mark.parametrize(
    ("backend", "cuda", "message"),
    [
        ("triton", None, "FFW_FAST_BACKEND=triton, but this PyTorch is built without CUDA"),
        ("cuda", None, "FFW_FAST_BACKEND=cuda, but this PyTorch is built without CUDA"),
        ("cuda", "13.0", "the compiled cuda kernels are missing"),
    ],
)
def test_what_cannot_be_forced_is_told(load, backend, cuda, message):
    with pytest.raises(ImportError, match=message):
        load(backend, cuda)


def test_a_missing_triton_is_told(load, monkeypatch):
    real = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name == "triton" else real(name, *rest))
    with pytest.raises(ImportError, match=r"triton is missing: pip install 'ffw_fast\[triton\]'"):
        load("triton")
    assert load("auto") == {}
    assert "triton is missing" in ffw_fast.backend_info()["cuda"]["triton_why_not"]


INTERPRETED = """
import json, sys, torch
import ffw_fast
from ffw_fast import fusion, ops
from ffw_fast.data.samples import Samples
from ffw_fast.inputs import Problem
from ffw_fast.loop import Loop
from ffw_fast.settings import Settings
from tests import six_features
info = ffw_fast.backend_info()["cpu"]
assert info["used"] == "triton" and "triton" not in sys.modules, info
assert all(info["operators"][name] == "triton" for name in set(ops.DEFAULTS) - {"objective"})
fusion.choice = "fused"
torch.manual_seed(0)
model = ffw_fast.mask_model(torch.nn.Sequential(
    torch.nn.Conv2d(2, 5, 3, stride=2, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(20, 3)))
for layer in ffw_fast.masked_layers(model).values():
    torch.nn.init.normal_(layer.scores)
x = torch.randn(3, 2, 4, 4)
y = model(x)
y.square().sum().backward()
scores = [layer.scores.grad.flatten().tolist() for layer in ffw_fast.masked_layers(model).values()]
assert "triton" in sys.modules
settings = Settings(six_features.BOTTLENECK, six_features.CLASSES, schedule="adaptive")
samples = Samples(*six_features.samples())
loop = Loop(Problem(settings, six_features.network(), samples, samples, 8))
losses = [loop._step(*samples).tolist() for _ in range(2)]
double = ops.gate_weight(*[torch.ones(3, dtype=torch.float64)] * 2, torch.tensor(1.0), torch.zeros(3).long(), 0)
state = [loop.gates.scores.tolist(), loop.gates.temperature.item(), loop.heads.weight.flatten().tolist()]
print(json.dumps([y.tolist(), scores, losses, double.tolist(), state]))
"""


def flatten(value):
    return [number for part in value for number in flatten(part)] if isinstance(value, list) else [value]


@pytest.mark.slow
def test_layers_and_a_step_of_the_loop_by_triton_in_the_interpreter():
    served = python(INTERPRETED, FFW_FAST_BACKEND="triton", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert served.returncode == 0, served.stderr
    plain = INTERPRETED.replace("assert", "True or")
    expected = python(plain, FFW_FAST_BACKEND="torch", OMP_NUM_THREADS="1")
    assert expected.returncode == 0, expected.stderr
    given, wanted = (torch.tensor(flatten(json.loads(done.stdout))) for done in (served, expected))
    torch.testing.assert_close(given, wanted, rtol=1e-3, atol=1e-4)
