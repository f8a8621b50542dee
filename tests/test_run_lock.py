"""One run at a time in a folder, whatever becomes of the one before."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ffw_fast.extract import extract
from ffw_fast.run_lock import LOCK, locked
from ffw_fast.run_state import CHECKPOINT, RunState
from tests.six_features import arguments, network, samples

HOLD = """
import os, sys, time
from pathlib import Path
from ffw_fast.run_lock import locked
with locked(Path(sys.argv[1])):
    if sys.argv[2:] and os.fork() == 0:  # such as a DataLoader's worker, which may outlive its parent
        time.sleep(600)
    print("held", flush=True)
    time.sleep(600)
"""


def holder(folder, *options):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *options], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def other_process(tmp_path):
    process = holder(tmp_path)
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_refused_and_told_which_is_the_first(tmp_path, other_process):
    message = f"{tmp_path} is in use by process {other_process.pid} on "
    with pytest.raises(BlockingIOError, match=message), locked(tmp_path):
        pass


def test_a_run_is_refused_before_anything_in_the_folder_changes(tmp_path, other_process):
    with pytest.raises(BlockingIOError, match="in use by process"):
        extract(network(), samples(), samples(seed=1), **arguments(run_dir=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_dead_process_holds_no_lock(tmp_path, other_process):
    other_process.send_signal(signal.SIGKILL)
    other_process.wait()
    with locked(tmp_path):
        pass


def test_an_orphaned_child_of_a_dead_process_holds_no_lock(tmp_path):
    process = holder(tmp_path, "fork")
    try:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with locked(tmp_path):
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()


def test_the_same_thread_may_ask_again_and_another_may_not(tmp_path):
    refused = []

    def ask():
        try:
            with locked(tmp_path):
                pass
        except BlockingIOError as error:
            refused.append(str(error))

    with locked(tmp_path):
        with locked(tmp_path / "." / ".." / tmp_path.name):
            pass
        other = threading.Thread(target=ask)
        other.start()
        other.join()
        process = subprocess.run(
            [sys.executable, "-c", HOLD, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120
        )
        assert "BlockingIOError" in process.stderr, "the inner lock does not give the outer one back"
    assert refused == [f"the run folder {tmp_path} is in use by another thread of this process"]
    ask()
    assert len(refused) == 1


def test_of_threads_that_ask_at_the_same_time_one_gets_it(tmp_path, monkeypatch):
    started, opened, holding = threading.Barrier(2), os.open, []

    def open_slowly(*arguments):  # lets the other thread come as far
        time.sleep(0.1)
        return opened(*arguments)

    def ask():
        started.wait()
        try:
            with locked(tmp_path):
                holding.append(threading.get_ident())
                time.sleep(0.3)
        except BlockingIOError:
            pass

    monkeypatch.setattr(os, "open", open_slowly)
    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(holding) == 1


def test_an_error_gives_the_lock_back(tmp_path):
    with pytest.raises(ZeroDivisionError), RunState(tmp_path, {}, resume=False):
        raise ZeroDivisionError
    deadline = time.monotonic() + 5
    with locked(tmp_path):
        assert time.monotonic() < deadline
    assert not (tmp_path / CHECKPOINT).exists()
