"""Random numbers by seed and purpose, beside the global generators."""

import random
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ffw_fast.heads import initial_parameters
from ffw_fast.seeding import epoch_order, seeded_generator

SEEDS = st.integers(0, 2**63 - 1)


@given(SEEDS, st.text(max_size=20))
def test_one_seed_and_purpose_give_one_stream(seed, purpose):
    once, again = (torch.rand(4, generator=seeded_generator(seed, purpose)) for _ in range(2))
    assert torch.equal(once, again)


def test_seeds_and_purposes_give_different_streams():
    keys = [(seed, purpose) for seed in (0, 1, 11, 2**63 - 1) for purpose in ("", "1", "heads", "heads 1")]
    streams = {tuple(torch.rand(4, generator=seeded_generator(*key)).tolist()) for key in keys}
    assert len(streams) == len(keys)


@given(st.integers(0, 300), SEEDS, st.integers(0, 10**6))
def test_an_epoch_visits_every_sample_once(count, seed, epoch):
    order = epoch_order(count, seed, "gate epoch", epoch)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(count))


def test_orders_differ_between_epochs_streams_and_seeds():
    keys = [(seed, stream, epoch) for seed in (0, 1) for stream in ("gate epoch", "head epoch") for epoch in (0, 1, 10)]
    assert len({tuple(epoch_order(50, *key).tolist()) for key in keys}) == len(keys)


def test_the_global_generators_are_left_alone():
    states = torch.get_rng_state(), random.getstate()
    epoch_order(100, 3, "gate epoch", 5)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


@pytest.mark.usefixtures("restore_threads")
def test_orders_drawn_by_several_threads_at_once_leave_the_number_of_threads_as_it_is():
    torch.set_num_threads(4)
    found = []

    def draw() -> None:
        for epoch in range(300):
            epoch_order(2000, 0, "gate epoch", epoch)
        found.append(torch.get_num_threads())

    workers = [threading.Thread(target=draw) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [*found, torch.get_num_threads()] == [4] * 5


def test_what_is_drawn_does_not_depend_on_the_default_device():
    expected = epoch_order(100, 3, "gate epoch", 5), *initial_parameters(2, 3, 4, seed=1)
    with torch.device("meta"):
        found = epoch_order(100, 3, "gate epoch", 5), *initial_parameters(2, 3, 4, seed=1)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
