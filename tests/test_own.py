"""A user's own model and data: functions named on the command line, a state dict, a file of options."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ffw_fast
from ffw_fast.cli import main
from ffw_fast.data.stream import Stream
from ffw_fast.own import find_function, load_weights, options_in_file, own_workload
from ffw_fast.runs.loading import load_run
from tests.six_features import CLASSES, network, samples

SHORT = ["--bottleneck", "relu", "--num-bias-classes", str(CLASSES), "--max-epochs", "2", "--batch-size", "10"]
MODULE = """
import torch
from tests.six_features import network, samples

def model():
    return network(seed=3)

def untrained():
    return network(seed=torch.randint(100, ()).item())

def data():
    return samples(40), samples(20, seed=1), samples(30, seed=2)

def two():
    return samples(40), samples(20, seed=1)

def double():
    return network(seed=3).double()

class Tied(torch.nn.Module):  # two names for one bias, and a state that is no tensor
    def __init__(self):
        super().__init__()
        self.fc1, self.relu, self.classifier = network(seed=3)
        self.also = self.fc1.bias
    def forward(self, x):
        return self.classifier(self.relu(self.fc1(x)))
    def get_extra_state(self):
        return {"version": 1}
    def set_extra_state(self, state):
        assert state == {"version": 1}

def halves():
    return tuple((x.half(), y, b) for x, y, b in data())

def fitting_but(change):
    train, val, (x, y, b) = data()
    return train, val, change(x, y, b)

def double_test():
    return fitting_but(lambda x, y, b: (x.double(), y, b))

def narrow_test():
    return fitting_but(lambda x, y, b: (x[:, :5], y, b))

def unknown_test():
    return fitting_but(lambda x, y, b: (x, y + 3, b))

def two_biases_in_test():
    return fitting_but(lambda x, y, b: (x, y, torch.stack([b.flatten(), b.flatten()], 1)))

def two_biases():
    return samples(40, 2), samples(20, 2, seed=1)

class Noisy(torch.utils.data.Dataset):
    def __len__(self):
        return 20
    def __getitem__(self, index):
        x, y, b = samples(20)
        return x[index] + 0.1 * torch.randn(6), y[index], b[index]

def noisy():
    return Noisy(), samples(20, seed=1)

def one():
    return samples(40)

def none():
    return None

def text():
    return "model"

def broken():
    raise KeyError("no such thing")

number = 3
"""


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    """A folder with the module ``mine``, which is the current one."""
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("mine", None)
    yield tmp_path
    sys.modules.pop("mine", None)


def run(*arguments: str) -> int:
    return main(["run", *arguments, *SHORT, "--out", "out", "--quiet"])


def test_model_and_data_of_the_current_folder(capsys):
    assert run("--model", "mine:model", "--data", "mine:data", "--bias-names", "colour") == 0
    assert "colour, read by a head" in capsys.readouterr().out
    config, metrics = (json.loads(Path(f"out/{name}.json").read_text()) for name in ("config", "metrics"))
    assert config["workload"] == "own"
    assert config["samples"] == {"train": 40, "val": 20, "test": 30}
    assert config["vanilla_recipe"] is None
    expected = ffw_fast.extract(
        network(seed=3), samples(40), samples(20, seed=1), bottleneck="relu", num_bias_classes=CLASSES,
        batch_size=10, max_epochs=2, progress=False,
    )  # fmt: skip
    found = ffw_fast.Extraction.load("out", network(seed=3))
    assert all(torch.equal(score, expected.scores[name]) for name, score in found.scores.items())
    assert metrics["vanilla"]["task_accuracy"] == ffw_fast.evaluate(network(seed=3), samples(30, seed=2)).average
    assert torch.equal(load_file("out/vanilla.safetensors")["fc1.weight"], network(seed=3).fc1.weight)
    assert torch.equal(load_run("out", model="mine:model").model().fc1.weight, found.model().fc1.weight)


def test_a_run_folder_runs_no_code_of_its_own(capsys):
    """The folder names a function, as a stranger's could: it is not called, and its module not imported."""
    assert run("--model", "mine:model", "--data", "mine:two") == 0
    config = json.loads(Path("out/config.json").read_text())
    config["data_options"]["model"] = "theirs:model"
    Path("out/config.json").write_text(json.dumps(config))
    Path("theirs.py").write_text("open('mark', 'w').close()\n")
    with pytest.raises(ValueError, match=r"not called, .* any code so: give the function by --model MODULE:FUNCTION"):
        load_run("out")
    for command in (["compact", "out"], ["export", "out", "--format", "pt2"]):
        capsys.readouterr()
        assert main(command) == 2
        assert "give the function by --model MODULE:FUNCTION" in capsys.readouterr().err
    assert not Path("mark").exists()
    assert torch.equal(load_run("out", model="mine:model").dense_model.fc1.weight, network(seed=3).fc1.weight)
    assert "theirs" not in sys.modules


