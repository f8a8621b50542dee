"""Data and processes of sweeps that are over in a moment."""

from pathlib import Path

import pytest

from ffw_fast.sweep.engines import Job, LocalProcesses, describe_failure, run_job
from tests.data.mnist_folder import write_mnist


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """Full MNIST's files with few digits in them, which load faster than real ones."""
    folder = tmp_path_factory.mktemp("digits")
    write_mnist(folder, train=60, test=60)
    return folder


@pytest.fixture
def in_this_process(monkeypatch) -> list[Job]:
    """Jobs run here, one after the other; those that ran."""
    ran: list[Job] = []

    def run(_self, jobs):
        for job in jobs:
            ran.append(job)
            code = run_job(job)
            yield job, describe_failure(code, job.folder)

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(LocalProcesses, "run", run)
    return ran
