"""The same seed gives the same bits in another process, and nearly the same numbers on other threads and backends.

Four short extractions (published and adaptive schedule; sure and random gates) of a perceptron on images with two
biases, in processes of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ffw_fast import extract, heads
from ffw_fast.models import MLP

CLASSES = 10
SETTINGS = {
    "published": {"schedule": "published"},
    "adaptive": {"schedule": "adaptive"},
    "published, bernoulli": {"schedule": "published", "gate": "bernoulli"},
    "adaptive, concrete": {"schedule": "adaptive", "gate": "concrete"},
}
# Of float32 rounding over three epochs of two steps. A step of Adam moves a score by 1e-3; ln T falls by 0.02.
SCORES = 1e-5
HISTORY = 1e-5  # relative, and absolute below 1


def samples(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise (count, 3, 28, 28) with the target and two biases in a channel each."""
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 28, 28, generator=source)
    labels = torch.randint(CLASSES, (count, 3), generator=source)
    x[:, :, :CLASSES, :CLASSES] += nn.functional.one_hot(labels, CLASSES).float()[..., None]
    return x, labels[:, 0], labels[:, 1:]


def extract_all(file: str) -> None:
    heads.MAX_EPOCHS = 3
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = MLP().eval()
    torch.set_rng_state(state)
    found = {}
    for name, settings in SETTINGS.items():
        result = extract(
            model, samples(200, 1), samples(100, 2),
            bottleneck="relu3", num_bias_classes=CLASSES, gamma=1.0, max_epochs=3, progress=False, **settings,
        )  # fmt: skip
        found |= {f"{name}/{layer}": scores for layer, scores in result.scores.items()}
        entries = [entry for row in result.history for key, entry in row.items() if key != "seconds"]
        found[f"{name}/history"] = torch.cat([torch.tensor(entry).double().flatten() for entry in entries])
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    save_file(found, file)


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """Runs them in a process with so many threads and that backend; scores and histories by setting."""
    folder = tmp_path_factory.mktemp("found")

    def run(threads: int, backend: str, again: int = 0) -> dict[str, Tensor]:
        file = folder / f"{threads}-{backend}-{again}"
        if not file.exists():
            environment = os.environ | {"OMP_NUM_THREADS": str(threads), "FFW_FAST_BACKEND": backend}
            command = [sys.executable, "-W", "ignore", "-m", "tests.test_determinism", str(file)]
            subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], check=True)
        return load_file(file)

    return run


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        bound = {"rtol": HISTORY, "atol": HISTORY} if name.endswith("history") else {"rtol": 0, "atol": SCORES}
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}", **bound)


def test_another_process_finds_the_same_bits(compiled, extracted):
    once, again = extracted(1, "cpp"), extracted(1, "cpp", again=1)
    assert all(torch.equal(again[name], value) for name, value in once.items())
    assert any((value < 0).any() for name, value in once.items() if "history" not in name)


def test_two_threads_find_the_same_within_rounding(compiled, extracted):
    assert_close(extracted(2, "cpp"), extracted(1, "cpp"))


def test_the_plain_kernels_find_the_same_within_rounding(compiled, extracted):
    assert_close(extracted(1, "torch"), extracted(1, "cpp"))


if __name__ == "__main__":
    extract_all(sys.argv[1])
