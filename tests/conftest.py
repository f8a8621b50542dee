"""What all tests share."""

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from ffw_fast import heads
from ffw_fast.backend import backend_info, load

pytest.register_assert_rewrite("tests.data.digit_sets", "tests.held_together", "tests.processes", "tests.short_runs")
load()
hypothesis.settings.register_profile(
    "ffw_fast",
    deadline=None,
    max_examples=50,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],  # ours change nothing between examples
)
hypothesis.settings.load_profile("ffw_fast")


@pytest.fixture(scope="session")
def compiled() -> dict:
    """What ``backend_info`` says of the compiled CPU kernels; skips, visibly, where there are none."""
    info = backend_info()["cpu"]
    if not info["loaded"]:
        pytest.skip(f"no compiled CPU kernels: {info['why_not']}")
    return info


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Uninitialised memory is filled with NaN, so that an element which a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """The number of threads is put back."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch runs on one thread: what is this small loses more by waiting for a second one than it gains."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def short_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads are fitted for a few epochs only."""
    monkeypatch.setattr(heads, "MAX_EPOCHS", 6)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The proofs of GPU kernels without a GPU are a ladder of their own: ``make gpu-check`` runs all of it."""
    for item in items:
        if item.path.parent.name in ("cuda", "kernels"):
            item.add_marker("ladder")


def pytest_runtest_logfinish() -> None:
    """A kernel's illegal access ruins the process for all tests after it: a worker then makes room for a fresh one."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
