"""The training step reads nothing back and copies nothing from the host, so that it can be a CUDA graph."""

import contextlib
import warnings

import pytest
import torch
from torch.overrides import TorchFunctionMode

from ffw_fast import GATES, extract, gated_network
from ffw_fast.data.samples import Samples
from ffw_fast.inputs import Problem
from ffw_fast.loop import Loop
from ffw_fast.settings import Settings
from ffw_fast.step_graph import WARM_UP_STEPS, StepGraph
from tests import six_features

READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "is_nonzero", "nonzero",
         "equal", "allclose", "unique", "masked_select"}  # fmt: skip
MAKES = {"tensor", "as_tensor", "from_numpy", "asarray"}  # from numbers of the host, which are then copied


class NoHost(TorchFunctionMode):
    """Whatever moves data between host and device is an error."""

    def __torch_function__(self, function, types, arguments=(), settings=None):
        name = getattr(function, "__name__", "")
        if name in READS | MAKES:
            raise AssertionError(f"{name} inside a step")
        return function(*arguments, **settings or {})


def loop_on(device, **changes):
    samples = Samples(*(part.to(device) for part in six_features.samples()))
    settings = Settings(six_features.BOTTLENECK, six_features.CLASSES, **{"batch_size": 10, **changes})
    return Loop(Problem(settings, six_features.network().to(device), samples, samples, 8))


@pytest.fixture
def on_meta(monkeypatch):
    """A loop on tensors without data, so that nothing can be read of them, whoever tries."""
    monkeypatch.setattr(gated_network, "simplified", lambda model, *_rest: model)  # compares numbers, before the start
    monkeypatch.setattr(torch, "autocast", lambda *_settings, **_more: contextlib.nullcontext())
    return lambda **changes: loop_on("meta", **changes)


@pytest.mark.parametrize(
    ("gate", "schedule"),
    [*((gate, "published") for gate in GATES), *((gate, "adaptive") for gate in GATES if gate != "hard")],
)
def test_a_step_reads_nothing_back(on_meta, gate, schedule):
    loop = on_meta(gate=gate, schedule=schedule)
    with NoHost():
        for _ in range(2):
            loop.counted_step(*loop.train)


@pytest.mark.parametrize("read", [lambda t: t.item(), lambda t: bool(t > 0), lambda t: torch.tensor([1, 2])])
def test_what_reads_back_is_seen(read):
    with NoHost(), pytest.raises(AssertionError, match="inside a step"):
        read(torch.ones(()))


def test_a_step_changes_its_state_in_place():
    loop = loop_on("cpu", gate="bernoulli")
    loop.counted_step(*loop.train)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in loop.state()[0].items()}
    loop.counted_step(*loop.train)
    after = loop.state()[0]
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == {name: at for name, (at, _) in before.items()}
    changed = {name for name, (_, old) in before.items() if not torch.equal(old, after[name])}
    assert {"scores", "draw", "optimizer.step", "optimizer.exp_avg", "heads.weight", "heads.weight_momentum"} <= changed


class FakeGraphs:
    """CUDA's part of it, on the CPU: a capture runs its step on copies of nothing, and a replay runs it again."""

    def __init__(self, monkeypatch, fails=False):
        self.events, self.fails, self.captured, self.sync_mode = [], fails, False, 0
        stream = type("Stream", (), {"wait_stream": lambda self, other: None})
        self.current = before = stream()
        for name, value in {
            "device": lambda device: contextlib.nullcontext(),
            "Stream": stream,
            "current_stream": lambda: self.current,
            "set_stream": lambda stream: setattr(self, "current", stream),
            "stream": lambda stream: contextlib.nullcontext(),
            "get_sync_debug_mode": lambda: self.sync_mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "sync_mode", mode),
            "CUDAGraph": lambda: self,
            "graph": self.capture,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        self.is_back = lambda: self.current is before and self.sync_mode == 0

    @contextlib.contextmanager
    def capture(self, graph, stream):
        self.events.append("capture")
        self.captured, before, self.current = True, self.current, stream
        yield
        self.captured = False
        if not self.fails:
            self.current = before  # where the end of a capture fails, PyTorch does not get there
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    def step(self, x, y):
        assert torch.equal(y, -x)
        if not self.captured:
            self.events.append(x.tolist())

    def replay(self):
        x, y = self.step_graph._batch
        assert torch.equal(y, -x)
        self.events.append(["replay", *x.tolist()])