def test_a_run_becomes_a_program_by_the_function_that_the_user_names(capsys):
    assert run("--model", "mine:model", "--data", "mine:two") == 0
    export = ["export", "out", "--format", "pt2"]
    assert main([*export, "--model", "mine:model"]) == 0
    x = samples(5)[0]
    found = load_run("out", model="mine:model")
    torch.testing.assert_close(torch.export.load("out/model.pt2").module()(x), found.model()(x))
    capsys.readouterr()
    assert main([*export, "--model", "mine:modell"]) == 2
    assert "modell is not there" in capsys.readouterr().err
    Path("mine.py").write_text("from torch import nn\n\ndef small():\n    return nn.Linear(6, 3)\n")
    sys.modules.pop("mine")
    with pytest.raises(ValueError, match=r"vanilla.safetensors does not fit Linear"):
        load_run("out", model="mine:small")


def test_it_resumes_and_without_a_test_set_the_validation_set_is_measured():
    assert run("--model", "mine:untrained", "--data", "mine:two_biases") == 0
    assert json.loads(Path("out/config.json").read_text())["samples"] == {"train": 40, "val": 20}
    assert run("--model", "mine:untrained", "--data", "mine:two_biases", "--max-epochs", "3", "--resume") == 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("double_test", "test: x is torch.float64 and the model's weights are torch.float32"),
        ("narrow_test", "samples of train and test differ in shape: (6,) and (5,)"),
        ("unknown_test", "y holds label 5, but the model has 3 classes"),
        ("two_biases_in_test", "train has 1 biases and test has 2"),
    ],
)
def test_a_test_set_that_does_not_fit_is_refused_before_the_extraction(data, message, capsys, monkeypatch):
    monkeypatch.setattr("ffw_fast.runs.run.extract_by", lambda *_, **__: pytest.fail("extracted"))
    assert run("--model", "mine:model", "--data", f"mine:{data}") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("model", ["double", "Tied"])
def test_models_of_other_state(model):
    assert run("--model", f"mine:{model}", "--data", "mine:data") == 0
    found = load_run("out", model=f"mine:{model}")
    assert ffw_fast.evaluate(found.model(), samples(30, seed=2)).average > 0


def test_data_in_half_precision():
    assert run("--model", "mine:model", "--data", "mine:halves") == 0


def test_what_was_measured_without_a_test_set_is_said(capsys):
    assert run("--model", "mine:model", "--data", "mine:two") == 0
    assert "the validation set (chance" in capsys.readouterr().out
    metrics, config = (json.loads(Path("out", name).read_text()) for name in ("metrics.json", "config.json"))
    assert metrics["measured_on"] == "val"
    assert config["samples"] == {"train": 40, "val": 20}
    assert run("--model", "mine:model", "--data", "mine:data") == 0
    assert json.loads(Path("out/metrics.json").read_text())["measured_on"] == "test"
    assert "the unbiased test set (chance" in capsys.readouterr().out


def files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path("out").iterdir() if path.name != ".lock"}


def test_a_typo_costs_no_results(capsys):
    assert run("--model", "mine:model", "--data", "mine:data") == 0
    before = files()
    for wrong in (["--bottleneck", "relu2"], ["--granularity", "channel", "--where", "conv*"], ["--gamma", "-1"]):
        arguments = ["run", "--model", "mine:model", "--data", "mine:data", *SHORT, "--out", "out", "--quiet", *wrong]
        assert main(arguments) == 2
        assert files() == before


def test_a_refused_resume_changes_nothing(capsys):
    assert run("--model", "mine:model", "--data", "mine:data") == 0
    before = files()
    ours = ["run", "--model", "mine:model", "--data", "mine:data", *SHORT, "--out", "out", "--quiet", "--resume"]
    assert main([*ours, "--max-epochs", "1"]) == 2
    assert "it holds 2 epochs, more than max_epochs=1" in capsys.readouterr().err
    assert files() == before


