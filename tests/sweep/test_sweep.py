"""Many extractions: every setting a run folder, biased networks shared, and nothing finished lost."""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

import ffw_fast.sweep.engines as engines
from ffw_fast.cli import build_parser, main
from ffw_fast.cli.sweep import NO_SETTING
from ffw_fast.run_lock import locked
from ffw_fast.sweep.engines import Job, LocalProcesses, run_job
from ffw_fast.sweep.grid import combinations
from ffw_fast.sweep.trials import trial_name
from tests.sweep.small_sweep import hold_the_same_bits, settings, table

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_sweep_is_the_same_runs_one_by_one(digits, tmp_path, in_this_process, capsys):
    out = tmp_path / "sweep"
    command = ["sweep", "multi-color-mnist", "--out", str(out), *settings(digits), "--gamma", "1,3", "--seed", "0..1"]
    assert main(command) == 0
    rows = table(out)
    names = ["gamma-1_seed-0", "gamma-1_seed-1", "gamma-3_seed-0", "gamma-3_seed-1"]
    assert [row["trial"] for row in rows] == names
    assert [(row["gamma"], row["seed"]) for row in rows] == [("1.0", "0"), ("1.0", "1"), ("3.0", "0"), ("3.0", "1")]
    assert {row["status"] for row in rows} == {"finished"}
    assert all(0 <= float(row["best_task_accuracy"]) <= 1 for row in rows)
    assert all(0 <= float(row["best_bias_accuracy_2"]) <= 1 for row in rows)

    vanilla = [job for job in in_this_process if "--vanilla-only" in job.arguments]
    assert len(vanilla) == 2, "one biased network a seed"
    assert all("vanilla training" not in (out / name / "log.txt").read_text() for name in names)

    alone = tmp_path / "alone"
    assert main(["run", "multi-color-mnist", "--out", str(alone), *settings(digits), "--gamma", "3", "--quiet"]) == 0
    assert hold_the_same_bits(alone, out / names[2])
    capsys.readouterr()

    config = json.loads((out / names[0] / "config.json").read_text())
    del config["settings"]["cache_augmented"]  # as of a version that did not know it
    (out / names[0] / "config.json").write_text(json.dumps(config))
    in_this_process.clear()
    assert main([*command, "--quiet"]) == 0
    assert in_this_process == [], "nothing finished is run again"
    assert "gamma" in capsys.readouterr().out
    assert table(out) == rows

    (out / names[1] / "metrics.json").unlink()  # as if it had been killed before its end
    assert main([*command, "--quiet"]) == 0
    assert [job.folder.name for job in in_this_process if "--vanilla-only" not in job.arguments] == [names[1]]

    assert main([*command, "--alpha", "2"]) == 2
    assert "alpha was 1.0 and is now 2.0" in capsys.readouterr().err


