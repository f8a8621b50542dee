"""The benchmark of Table 8 measures both sides, multiplies out, and prints a table that can be read in a pipe."""

import json

import pytest
from ffw_fast.benchmarks import table8
from ffw_fast.benchmarks.machine import Rates
from ffw_fast.benchmarks.whole import run_whole, whole_table

from ffw_fast.tables import print_table


@pytest.fixture(autouse=True)
def steady_rates(monkeypatch):
    monkeypatch.setattr(table8, "measure_rates", lambda bf16: Rates(1e11, 0, 1e10))


def test_table_and_figures(tmp_path, capsys):
    words = ["--tiny", "--only", "perceptron", "--steps", "2", "--precision", "fp32"]
    table8.main([*words, "--json", str(tmp_path / "table8.json")])
    written = json.loads((tmp_path / "table8.json").read_text())
    (row,) = written["rows"]
    assert row["fp32"]["ratio_to_reference"] == pytest.approx(row["reference"]["epoch"] / row["fp32"]["epoch"])
    assert row["fp32"]["job_seconds"] == pytest.approx(table8.EPOCHS * row["fp32"]["epoch"])
    assert row["fp32"]["adaptive_epochs"] == 625, "5000 steps, of which 400 samples by 50 are 8 an epoch"
    assert row["fp32"]["adaptive_seconds"] == pytest.approx(625 * row["fp32"]["epoch"])
    assert row["fp32"]["floor_epoch"] < row["fp32"]["epoch"]
    assert written["machine"]["rates"]["fp32"] == 1e11
    printed = capsys.readouterr().out
    assert "Tiny perceptron" in printed
    assert "both schedules, multiplied out" in printed
    assert "\N{HORIZONTAL ELLIPSIS}" not in printed  # nothing is cut


def test_an_unknown_workload_lists_the_known_ones():
    with pytest.raises(ValueError, match="CelebA"):
        table8.main(["--only", "nothing"])


def test_a_disturbed_measurement_of_the_rates_does_not_stand():
    assert Rates(2, 0, 5).best(Rates(1, 0, 6)) == Rates(2, 0, 6)


def test_whole_runs_of_all_sides(capsys):
    results = run_whole(max_epochs=2, vanilla_epochs=1, train_size=200, unbiased_size=200, unbiased_digits=100)
    ours, theirs = results["ffw_fast"], results["reference"]
    assert ours["epochs"] == theirs["epochs"] == 2
    assert ours["pruned"]["sparsity"] == pytest.approx(theirs["pruned"]["sparsity"], abs=0.01)
    assert ours["ratio"] == pytest.approx(theirs["seconds"] / ours["seconds"])
    assert results["ffw_fast, adaptive"]["epochs"] == 2
    print_table(whole_table(results))
    printed = capsys.readouterr().out
    assert "reference, pruned" in printed
    assert "ffw_fast, adaptive, best" in printed