def test_weights_in_the_folder_are_those_of_its_results():
    def run_with(seed: int, *more: str) -> None:
        save_file(network(seed).state_dict(), "trained.safetensors")
        assert run("--model", "mine:model", "--data", "mine:data", "--weights", "trained.safetensors", *more) == 0
        kept = load_file("out/vanilla.safetensors")["fc1.weight"]
        assert torch.equal(kept, network(seed).state_dict()["fc1.weight"])

    run_with(7)
    for name in ("checkpoint.safetensors", "checkpoint.previous.safetensors"):
        Path("out", name).unlink(missing_ok=True)
    run_with(8, "--resume")
    run_with(8, "--vanilla-only")
    assert "metrics.json" in files(), "it is the network that they are of"
    run_with(7, "--vanilla-only")
    assert not {"metrics.json", "scores.safetensors"} & files().keys()


def test_names_are_no_markup(capsys):
    assert run("--model", "mine:model", "--data", "mine:data", "--bias-names", "[/x] $ <b>&\\frac{ $") == 0
    assert "[/x] $ <b>&\\frac{ $, read by a head" in capsys.readouterr().out
    assert "[/x] $ &lt;b&gt;" in Path("out/report.html").read_text()


def test_a_folder_may_be_called_as_a_command_is(capsys):
    arguments = ["run", "--model", "mine:model", "--data", "mine:data", *SHORT, "--quiet"]
    assert main([*arguments, "--out", "run"]) == 0
    assert main(["--traceback", *arguments, "--out", "again"]) == 0
    assert main(["figure", "training", "run"]) == 0


def test_other_data_do_not_resume(capsys):
    assert run("--model", "mine:model", "--data", "mine:two") == 0
    assert run("--model", "mine:model", "--data", "mine:data", "--resume") == 2
    assert "data" in capsys.readouterr().err


def test_a_file_of_options_and_flags_after_it(capsys):
    Path("my.toml").write_text(
        'model = "mine:model"\ndata = "mine:data"\nbottleneck = "relu"\nnum_bias_classes = 3\ngamma = 2.5\n'
        'bias-names = ["colour"]\nbatch-size = 10\nmax-epochs = 5\nquiet = true\nresume = false\nout = "out"\n'
    )
    assert main(["run", "my.toml", "--max-epochs", "1"]) == 0
    settings = json.loads(Path("out/config.json").read_text())["settings"]
    assert (settings["gamma"], settings["max_epochs"]) == (2.5, 1)
    Path("digits.toml").write_text('workload = "multi-color-mnist"\nseed = -1\nsecond-division = false\n')
    known = {"multi-color-mnist": ["--seed", "--second-division", "--no-second-division"]}
    assert options_in_file(Path("digits.toml"), known.__getitem__) == [
        "multi-color-mnist", "--seed=-1", "--no-second-division",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("gamma = ", "is no TOML"),
        ("[extraction]\ngamma = 3", r"got a table \[extraction\]"),
        (None, "no such file"),
        ("quiet2 = false", "own has no option 'quiet2'; it has .*--quiet"),
        ('out = ""', "out is empty"),
    ],
)
def test_bad_files_of_options(content, message, capsys):
    if content is not None:
        Path("my.toml").write_text(content)
    assert main(["run", "my.toml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ffw-fast: error: my.toml")
    with pytest.raises((ValueError, OSError), match=message):
        raise ValueError(error)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_weights_from_a_file(suffix):
    state = network(seed=7).state_dict()
    path = f"weights.{suffix}"
    if suffix == "pt":
        torch.save({"state_dict": state, "epoch": 3}, path)
    else:
        save_file(state, path)
    assert run("--model", "mine:model", "--data", "mine:two", "--weights", path) == 0
    assert torch.equal(load_file("out/vanilla.safetensors")["fc1.weight"], state["fc1.weight"])


def test_weights_that_do_not_fit(tmp_path):
    state = network().state_dict()
    save_file({**state, "classifier.weight": torch.zeros(5, 8), "more": torch.zeros(1)}, "other.safetensors")
    with pytest.raises(
        ValueError,
        match=r"other.safetensors does not fit Sequential: the model lacks more; "
        r"other shapes of classifier.weight \(5, 8\) for \(3, 8\)",
    ):
        load_weights(network(), tmp_path / "other.safetensors")
    save_file({"fc1.weight": state["fc1.weight"]}, "part.safetensors")
    with pytest.raises(ValueError, match=r"it lacks classifier.bias, classifier.weight, fc1.bias$"):
        load_weights(network(), tmp_path / "part.safetensors")
    torch.save(network(), "pickled.pt")
    with pytest.raises(ValueError, match=r"would have to be unpickled, which is not done: save model.state_dict"):
        load_weights(network(), tmp_path / "pickled.pt")
    torch.save([1, 2], "list.pt")
    with pytest.raises(ValueError, match="must hold a state dict, names and tensors, got list"):
        load_weights(network(), tmp_path / "list.pt")
    for name in ("text.pt", "text.safetensors"):
        (tmp_path / name).write_text("nothing")
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            load_weights(network(), tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_weights(network(), tmp_path / "nowhere.pt")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("mine", ValueError, "expected module:function, such as mine:model, got 'mine'"),
        (":model", ValueError, "expected module:function"),
        ("mine:", ValueError, "expected module:function"),
        ("mine.py:model", ValueError, "without .py and folders"),
        ("nowhere:model", ImportError, "there is no module 'nowhere' in .*, and none is installed"),
        ("mine.nets:model", ImportError, "mine.nets"),
        ("mine:modell", ValueError, "modell is not there; .*mine.py has network, samples, model,"),
        ("mine:number", ValueError, "number is no function"),
    ],
)
def test_functions_that_are_not_there(name, error, message):
    with pytest.raises(error, match=message):
        find_function(name)


