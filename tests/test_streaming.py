"""Datasets that do not fit into memory or augment at random: read whenever they are wanted, to the same results."""

import multiprocessing
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, default_collate, get_worker_info

import ffw_fast
from ffw_fast import reference
from ffw_fast.data import datasets
from ffw_fast.data.stream import Stream, drawing_from
from ffw_fast.inputs import as_samples
from tests.six_features import CLASSES, arguments, network, samples


class Items(Dataset):
    """The given samples, counting how often one is read; ``shift`` draws what is added to an input."""

    def __init__(self, data, shift=None):
        self.data, self.shift, self.reads = data, shift, 0

    def __len__(self):
        return len(self.data[1])

    def __getitem__(self, index):
        self.reads += 1
        x, y, b = (part[index] for part in self.data)
        return (x + self.shift() if self.shift else x), y, b


DRAWS = {
    "torch": lambda: 0.3 * torch.randn(6),
    "numpy": lambda: 0.3 * torch.from_numpy(np.random.standard_normal(6)).float(),  # noqa: NPY002
    "python": lambda: torch.tensor([0.3 * random.gauss(0, 1) for _ in range(6)]),
}


def draw_shift():
    return torch.randn(6)


@pytest.fixture
def no_room(monkeypatch):
    monkeypatch.setattr(datasets, "memory_budget", lambda: 100)


def scores_of(found) -> torch.Tensor:
    return torch.cat([score.flatten() for score in found.scores.values()])


def test_what_fits_and_stays_is_read_once(capsys):
    train, val = Items(samples(40)), Items(samples(20, seed=1))
    found = ffw_fast.extract(network(), train, DataLoader(val, batch_size=7), **arguments(progress=True))
    assert train.reads <= 40 + 2 * datasets.PROBES + 1
    told = capsys.readouterr().err
    assert "train: 40 samples read once and kept in memory (960 bytes)" in told
    assert "val: 20 samples read once" in told
    kept = ffw_fast.extract(network(), train.data, val.data, **arguments())
    assert torch.equal(scores_of(found), scores_of(kept))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_does_not_fit_is_streamed_to_the_same_result(no_room, capsys, workers):
    train, val = samples(40), samples(20, seed=1)
    loader = DataLoader(Items(train), batch_size=3, num_workers=workers)
    found = ffw_fast.extract(network(), loader, Items(val), **arguments(progress=True))
    assert "train: 40 samples that take 960 bytes, more than there is room for, read anew" in capsys.readouterr().err
    kept = ffw_fast.extract(network(), train, val, **arguments())
    assert torch.equal(scores_of(found), scores_of(kept))
    assert found.metrics["best"] == kept.metrics["best"]


@pytest.mark.parametrize("draw", DRAWS)
def test_augmented_data_is_held_to_the_reference_without_cached_features(draw, capsys):
    train, val = Items(samples(40), DRAWS[draw]), samples(20, seed=1)
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    found = ffw_fast.extract(network(), train, val, **arguments(progress=True))
    assert "train: 40 samples that are augmented at random, read anew in every pass" in capsys.readouterr().err
    head_epochs = sum(row["head_epochs"] for row in found.history)
    assert train.reads >= 40 * head_epochs
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert (np.random.get_state()[1] == generators[2]).all()  # noqa: NPY002
    plain = reference.extract(network(), train, val, **arguments())
    ours, theirs = scores_of(found), scores_of(plain)
    assert not (ours - theirs).norm() > 1e-3 * theirs.norm()
    assert [row["head_epochs"] for row in plain.history] == [row["head_epochs"] for row in found.history]
    again = ffw_fast.extract(network(), train, val, **arguments())
    assert torch.equal(scores_of(again), ours)


@pytest.mark.parametrize("method", ["ffw", "bise"])
def test_heads_learn_from_one_draw_a_fit_where_that_is_asked_for(method):
    train, val = Items(samples(40), DRAWS["torch"]), samples(20, seed=1)
    options = arguments(method=method, cache_augmented=True, gate=None, schedule=None, max_epochs=11)
    found = ffw_fast.extract(network(), train, val, **options)
    reads, train.reads = train.reads, 0
    anew = ffw_fast.extract(network(), train, val, **{**options, "cache_augmented": False})
    head_epochs = sum(row.get("head_epochs", 0) for row in anew.history)
    assert reads + 40 * head_epochs / 2 < train.reads
    assert not torch.equal(scores_of(found), scores_of(anew)), "another draw, another result"
    plain = reference.extract(network(), train, val, **options)
    ours, theirs = scores_of(found), scores_of(plain)
    assert not (ours - theirs).norm() > 1e-3 * theirs.norm()
    kept = [
        ffw_fast.extract(network(), train.data, val, **{**options, "cache_augmented": cached})
        for cached in (True, False)
    ]
    assert torch.equal(*map(scores_of, kept)), "nothing changes where samples stay the same"


