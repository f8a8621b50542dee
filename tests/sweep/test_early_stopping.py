"""Settings of a sweep that a scheduler of Ray Tune ends early, and the rows of epochs that it watches."""

import json
import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from ffw_fast.cli import main
from ffw_fast.progress import EpochLines, Progress
from ffw_fast.sweep.early_stopping import EPOCHS, new_rows, value_of
from tests.sweep.small_sweep import hold_the_same_bits, settings, table

pytestmark = pytest.mark.usefixtures("one_thread")


def test_rows_come_once_and_whole(tmp_path):
    file = tmp_path / "epochs.jsonl"
    rows = new_rows(file)
    assert next(rows) is None, "no file yet"
    file.write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    assert [next(rows) for _ in range(3)] == [{"epoch": 1}, {"epoch": 2}, None]
    with file.open("a") as opened:
        opened.write('ch": 3}\n{"epoch": 2}\n{"epoch": 3}\n{"epoch": 4}\n')
    assert [next(rows) for _ in range(3)] == [{"epoch": 3}, {"epoch": 4}, None]


def test_the_metric_of_several_biases_is_their_mean():
    row = {"val_bias_accuracy": [0.2, 0.4], "val_mi": 1}
    assert value_of(row, "val_bias_accuracy") == pytest.approx(0.3)
    assert value_of(row, "val_mi") == 1.0
    with pytest.raises(KeyError):
        value_of(row, "val_task_accuracy")


def test_epochs_are_appended_and_handed_on(tmp_path):
    class Seen(Progress):
        def __init__(self) -> None:
            self.told = []

        def note(self, text):
            self.told.append(text)

        def tick(self, done, text):
            self.told.append(done)

    seen = Seen()
    row = {"epoch": 1, "temperature": 1.0, "loss": 2.0, "train_mi": 0.5}
    with EpochLines(seen, tmp_path / "folder" / "epochs.jsonl") as progress:
        progress.note("a note")
        progress.epoch(row)
        progress.epoch({**row, "epoch": 2})
    assert seen.told == ["a note", 1, 2]
    lines = (tmp_path / "folder" / "epochs.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file on a full disk is Linux's /dev/full")
def test_a_log_on_a_full_disk_does_not_end_the_run():
    with EpochLines(Progress(), "/dev/full") as progress, pytest.warns(UserWarning, match="could not be appended to"):
        progress.epoch({"epoch": 1, "temperature": 1.0, "loss": 2.0, "train_mi": 0.5})


def test_a_run_logs_its_epochs(digits, tmp_path):
    file = tmp_path / "epochs.jsonl"
    command = ["run", "multi-color-mnist", *settings(digits), "--out", str(tmp_path / "run"), "--quiet"]
    assert main([*command, "--log-epochs", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert all(0 <= value_of(row, "val_task_accuracy") <= 1 for row in rows)


def test_an_unknown_metric_is_refused_with_the_known_ones(tmp_path, capsys):
    command = ["sweep", "multi-color-mnist", "--out", str(tmp_path), "--scheduler", "async_hyperband"]
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--metric", "accuracy"])
    assert "invalid choice: 'accuracy' (choose from 'val_task_accuracy'" in capsys.readouterr().err


def test_no_epoch_for_every_setting_is_refused(tmp_path, capsys):
    assert (
        main(["sweep", "multi-color-mnist", "--out", str(tmp_path), "--scheduler", "async_hyperband", "--grace", "0"])
        == 2
    )
    assert "grace must be at least 1, got 0" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/config.json")), "before any work"


def kill_a_trial(out: Path, killed: list[int]) -> None:
    """Kill the first Ray worker that watches a setting, once an epoch of some has ended."""
    deadline = time.monotonic() + 300
    while not killed and time.monotonic() < deadline:
        time.sleep(0.01)
        if not list(out.glob(f"*/{EPOCHS}")):
            continue
        for status in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if not killed and status.read_bytes().startswith(b"ray::Extraction"):
                    os.kill(int(status.parent.name), signal.SIGKILL)
                    killed.append(int(status.parent.name))


@pytest.mark.slow
def test_a_scheduler_stops_some_settings_and_the_sweep_can_be_finished(digits, tmp_path, in_this_process):
    pytest.importorskip(
        "ray.tune", exc_type=ImportError, reason="ending settings early needs Ray Tune: pip install 'ffw_fast[ray]'"
    )
    command = ["sweep", "multi-color-mnist", *settings(digits)[:-1], "8", "--gamma", "1,3,10", "--seed", "0..1"]
    out, calm = tmp_path / "watched", tmp_path / "calm"
    watch = ["--scheduler", "async_hyperband", "--grace", "1", "--metric", "loss"]
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_trial, args=(out, killed))
    killer.start()
    assert main([*command, "--quiet", "--out", str(out), *watch]) == 0
    killer.join()
    assert killed
    rows = table(out)
    assert {row["status"].split(" after")[0] for row in rows} == {"finished", "stopped early"}
    for row in rows:
        ended = [json.loads(line)["epoch"] for line in (out / row["trial"] / EPOCHS).read_text().splitlines()]
        assert sorted(set(ended)) == list(range(1, max(ended) + 1))
        if row["status"] == "finished":
            assert max(ended) == 8
        else:
            assert row["best_task_accuracy"] == ""
            assert 1 <= int(row["status"].split()[-2]) < 8
            assert (out / row["trial"] / "checkpoint.safetensors").exists()
    assert main([*command, "--quiet", "--out", str(out)]) == 0
    assert main([*command, "--quiet", "--out", str(calm)]) == 0
    assert [row["status"] for row in table(out)] == ["finished"] * 6
    for trial in (row["trial"] for row in table(calm)):
        assert hold_the_same_bits(out / trial, calm / trial)
