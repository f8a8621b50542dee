"""How far the fast loop's extractions may be from the reference's."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ffw_fast import reference
from ffw_fast.extract import extract
from ffw_fast.extraction import Extraction


def by_both(model: torch.nn.Module, train: Any, val: Any, **settings: Any) -> tuple[Extraction, Extraction]:
    """By the fast loop, and by the reference."""
    return extract(model, train, val, **settings), reference.extract(model, train, val, **settings)


def assert_scores_agree(fast: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    """Relative 1e-3, and at least 99.5% of the mask bits."""
    assert fast.keys() == plain.keys()
    ours, theirs = (torch.cat([score.flatten() for score in scores.values()]) for scores in (fast, plain))
    assert theirs.norm() > 0
    assert not (ours - theirs).norm() > 1e-3 * theirs.norm()
    assert ((ours >= 0) == (theirs >= 0)).double().mean() >= 0.995


def assert_held_together(fast: Extraction, plain: Extraction) -> None:
    """The scores, and what the history and the metrics tell."""
    assert_scores_agree(fast.scores, plain.scores)
    assert [row["head_epochs"] for row in fast.history] == [row["head_epochs"] for row in plain.history]
    halves = [[row["half_open"] for row in found.history] for found in (fast, plain)]
    assert halves[0] == pytest.approx(halves[1], rel=1e-2, abs=1e-5)
    assert fast.history[-1]["val_mi"] == pytest.approx(plain.history[-1]["val_mi"], rel=1e-2, abs=1e-4)
    assert fast.metrics["best"]["task_accuracy"] == pytest.approx(plain.metrics["best"]["task_accuracy"], abs=0.02)