def test_draws_depend_on_the_order_alone_and_not_on_workers_or_minibatches():
    data = Items(samples(30), DRAWS["torch"])
    loaders = [DataLoader(data, batch_size=4, num_workers=workers) for workers in (0, 2)]
    streams = [as_samples(loader, "train", CLASSES).x for loader in loaders]
    first = torch.cat(list(streams[0].split(7)))
    assert torch.equal(torch.cat(list(streams[1].split(5))), first)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    other = torch.cat(list(streams[0].in_order(order).split(30)))
    assert torch.equal(torch.cat(list(streams[1].in_order(order).split(30))), other)
    assert not torch.isclose(other, first[order]).any()


def noisy(items):
    x, y, b = default_collate(items)
    return x + torch.randn_like(x), y, b


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_collated_at_random_is_drawn_anew_in_every_pass_and_alike_in_every_run(workers):
    data, state = samples(30), torch.get_rng_state()
    loader = DataLoader(Items(data), batch_size=8, num_workers=workers, collate_fn=noisy)
    x = as_samples(loader, "train", CLASSES).x
    noise = torch.cat(list(x.split(8))) - data[0]
    assert torch.equal(torch.get_rng_state(), state)
    order = torch.arange(30).flip(0)
    other = torch.cat(list(x.in_order(order).split(8))) - data[0][order]
    assert not torch.isclose(noise, other, atol=1e-4).any()
    torch.manual_seed(1)
    assert torch.equal(torch.cat(list(x.split(8))) - data[0], noise)


def drawn_from(seed: int) -> float:
    with drawing_from(seed):
        time.sleep(0.05)  # for others to come between
        return torch.rand(1).item()


