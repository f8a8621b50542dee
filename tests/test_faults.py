"""What the machine does to a run: full disks, folders that change or go, workers that die."""

import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ffw_fast import run_state
from ffw_fast.files import write_tensors
from ffw_fast.progress import Progress
from ffw_fast.run_state import CHECKPOINT
from tests.short_runs import assert_same_bits, run

resource = pytest.importorskip("resource", reason="limits of a process, on POSIX systems")


@pytest.fixture(autouse=True)
def checkpoint_after_every_epoch(short_fits, monkeypatch):
    monkeypatch.setattr(run_state, "LONGEST", 0.0)


class AfterEpoch(Progress):
    """Does something to the machine after an epoch of the extraction."""

    def __init__(self, epoch: int, act) -> None:
        self._epoch, self._act = epoch, act

    def epoch(self, row) -> None:
        if row["epoch"] == self._epoch:
            self._act()


@contextmanager
def largest_file(size: int):
    """Within it no file can grow beyond the size, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_does_not_end_a_run(tmp_path):
    expected = run()
    limit = largest_file(300)
    try:
        with pytest.warns(UserWarning, match="no checkpoint could be written, the run goes on without: .*checkpoint"):
            found = run(run_dir=tmp_path, progress=AfterEpoch(2, limit.__enter__))
    finally:
        limit.__exit__(None, None, None)
    assert_same_bits(found, expected)
    assert {path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"} == set()
    assert_same_bits(run(run_dir=tmp_path, resume=True), expected)  # from the checkpoint after the second epoch


def test_a_result_that_does_not_fit_on_the_disk_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "scores.safetensors"
    write_tensors(path, {"old": torch.ones(3)})
    before = path.read_bytes()
    with largest_file(300), pytest.raises(OSError, match=r"scores\.safetensors"):
        write_tensors(path, {"new": torch.ones(1000)})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_folder_that_goes_does_not_end_a_run(tmp_path):
    folder = tmp_path / "run"
    expected = run()
    with pytest.warns(UserWarning, match="no checkpoint could be written"):
        found = run(run_dir=folder, progress=AfterEpoch(2, lambda: shutil.rmtree(folder)))
    assert_same_bits(found, expected)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_folder_that_becomes_read_only_does_not_end_a_run(tmp_path):
    expected = run()
    try:
        with pytest.warns(UserWarning, match="no checkpoint could be written"):
            found = run(run_dir=tmp_path, progress=AfterEpoch(2, lambda: tmp_path.chmod(0o500)))
        with pytest.raises(OSError, match=str(tmp_path)):
            run(run_dir=tmp_path)
    finally:
        tmp_path.chmod(0o700)
    assert_same_bits(found, expected)
    assert (tmp_path / CHECKPOINT).exists()


DEADLY = """
import os, signal, sys
from torch.utils.data import DataLoader, Dataset
from ffw_fast.extract import extract
from tests.six_features import arguments, network, samples

class Deadly(Dataset):
    def __init__(self):
        self.parts, self.parent = samples(40), os.getpid()

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index == 30 and os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return tuple(part[index] for part in self.parts)

loader = DataLoader(Deadly(), batch_size=10, num_workers=1)
extract(network(), loader, samples(30, seed=1), **arguments(run_dir=sys.argv[1]))
"""


def test_a_worker_that_dies_is_an_error_before_any_training(tmp_path):
    """In a process of its own: PyTorch raises the error wherever the process happens to be, and not always the same."""
    done = subprocess.run(
        [sys.executable, "-c", DEADLY, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
        timeout=300,
    )
    assert done.returncode == 1
    assert re.search(r"DataLoader worker .* (killed|exited)|Connection(Reset|Refused)Error|EOFError", done.stderr)
    assert not (tmp_path / CHECKPOINT).exists()
