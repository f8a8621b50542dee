"""``evaluate`` against the definitions, counted sample by sample."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

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
    assert set(found.cells) == {
        "/".join("aligned" if bias == t else "conflicting" for bias in biases) for _, t, biases in rows
    }
    for index in range(2):
        pairs: dict[tuple[int, int], list[bool]] = {}
        for ok, (_, t, biases) in zip(right, rows, strict=True):
            pairs.setdefault((t, biases[index]), []).append(ok)
        assert found.bias_worst_group[index] == pytest.approx(min(map(mean, pairs.values())))
        aligned = [ok for ok, (_, t, biases) in zip(right, rows, strict=True) if biases[index] == t]
        conflicting = [ok for ok, (_, t, biases) in zip(right, rows, strict=True) if biases[index] != t]
        assert found.bias_aligned[index] == pytest.approx(mean(aligned), nan_ok=True)
        assert found.bias_conflicting[index] == pytest.approx(mean(conflicting), nan_ok=True)
    for name, accuracy in found.cells.items():
        pattern = [part == "aligned" for part in name.split("/")]
        cell = [ok for ok, (_, t, biases) in zip(right, rows, strict=True) if [bias == t for bias in biases] == pattern]
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


def test_the_record_is_json_and_holds_groups_where_asked_for():
    y, b = torch.tensor([0, 0, 1]), torch.tensor([[0], [2], [1]])
    found = evaluate_predictions(torch.tensor([0, 1, 1]), y, b)
    assert "groups" not in json.loads(json.dumps(found.as_dict()))
    assert json.loads(json.dumps(found.as_dict(groups=True)))["groups"] == [
        {"target": 0, "bias": [0], "accuracy": 1.0, "size": 1},
        {"target": 0, "bias": [2], "accuracy": 0.0, "size": 1},
        {"target": 1, "bias": [1], "accuracy": 1.0, "size": 1},
    ]


def test_data_comes_in_every_form():
    model, x = nn.Linear(4, 3), torch.randn(10, 4)
    y = torch.arange(10) % 3
    b = torch.stack([y, 4 - y], dim=1)
    b[:2] += 1  # so that there are aligned and conflicting samples of both
    b[9, 1] = 0
    expected = evaluate(model, (x, y, b))
    assert evaluate(model, TensorDataset(x, y, b)) == expected
    assert evaluate(model, DataLoader(TensorDataset(x, y, b), batch_size=4)) == expected


@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weights", [torch.float32, torch.float64])
def test_inputs_are_widened_to_the_weights(given, weights):
    model, x, y = nn.Linear(4, 3).to(weights), torch.randn(10, 4).to(given), torch.arange(10) % 3
    b = y.clone()
    b[:3] += 1
    assert evaluate(model, (x, y, b)) == evaluate(model, (x.to(weights), y, b))


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.Linear(5, 3), ValueError, r"the model fails on samples x of torch.float32 and shape \(1, 4\)"),
        (nn.LSTM(4, 3), TypeError, r"must give logits \(1, classes\) for 1 samples, got tuple"),
        (nn.Unflatten(1, (2, 2)), TypeError, r"got shape \(1, 2, 2\)"),
        (torch.sin, TypeError, "torch.nn.Module"),
    ],
)
def test_models_that_do_not_fit_are_refused(model, error, message):
    with pytest.raises(error, match=message):
        evaluate(model, (torch.zeros(1, 4), torch.tensor([0]), torch.tensor([0])))


def test_nan_logits_are_refused():
    model = nn.Linear(4, 3)
    nn.init.constant_(model.bias, math.nan)
    with pytest.raises(ValueError, match="NaN or inf as logits"):
        evaluate(model, (torch.zeros(1, 4), torch.tensor([0]), torch.tensor([0])))


def test_bias_labels_are_checked_where_their_number_is_given():
    with pytest.raises(ValueError, match="b holds label 7"):
        evaluate(nn.Linear(4, 3), (torch.zeros(1, 4), torch.tensor([0]), torch.tensor([7])), num_bias_classes=5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)), "empty"),
        (
            (torch.zeros(3, 4), torch.tensor([0, 1, 7]), torch.zeros(3, dtype=torch.long)),
            "y holds label 7, but the model has 3 classes",
        ),
        ((torch.full((1, 4), math.nan), torch.tensor([0]), torch.tensor([0])), "NaN"),
    ],
)
def test_bad_data_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        evaluate(nn.Linear(4, 3), data)


@pytest.mark.parametrize("batch_size", [0, 1.5, True])
def test_a_bad_batch_size_is_refused(batch_size):
    data = (torch.zeros(1, 4), torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(ValueError, match="batch_size"):
        evaluate(nn.Linear(4, 3), data, batch_size=batch_size)
