"""``evaluate`` against the definitions, counted sample by sample."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ffw_fast.evaluation import evaluate, evaluate_predictions

labels = st.integers(0, 2)
samples = st.lists(st.tuples(labels, labels, st.tuples(labels, labels)), min_size=1, max_size=40)


def mean(values: list[bool]) -> float:
    return sum(values) / len(values) if values else math.nan


@given(samples)
def test_every_accuracy_is_what_its_definition_counts(rows):
    predictions, y, b = (torch.tensor(column) for column in zip(*rows, strict=True))
    found = evaluate_predictions(predictions, y, b)
    right = [p == t for p, t, _ in rows]
    assert found.average == pytest.approx(mean(right))
    for key, accuracy in found.groups.items():
        members = [ok for ok, (_, t, biases) in zip(right, rows, strict=True) if (t, *biases) == key]
        assert len(members) == found.sizes[key]
        assert accuracy == pytest.approx(mean(members))
    assert sum(found.sizes.values()) == len(rows)
    assert found.worst_group == min(found.groups.values())
    for index in range(2):
        aligned = [ok for ok, (_, t, biases) in zip(right, rows, strict=True) if biases[index] == t]
        conflicting = [ok for ok, (_, t, biases) in zip(right, rows, strict=True) if biases[index] != t]
        assert found.bias_aligned[index] == pytest.approx(mean(aligned), nan_ok=True)
        assert found.bias_conflicting[index] == pytest.approx(mean(conflicting), nan_ok=True)
    for name, accuracy in found.cells.items():
        pattern = [part == "aligned" for part in name.split("/")]
        cell = [
            ok for ok, (_, t, biases) in zip(right, rows, strict=True) if [bias == t for bias in biases] == pattern
        ]
        assert accuracy == pytest.approx(mean(cell))


def test_a_model_is_evaluated_in_eval_mode_and_given_back_as_it_was():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3))
    x, y = torch.randn(10, 4), torch.randint(3, (10,))
    model[1].running_mean += 1
    expected = (model.eval()(x).argmax(1) == y).double().mean().item()
    model.train()
    found = evaluate(model, (x, y, y), batch_size=3)
    assert found.average == pytest.approx(expected)
    assert model.training and model[1].training
    assert found.as_dict()["bias_conflicting"] == [None]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)), "empty"),
        ((torch.zeros(3, 4), torch.tensor([0, 1, 7]), torch.zeros(3, dtype=torch.long)), "up to 7"),
        ((torch.full((1, 4), math.nan), torch.tensor([0]), torch.tensor([0])), "NaN"),
    ],
)
def test_bad_data_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        evaluate(nn.Linear(4, 3), data)


def test_a_batch_size_of_zero_is_refused():
    data = (torch.zeros(1, 4), torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(ValueError, match="batch_size"):
        evaluate(nn.Linear(4, 3), data, batch_size=0)