def test_threads_that_draw_from_seeds_do_not_disturb_each_other():
    before, alone = torch.get_rng_state(), [drawn_from(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(drawn_from, range(4))) == alone
    assert torch.equal(torch.get_rng_state(), before)


def test_a_worker_that_is_forked_while_another_thread_draws_can_draw():
    drawing = threading.Event()

    def draw() -> None:
        with drawing_from(0):
            drawing.set()
            time.sleep(0.2)

    thread = threading.Thread(target=draw)
    thread.start()
    drawing.wait()
    worker = multiprocessing.get_context("fork").Process(target=drawn_from, args=(1,), daemon=True)
    worker.start()
    worker.join(60)
    thread.join()
    assert worker.exitcode == 0


def test_a_sample_that_comes_twice_in_a_pass_is_drawn_twice():
    x = as_samples(DataLoader(Items(samples(30), DRAWS["torch"]), sampler=[7] * 8), "train", CLASSES).x[:]
    assert len(x.unique(dim=0)) == 8


class Opened(Items):
    """Augmented samples that can be read once a worker has opened them."""

    is_open = False

    def __getitem__(self, index):
        assert get_worker_info().dataset is self
        assert self.is_open, "a file that is not open"
        return super().__getitem__(index)

    @staticmethod
    def open(_worker):
        get_worker_info().dataset.is_open = True


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_find_the_dataset_that_was_given(context):
    data = Opened(samples(30), draw_shift)
    loader = DataLoader(data, 8, num_workers=1, worker_init_fn=Opened.open, multiprocessing_context=context)
    assert as_samples(loader, "train", CLASSES).augments


def test_streams_are_read_alike_whatever_the_default_device_is():
    """Labels come as numbers, of which PyTorch makes tensors on that device."""

    class Numbered(Items):
        def __getitem__(self, index):
            x, y, b = super().__getitem__(index)
            return x, int(y), int(b)

    data = Numbered(samples(30), DRAWS["numpy"])
    expected = as_samples(data, "train", CLASSES)
    with torch.device("meta"):
        given = as_samples(data, "train", CLASSES)
        x = given.x[:]
    assert torch.equal(x, expected.x[:])
    assert torch.equal(given.y, expected.y)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_a_sampler_chooses_what_is_streamed(no_room, kind):
    data = samples(20)
    data[0][:, 0] = torch.arange(20)
    loader = DataLoader(Items(data), batch_size=4, sampler=SubsetRandomSampler(kind([3, 5, 8, 9, 11])))
    given = as_samples(loader, "train", CLASSES)
    assert isinstance(given.x, Stream)
    rows = given.x[:][:, 0].long()
    assert sorted(rows.tolist()) == [3, 5, 8, 9, 11]
    assert torch.equal(given.y, data[1][rows])


def test_augmented_runs_resume_to_the_same_result(tmp_path):
    train, val = Items(samples(40), DRAWS["torch"]), samples(20, seed=1)
    straight = ffw_fast.extract(network(), train, val, **arguments(max_epochs=3))
    ffw_fast.extract(network(), train, val, **arguments(max_epochs=1, run_dir=tmp_path))
    resumed = ffw_fast.extract(network(), train, val, **arguments(max_epochs=3, run_dir=tmp_path, resume=True))
    assert torch.equal(scores_of(resumed), scores_of(straight))


def test_a_run_resumes_where_there_is_less_memory_than_before(tmp_path, monkeypatch):
    train, val = Items(samples(40)), samples(20, seed=1)
    straight = ffw_fast.extract(network(), train, val, **arguments(max_epochs=3))
    ffw_fast.extract(network(), train, val, **arguments(max_epochs=1, run_dir=tmp_path))
    monkeypatch.setattr(datasets, "memory_budget", lambda: 100)
    resumed = ffw_fast.extract(network(), train, val, **arguments(max_epochs=3, run_dir=tmp_path, resume=True))
    assert torch.equal(scores_of(resumed), scores_of(straight))


def test_other_streamed_data_does_not_resume(no_room, tmp_path):
    train, val = samples(40), samples(20, seed=1)
    ffw_fast.extract(network(), Items(train), val, **arguments(max_epochs=1, run_dir=tmp_path))
    train[0][7, 2] += 1e-3
    with pytest.raises(ValueError, match="data was"):
        ffw_fast.extract(network(), Items(train), val, **arguments(run_dir=tmp_path, resume=True))


def test_fine_tuning_and_evaluation_read_streams_too(no_room):
    train, val = Items(samples(40)), Items(samples(20, seed=1))
    found = ffw_fast.extract(network(), train, val, **arguments(max_epochs=1))
    tuned = found.finetune(train, val, epochs=2, gamma=0.5)
    kept = found.finetune(train.data, val.data, epochs=2, gamma=0.5)
    assert torch.equal(tuned.fc1.weight, kept.fc1.weight)
    assert ffw_fast.evaluate(tuned, val) == ffw_fast.evaluate(tuned, val.data)


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield from zip(*samples(8), strict=True)


class Breaking(Items):
    """Gives NaN when it is read for the hundredth time."""

    def __getitem__(self, index):
        x, y, b = super().__getitem__(index)
        return (x / 0 if self.reads >= 100 else x), y, b


class Halving(DataLoader):
    def __iter__(self):
        yield from ((x / 2, y, b) for x, y, b in super().__iter__())


def test_a_loader_that_changes_what_it_yields_is_kept_and_not_streamed(monkeypatch):
    loader = Halving(Items(samples(20)), batch_size=8)
    assert torch.equal(as_samples(loader, "train", CLASSES).x, samples(20)[0] / 2)
    monkeypatch.setattr(datasets, "memory_budget", lambda: 100)
    with pytest.raises(ValueError, match="train is streamed, which leaves out what Halving does in its __iter__"):
        as_samples(loader, "train", CLASSES)


def test_what_cannot_be_streamed_is_refused(no_room):
    with pytest.raises(ValueError, match=r"train takes more than the 100 bytes .* cannot be streamed: give it as"):
        as_samples(Endless(), "train", CLASSES)
    with pytest.raises(ValueError, match=r"does not fit into memory .* needs a DataLoader with a batch_size"):
        as_samples(DataLoader(Items(samples(9)), batch_size=None), "train", CLASSES)
    with pytest.raises(ValueError, match=r"train gives samples .* or NaN or inf, when it is read again"):
        ffw_fast.extract(network(), Breaking(samples(40)), samples(20), **arguments())
    x, y, b = samples(40)
    x[33, 2] = float("nan")
    with pytest.raises(ValueError, match="train: x holds NaN"):
        as_samples(Items((x, y, b)), "train", CLASSES)
