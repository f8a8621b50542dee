"""The compiled CUDA operators on a GPU, against the plain-PyTorch kernels on the CPU."""

import math

import pytest
import torch

from ffw_fast import philox
from ffw_fast.backend import backend_info
from ffw_fast.gates import GateKind
from tests.cuda.test_operators import (
    ADAM,
    FACTORS,
    MINIBATCHES,
    adam_state,
    assert_no_worse,
    assert_objective,
    fit_arguments,
    random,
    settings,
)
from tests.operator_inputs import objective_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KINDS = list(GateKind)
WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def needs_library():
    info = backend_info()["cuda"]
    if not info["loaded"]:
        pytest.skip(f"no compiled CUDA kernels: {info['why_not']}")


def on_gpu(arguments):
    return [x.cuda() if isinstance(x, torch.Tensor) else x for x in arguments]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize("count", [1, 1029, 3_000_001])
def test_gates(defaults, kind, dtype, count):
    weight, scores = random(count, seed=1, dtype=dtype), random(count, seed=2, scale=0.1)
    arguments = [weight, scores, *settings(), int(kind)]
    got = torch.ops.ffw_fast.gate_weight(*on_gpu(arguments)).cpu()
    if kind is GateKind.FFW:  # the quick division is off by up to 2 units in the last place, and not the only rounding
        torch.testing.assert_close(got, defaults.gate_weight(*arguments), rtol=8 * torch.finfo(dtype).eps, atol=0)
    else:
        assert torch.equal(got, defaults.gate_weight(*arguments))
    arguments.insert(0, random(count, seed=3, dtype=dtype))
    got = torch.ops.ffw_fast.gate_weight_backward(*on_gpu(arguments)).cpu()
    exact = defaults.gate_weight_backward(*(x.double() for x in arguments[:3]), *arguments[3:])
    assert_no_worse(got, defaults.gate_weight_backward(*arguments), exact)


@pytest.mark.parametrize("temperature", [1e-30, 1e-8, 3e-5, 0.7, 123.0, 1e30])
def test_the_inverse_temperature_is_rounded_once(temperature):
    scores = random(100_000, scale=3 * min(temperature, 1.0))
    arguments = [torch.ones(100_000), scores, *settings(temperature), int(GateKind.BERNOULLI)]
    got = torch.ops.ffw_fast.gate_weight(*on_gpu(arguments)).cpu()
    assert torch.equal(got, torch.ops.ffw_fast.gate_weight(*arguments))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", WEIGHTS)
def test_gated_adam_in_a_graph(defaults, kind, dtype):
    """Ten replays of one captured step against ten steps on the CPU."""
    state, weight = adam_state(10_007, dtype)
    state[0].zero_()
    grad, (temperature, draw) = random(10_007, seed=5, dtype=dtype), settings()
    rest = [weight, grad, temperature, temperature.clone(), torch.tensor(0.0), torch.tensor(1e-3), draw, draw.clone()]
    exact = [x.double().clone() for x in state]
    gpu = on_gpu([*state, *rest])
    gpu[9] += 1
    graph = torch.cuda.CUDAGraph()
    start = [x.clone() for x in gpu]
    torch.ops.ffw_fast.gated_adam_step_(*gpu, *ADAM, int(kind), True)
    with torch.cuda.graph(graph):
        torch.ops.ffw_fast.gated_adam_step_(*gpu, *ADAM, int(kind), True)
        gpu[9] += 1
    for tensor, value in zip(gpu, start, strict=True):
        tensor.copy_(value)
    for number in range(1, 11):
        graph.replay()
        rest[4].fill_(float(number))
        defaults.gated_adam_step_(*state, *rest, *ADAM, int(kind), True)
        wide = [rest[0].double(), rest[1].double(), *rest[2:]]
        defaults.gated_adam_step_(*exact, *wide, *ADAM, int(kind), True)
    for i in (1, 2, 3):
        assert_no_worse(gpu[i].cpu(), state[i], exact[i])
    torch.testing.assert_close(gpu[4].cpu(), state[4], rtol=1e-5, atol=0)


@pytest.mark.parametrize("heads", [1, 2, 5])
@pytest.mark.parametrize(("width", "classes"), [(128, 10), (100, 10), (512, 2), (2048, 20), (4096, 40)])
def test_fit_linear_head(defaults, heads, width, classes):
    mine = fit_arguments(1003, width, classes, heads, 100, 3)
    mine[4][0] = math.inf
    gpu = on_gpu(mine)
    exact = [x.double().clone() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in mine]
    losses = torch.ops.ffw_fast.fit_linear_head_(*gpu).cpu()
    defaults.fit_linear_head_(*mine)
    expected = defaults.fit_linear_head_(*exact)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    for i in range(4):
        assert_no_worse(gpu[i].cpu(), mine[i], exact[i], factor=4)


@pytest.mark.parametrize("dtype", [*WEIGHTS, torch.float64])
def test_mutual_information(defaults, dtype):
    logits, labels = random(1000, 2, 10, dtype=dtype), torch.randint(9, (1000, 2))
    information, joint = torch.ops.ffw_fast.mutual_information(logits.cuda(), labels.cuda())
    expected, expected_joint = defaults.mutual_information(logits.double(), labels)
    torch.testing.assert_close(information.cpu().double(), expected, rtol=1e-3, atol=1e-6)
    grad = torch.ones_like(information)
    got = torch.ops.ffw_fast.mutual_information_backward(grad, logits.cuda(), labels.cuda(), joint).cpu()
    exact = defaults.mutual_information_backward(grad.cpu().double(), logits.double(), labels, expected_joint)
    torch.testing.assert_close(got.double(), exact, rtol=2e-2, atol=1e-7)


def objective_on_gpu(*arguments):
    """The results of a call, and of one that a graph replays: the same bits."""
    gpu = on_gpu(arguments)
    results = torch.ops.ffw_fast.objective(*gpu)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.ops.ffw_fast.objective(*gpu)
    for result in captured:
        result.fill_(math.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, captured, strict=True))
    return [result.cpu() for result in captured]


@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize("dtype", [*WEIGHTS, torch.float64])
@pytest.mark.parametrize("name", [*MINIBATCHES, "more than one block's memory"])
def test_objective(defaults, name, dtype, tables):
    sizes = MINIBATCHES.get(name, (3001, 300, 1, 300, None))[:-1]
    assert_objective(objective_on_gpu, defaults.objective, objective_inputs(*sizes, dtype, tables))


def test_objective_of_no_samples_and_of_wrong_labels():
    inputs = objective_inputs(40, 3, 1, 3, spread=300.0, tables=True)
    inputs[3] = inputs[5][inputs[1]].unsqueeze(1)  # all biases aligned
    losses, _, by_head_logits = torch.ops.ffw_fast.objective(*on_gpu(inputs), *FACTORS)
    assert losses[1].isfinite() and losses[2] == 0 and not by_head_logits.any()
    inputs[1][3] = 1 << 40
    assert torch.ops.ffw_fast.objective(*on_gpu(inputs), *FACTORS)[0].isnan().all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_off_the_first_device(defaults):
    weight, scores, (temperature, draw) = random(999), random(999, seed=2), settings()
    arguments = [weight, scores, temperature, draw, int(GateKind.CONCRETE)]
    got = torch.ops.ffw_fast.gate_weight(*(x.to("cuda:1") if isinstance(x, torch.Tensor) else x for x in arguments))
    assert got.device.index == 1
    assert torch.equal(got.cpu(), defaults.gate_weight(*arguments))
    assert philox.uniform(8, draw.to("cuda:1")).device.index == 1