def run_graph(monkeypatch, fails=False):
    fake = FakeGraphs(monkeypatch, fails)
    graph = StepGraph(fake.step, 2, torch.device("cpu"))
    graph._is_capturable = True  # as on a GPU
    fake.step_graph = graph
    for number in range(WARM_UP_STEPS + 2):
        for x in (torch.tensor([number, number]), torch.tensor([number])):
            graph(x, -x)
            assert fake.is_back(), "the stream, and the debug mode"
    return fake.events


def test_warm_up_capture_replay_and_short_minibatches(monkeypatch):
    events = run_graph(monkeypatch)
    eager = [[n, n] if full else [n] for n in range(WARM_UP_STEPS) for full in (True, False)]
    assert events == [*eager, "capture", ["replay", 3, 3], [3], ["replay", 4, 4], [4]]


def test_a_failed_capture_warns_once_and_loses_no_step(monkeypatch):
    with pytest.warns(RuntimeWarning, match="not run from a CUDA graph: operation not permitted when stream is captu"):
        events = run_graph(monkeypatch, fails=True)
    events.remove("capture")
    assert events == [[n, n] if full else [n] for n in range(WARM_UP_STEPS + 2) for full in (True, False)]


def test_the_warning_tells_the_first_error_and_not_that_of_the_capture_s_end(monkeypatch):
    fake = FakeGraphs(monkeypatch)

    @contextlib.contextmanager
    def capture(graph, stream):
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    def step(x):
        if graph._warm_up_left == 0 and fake.events == []:
            fake.events.append("failed")
            raise RuntimeError("cannot read back while capturing")

    monkeypatch.setattr(torch.cuda, "graph", capture)
    graph = StepGraph(step, 2, torch.device("cpu"))
    graph._is_capturable, graph._warm_up_left = True, 0
    with pytest.warns(RuntimeWarning, match="cannot read back while capturing"):
        graph(torch.zeros(2))
    assert not graph.is_captured


@pytest.mark.parametrize("waits", [True, False])
def test_a_step_that_waits_for_the_device_is_not_captured(monkeypatch, waits):
    fake = FakeGraphs(monkeypatch)
    texts = ["called a synchronizing CUDA operation (Triggered internally at CUDAFunctions.cpp:162.)"] * waits

    def step(x):
        assert fake.sync_mode == ("warn" if graph._warm_up_left == 0 and not fake.captured else 0)
        if fake.sync_mode == "warn":
            for text in ["of the model's own", *texts]:
                warnings.warn(text, UserWarning, stacklevel=1)

    fake.replay = lambda: None
    graph = StepGraph(step, 2, torch.device("cpu"))
    graph._is_capturable = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(WARM_UP_STEPS):
            graph(torch.zeros(2))
    told = ["the training step is not run from a CUDA graph: it reads something back from the device"] * waits
    assert [str(warning.message) for warning in caught] == ["of the model's own", *told]
    fake.sync_mode = 0
    if not waits:
        graph(torch.zeros(2))
    assert graph.is_captured == (not waits)


def two_runs(monkeypatch, device, schedule):
    """Scores of one extraction that may replay its steps and of one that may not; only a failed capture is an error."""
    sets = [tuple(part.to(device) for part in six_features.samples(65, seed=seed)) for seed in (0, 1)]
    arguments = six_features.arguments(schedule=schedule, max_epochs=3, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the task is so small that much is doubtful
        warnings.filterwarnings("error", message="the training step is not run")
        replayed = extract(six_features.network(), *sets, **arguments)
        monkeypatch.setattr("ffw_fast.step_graph.WARM_UP_STEPS", 10**9)
        eager = extract(six_features.network(), *sets, **arguments)
    return replayed.scores, eager.scores


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("schedule", ["published", "adaptive"])
def test_replayed_steps_are_those_of_an_eager_run(monkeypatch, schedule):
    replayed, eager = two_runs(monkeypatch, "cuda", schedule)
    for name, scores in eager.items():
        torch.testing.assert_close(replayed[name], scores, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_second_device_captures_its_own_steps(monkeypatch):
    """PyTorch's stream for captures is of the device that was the first to need one."""
    two_runs(monkeypatch, "cuda:0", "adaptive")
    monkeypatch.undo()
    replayed, eager = two_runs(monkeypatch, "cuda:1", "adaptive")
    for name, scores in eager.items():
        torch.testing.assert_close(replayed[name], scores, rtol=1e-4, atol=1e-6)


def test_the_comparison_of_runs_works_without_a_gpu(monkeypatch):
    """So that its first run on a GPU does not fail for a reason of its own."""
    first, second = two_runs(monkeypatch, "cpu", "adaptive")
    assert first.keys() == second.keys() and all(torch.equal(scores, second[name]) for name, scores in first.items())
