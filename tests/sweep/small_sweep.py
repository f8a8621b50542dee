"""What sweeps of a few settings are given and leave, for tests."""

import csv
from pathlib import Path


def settings(digits: Path) -> list[str]:
    data = ["--data-dir", str(digits), "--no-second-division", "--train-size", "60"]
    return [*data, "--vanilla-epochs", "1", "--max-epochs", "2"]


def table(out: Path) -> list[dict[str, str]]:
    with (out / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def hold_the_same_bits(run: Path, other: Path) -> bool:
    """Whether the scores and the pruned network of two runs are the same."""
    names = ("scores.safetensors", "best_scores.safetensors", "model.safetensors")
    return all((run / name).read_bytes() == (other / name).read_bytes() for name in names)