def test_a_module_that_fails():
    Path("bad.py").write_text("import nowhere_at_all\n")
    with pytest.raises(ImportError, match="module 'bad' cannot be imported: No module named 'nowhere_at_all'"):
        find_function("bad:model")
    Path("worse.py").write_text("1 / 0\n")
    with pytest.raises(ImportError, match="module 'worse' cannot be imported: ZeroDivisionError"):
        find_function("worse:model")


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("mine:text", "mine:two", "mine:text must return a torch.nn.Module, got str"),
        ("mine:model", "mine:one", r"mine:one must return \(train, val\) .* got a single set"),
        ("mine:model", "mine:none", r"mine:none must return \(train, val\) .* got NoneType"),
        ("mine:broken", "mine:two", "mine:broken fails: KeyError: 'no such thing'"),
        ("mine:model", "mine:broken", "mine:broken fails: KeyError"),
    ],
)
def test_functions_that_give_something_else(model, data, message, capsys):
    assert run("--model", model, "--data", data) == 2
    with pytest.raises(ValueError, match=message):
        raise ValueError(capsys.readouterr().err)


def test_bad_bottlenecks_and_classes_are_refused(capsys):
    arguments = ["run", "--model", "mine:model", "--data", "mine:two", "--out", "out", "--quiet"]
    assert main([*arguments, "--bottleneck", "pool", "--num-bias-classes", "3"]) == 2
    assert "unknown bottleneck 'pool'; the modules of Sequential: fc1, relu, classifier" in capsys.readouterr().err
    assert main([*arguments, "--bottleneck", "relu", "--num-bias-classes", "2"]) == 2
    assert "b holds label 2, but num_bias_classes is 2" in capsys.readouterr().err


def test_augmented_data_are_streamed_and_it_is_said(capsys):
    workload = own_workload("mine:model", "mine:noisy", bottleneck="relu", num_bias_classes=CLASSES)
    assert isinstance(workload.load(None, 0).train.x, Stream)
    assert main(["run", "--model", "mine:model", "--data", "mine:noisy", *SHORT, "--max-epochs", "1"]) == 0
    assert "train: 20 samples that are augmented at random" in capsys.readouterr().err


def test_models_of_the_users_own_class_are_seeded():
    workload = own_workload("mine:untrained", "mine:two", bottleneck="relu", num_bias_classes=CLASSES)
    first, again, other = (workload.build_model(seed) for seed in (1, 1, 2))
    assert isinstance(first, nn.Module)
    assert torch.equal(first.fc1.weight, again.fc1.weight)
    assert not torch.equal(first.fc1.weight, other.fc1.weight)
    assert os.getcwd() in sys.path
