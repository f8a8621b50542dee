"""``ffw-fast bench cooling``: both schedules are followed epoch by epoch, on a tiny network's worth of data."""

import pytest
from ffw_fast.benchmarks.cooling import BINS, measure, table


@pytest.fixture(scope="module")
def results():
    sizes = {"train_size": 100, "unbiased_size": 300, "unbiased_digits": 30}
    return measure(seed=0, gamma=1.0, anneal_rate=2e-3, max_epochs=8, epochs=1, **sizes)


def test_every_epoch_is_followed(results):
    for schedule in ("published", "adaptive"):
        epochs = results[schedule]["epochs"]
        assert [row["epoch"] for row in epochs] == list(range(1, len(epochs) + 1))
        temperatures = [row["temperature"] for row in epochs]
        assert temperatures == sorted(temperatures, reverse=True)
        for row in epochs:
            assert 0 <= row["distance_from_binary"] <= 0.5
            assert all(0 <= row[name] <= 1 for name in ("gated", "pruned_at_zero", "pruned_at_half"))
    assert results["adaptive"]["epochs"][-1]["temperature"] < results["adaptive"]["epochs"][0]["temperature"]


def test_the_first_cut_moves_gates_towards_zero(results):
    """All gates are counted; those that stand at 1 before a cut stand there after it."""
    histograms = results["published"]["histograms"]
    assert set(histograms) == {"before", "after"}
    before, after = histograms["before"], histograms["after"]
    assert len(before) == BINS and sum(before) == sum(after) == 2352 * 100 + 2 * 100 * 100 + 100 * 10
    assert sum(index * count for index, count in enumerate(after)) < sum(i * count for i, count in enumerate(before))
    assert after[-1] <= before[-1]


def test_table_has_a_row_for_both_ends(results):
    shown = table(results)
    assert shown.row_count >= 4 and len(shown.columns) == 7
