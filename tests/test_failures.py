"""A run that cannot go on says why and where, and leaves its last good checkpoint."""

import pytest
import torch
from safetensors import safe_open

from ffw_fast import heads, optim
from ffw_fast.failures import memory_errors_explained
from ffw_fast.loop import Loop
from ffw_fast.run_state import CHECKPOINT
from tests.short_runs import run

pytestmark = pytest.mark.usefixtures("short_fits")


def poisoned(monkeypatch, epoch: int, step: int, poison) -> None:
    """Call ``poison(loop)`` before that step of that epoch (both from 1), whenever it is run."""
    whole = Loop.batches

    def batches(loop):
        for number, batch in enumerate(whole(loop), 1):
            if (len(loop.history) + 1, number) == (epoch, step):
                poison(loop)
            yield batch

    monkeypatch.setattr(Loop, "batches", batches)


def nan_in_the_scores_of(layer: str):
    def poison(loop):
        loop.gates.view(loop.gates.scores, layer).view(-1)[3] = float("nan")
        loop.gates.refresh()

    return poison


@pytest.mark.parametrize("layer", ["fc1", "classifier"])
def test_the_first_number_that_is_not_finite_is_traced(monkeypatch, tmp_path, layer):
    poisoned(monkeypatch, 3, 2, nan_in_the_scores_of(layer))
    message = rf"no longer finite in epoch 3; first at step 2 of the epoch, in the output of layer '{layer}'$"
    with pytest.raises(FloatingPointError, match=message):
        run(run_dir=tmp_path)
    with safe_open(tmp_path / CHECKPOINT, framework="pt") as file:
        assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118
    monkeypatch.undo()
    monkeypatch.setattr(heads, "MAX_EPOCHS", 6)
    found = run(run_dir=tmp_path, resume=True)
    assert len(found.history) == 5
    assert all(torch.equal(found.scores[name], scores) for name, scores in run().scores.items())


def test_a_score_that_no_loss_shows_is_found(monkeypatch):
    """A hard gate of a score that is NaN is 0, so that the loss stays finite."""
    poisoned(monkeypatch, 2, 3, nan_in_the_scores_of("fc1"))
    message = r"in epoch 2; first at step 3 of the epoch, in the scores of layer 'fc1'$"
    with pytest.raises(FloatingPointError, match=message):
        run(gate="hard")


def test_a_loss_that_overflows():
    with pytest.raises(FloatingPointError, match=r"in epoch 1; first at step \d of the epoch, in the loss$"):
        run(gamma=1e38, alpha=3e38)


def test_a_head_that_diverges(monkeypatch):
    monkeypatch.setattr(heads, "LR", 1e30)
    with pytest.raises(FloatingPointError, match="a private head's loss is no longer finite"):
        run()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        MemoryError("no memory"),
    ],
)
def test_out_of_memory_names_the_batch_size(monkeypatch, tmp_path, error):
    def step(*_arguments):
        raise error

    monkeypatch.setattr(optim.GatedAdam, "step", step)
    with pytest.raises(MemoryError, match=r"the extraction ran out of memory on cpu at batch_size=10; a smaller one"):
        run(run_dir=tmp_path)


def test_memory_that_cannot_be_had():
    explained = memory_errors_explained("training", 7, torch.device("cpu"))
    with pytest.raises(MemoryError, match=r"training ran out of memory on cpu at batch_size=7"), explained:
        torch.empty(1 << 60)


def test_other_errors_stay_as_they_are():
    explained = memory_errors_explained("training", 7, torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied"), explained:
        torch.ones(3, 2) @ torch.ones(3, 2)