def test_a_setting_that_fails_leaves_the_others(digits, tmp_path, in_this_process, capsys):
    out = tmp_path / "sweep"
    command = ["sweep", "multi-color-mnist", "--out", str(out), *settings(digits), "--unbiased-size", "0,10"]
    assert main(command) == 2
    bad, good = table(out)
    assert good["status"] == "finished"
    assert "unbiased_size" in bad["status"]
    assert "unbiased_size-0: unbiased_size" in capsys.readouterr().err
    assert len(list((out / "vanilla").iterdir())) == 1  # the biased network does not depend on it


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gamma", "1,-1"], "gamma must be"),
        (["--schedule", "adaptive", "--gate", "ffw,hard"], "hard"),
        (["--processes", "0"], "processes must be at least 1"),
        (["--retries", "-1"], "retries must be at least 0"),
        (["--ray", "--processes", "2"], "leave out --processes"),
    ],
)
def test_bad_settings_end_the_sweep_before_any_work(tmp_path, in_this_process, capsys, arguments, message):
    out = tmp_path / "sweep"
    assert main(["sweep", "multi-color-mnist", "--out", str(out), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert in_this_process == []


def test_a_sweep_over_a_rate_that_its_schedule_does_not_have(tmp_path, digits, in_this_process, capsys):
    """It has its page, without a figure of what changed nothing; its runs warn, and so does the sweep."""
    rates = ["--schedule", "published", "--anneal-rate", "1e-4,2e-4"]
    assert main(["sweep", "multi-color-mnist", "--out", str(tmp_path), *settings(digits), *rates, "--quiet"]) == 0
    warning = capsys.readouterr().err
    assert "warning: anneal_rate-0.0001: the biased network's accuracy on unbiased samples is at chance" in warning
    assert "(2 of 2 runs warn of something)" in warning
    first, second = (int(row["warnings"]) for row in table(tmp_path))
    assert second == first + 1, "of the rate"
    page = (tmp_path / "report.html").read_text()
    assert "2 of 2 runs warn: anneal_rate-0.0001, anneal_rate-0.0002." in page
    assert "anneal_rate=0.0002 changes nothing" in (tmp_path / "anneal_rate-0.0002" / "metrics.json").read_text()


@pytest.mark.parametrize("name", ["sweep.csv", "report.html"])
def test_files_of_something_else_end_the_sweep_before_any_work(tmp_path, in_this_process, capsys, name):
    (tmp_path / name).write_text("mine")
    assert main(["sweep", "multi-color-mnist", "--out", str(tmp_path), "--gamma", "1,3"]) == 2
    assert str(tmp_path / name) in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine"
    assert in_this_process == []


def test_patterns_and_folders_take_one_value_however_many_commas_are_in_it():
    arguments = ["sweep", "celeba", "--data-dir", "a,b", "--cache-dir", "c,d", "--where", "layer1.*, layer2.*"]
    options = build_parser().parse_args([*arguments, "--gamma", "1,3"])
    (_, command), (varied, _) = combinations(options.parser, options, NO_SETTING)
    assert varied == {"gamma": 3.0}
    assert command[command.index("--where") + 1] == "layer1.*, layer2.*"


def test_an_unknown_option_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["sweep", "multi-color-mnist", "--gama", "1,3"])
    assert "--gama" in capsys.readouterr().err


def test_names_of_folders_are_fit_for_a_shell():
    assert trial_name({"anneal_rate": 1e-4, "gate": "ffw", "x": "a b/c"}) == "anneal_rate-0.0001_gate-ffw_x-a-b-c"
    assert trial_name({}) == "run"


# The engine of local processes, on a shell script in the place of Python --------------------------------------------


@pytest.fixture
def script(tmp_path, monkeypatch):
    """A function that lets jobs run this shell script; its arguments are those of the job."""

    def use(text: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\nshift 2\n{text}\n")
        path.chmod(0o755)
        monkeypatch.setattr(engines.sys, "executable", str(path))

    return use


def jobs_in(folder: Path, count: int) -> list[Job]:
    return [Job((str(index),), folder / str(index)) for index in range(count)]


def engine(processes: int = 2, retries: int = 2) -> LocalProcesses:
    return LocalProcesses(processes, threads=3, retries=retries)


def test_jobs_run_beside_each_other_with_their_threads_and_logs(tmp_path, script):
    script('echo "job $1 has $OMP_NUM_THREADS threads"')
    outcomes = list(engine().run(jobs_in(tmp_path, 5)))
    assert sorted(job.folder.name for job, _ in outcomes) == list("01234")
    assert all(failure == "" for _, failure in outcomes)
    assert (tmp_path / "4" / "log.txt").read_text() == "job 4 has 3 threads\n"


def test_what_was_killed_is_run_again_and_bad_input_is_not(tmp_path, script):
    script(f"cd {tmp_path}/$1; echo x >> tries; [ $(wc -l < tries) -gt $1 ] || kill -9 $$")
    outcomes = {job.folder.name: failure for job, failure in engine(retries=2).run(jobs_in(tmp_path, 4))}
    assert outcomes == {"0": "", "1": "", "2": "", "3": "killed by signal 9"}
    script('echo "ffw-fast: error: no such thing"; echo "and a warning"; echo x >> "$0.tries"; exit 2')
    ((_, failure),) = engine().run(jobs_in(tmp_path, 1))
    assert failure == "no such thing"
    assert (tmp_path / "python.tries").read_text() == "x\n"


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Within it another run uses the folder, as one does that outlives its sweep."""
    folder.mkdir()
    with ThreadPoolExecutor(1) as other, ExitStack() as lock:
        other.submit(lock.enter_context, locked(folder)).result()
        yield
        other.submit(lock.close).result()


def test_a_job_waits_for_whoever_uses_its_folder(tmp_path, script):
    script("exit 0")
    running = engine(processes=1).run(jobs_in(tmp_path, 2))
    with in_use(tmp_path / "0"):
        assert next(running)[0].folder.name == "1"
    assert [job.folder.name for job, _ in running] == ["0"]


def test_a_job_on_ray_waits_as_well(tmp_path, monkeypatch, restore_threads):
    waited: list[float] = []
    monkeypatch.setattr(engines, "is_free", lambda folder: folder == tmp_path and bool(waited))
    monkeypatch.setattr(engines.time, "sleep", waited.append)
    assert run_job(Job(("--version",), tmp_path)) == 0
    assert len(waited) == 1


def test_leaving_ends_the_jobs_under_way(tmp_path, script):
    process = tmp_path / "process"
    script(f"while [ ! -s {process} ]; do [ $1 = 0 ] || {{ echo $$ > {process}; exec sleep 1000; }}; done")
    running = engine().run(jobs_in(tmp_path, 2))
    next(running)
    running.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(process.read_text()), 0)


@pytest.mark.slow
def test_a_killed_process_loses_nothing(digits, tmp_path):
    out = tmp_path / "sweep"
    command = ["sweep", "multi-color-mnist", *settings(digits)[:-1], "12", "--gamma", "1,3", "--quiet"]
    killed: list[int] = []

    def kill_one() -> None:
        deadline = time.monotonic() + 300
        while not killed and time.monotonic() < deadline:
            for status in Path("/proc").glob("[0-9]*/cmdline"):
                with_checkpoint = (out / "gamma-3" / "checkpoint.safetensors").exists()
                try:
                    mine = str(out / "gamma-3") in status.read_text()
                except OSError:
                    continue
                if mine and with_checkpoint:
                    os.kill(int(status.parent.name), signal.SIGKILL)
                    killed.append(int(status.parent.name))
                    return
            time.sleep(0.01)

    killer = threading.Thread(target=kill_one)
    killer.start()
    assert main([*command, "--out", str(out)]) == 0
    killer.join()
    assert killed
    calm = tmp_path / "calm"
    assert main([*command, "--out", str(calm)]) == 0
    for trial in ("gamma-1", "gamma-3"):
        assert hold_the_same_bits(out / trial, calm / trial)


# The engine on Ray ---


def _kill_a_worker(out: Path, killed: list[int]) -> None:
    """Kill the first Ray worker that has a checkpoint of a setting but no results of it yet."""
    deadline = time.monotonic() + 300
    while not killed and time.monotonic() < deadline:
        for checkpoint in out.glob("gamma-*/checkpoint.safetensors"):
            with suppress(OSError):  # it has just ended
                killed += _killed(checkpoint.parent)
        time.sleep(0.01)


def _killed(folder: Path) -> list[int]:
    """The Ray worker that holds the folder, if one does and it is not done."""
    holder = re.match(r"process (\d+) on", (folder / ".lock").read_text())
    if (folder / "metrics.json").exists() or holder is None:
        return []
    if b"ray::" not in Path(f"/proc/{holder[1]}/cmdline").read_bytes():
        return []
    os.kill(int(holder[1]), signal.SIGKILL)
    return [int(holder[1])]


@pytest.mark.slow
def test_twelve_settings_on_ray_with_a_worker_killed_are_those_of_one_process(digits, tmp_path, in_this_process):
    pytest.importorskip("ray", reason="a sweep on Ray needs Ray: pip install 'ffw_fast[ray]'")
    command = ["sweep", "multi-color-mnist", *settings(digits)[:-1], "60", "--gamma", "1,3,10", "--seed", "0..3"]
    out, calm = tmp_path / "ray", tmp_path / "calm"
    killed: list[int] = []
    killer = threading.Thread(target=_kill_a_worker, args=(out, killed))
    killer.start()
    assert main([*command, "--quiet", "--out", str(out), "--ray"]) == 0
    killer.join()
    assert killed
    assert main([*command, "--quiet", "--out", str(calm)]) == 0
    assert len(table(out)) == 12
    for trial in (row["trial"] for row in table(calm)):
        assert hold_the_same_bits(out / trial, calm / trial)


def test_a_ray_that_does_not_answer_is_named(digits, tmp_path, capsys):
    pytest.importorskip("ray", reason="a sweep on Ray needs Ray: pip install 'ffw_fast[ray]'")
    command = ["sweep", "multi-color-mnist", *settings(digits), "--out", str(tmp_path), "--address", "127.0.0.1:1"]
    assert main(command) == 2
    assert "no Ray cluster answers at '127.0.0.1:1'" in capsys.readouterr().err
