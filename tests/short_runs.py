"""Extractions of five epochs from the six features, and whether two of them end with the same bits."""

from typing import Any

import torch

from ffw_fast.extract import extract
from ffw_fast.extraction import Extraction
from tests.six_features import arguments, network, samples


def run(**changes: Any) -> Extraction:
    return extract(network(), samples(40), samples(30, seed=1), **arguments(max_epochs=5, **changes))


def assert_same_bits(found: Extraction, expected: Extraction) -> None:
    """Scores, history and metrics, but for the seconds that they took."""
    for name in expected.scores:
        assert torch.equal(found.scores[name], expected.scores[name])
        assert torch.equal(found.best_scores[name], expected.best_scores[name])
    assert without_seconds(found.history) == without_seconds(expected.history)
    assert without_seconds([found.metrics]) == without_seconds([expected.metrics])


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
