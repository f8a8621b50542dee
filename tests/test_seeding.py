"""Random numbers by seed and purpose, beside the global generators."""

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

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
