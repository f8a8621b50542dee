"""Bad input to ``extract`` and to the reference: a clear error, before any training."""

import copy
import random
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ffw_fast import heads, reference
from ffw_fast.extract import extract
from ffw_fast.masking import mask_model
from tests.six_features import CLASSES, arguments, network, samples

EXTRACTIONS = [extract, reference.extract]


class TrainingStartedError(Exception):
    """Not one of the errors that bad input may give."""


@pytest.fixture
def no_training(monkeypatch):
    """Heads are the first that is trained, by either loop."""

    def refuse(*_arguments, **_keywords):
        raise TrainingStartedError

    monkeypatch.setattr(heads.PrivateHeads, "fit", refuse)
    monkeypatch.setattr(reference.Reference, "fit_heads", refuse)


@pytest.fixture(params=EXTRACTIONS, ids=["extract", "reference"])
def run(request, no_training):
    """Runs an extraction with some arguments changed, and checks that the model is left alone."""

    def run(model=None, train=None, val=None, **changes):
        model = model or network()
        seen = []
        counter = next(iter(model.children())).register_forward_hook(lambda *_arguments: seen.append(1))
        before = copy.deepcopy(model.state_dict())
        modes = [part.training for part in model.modules()]
        try:
            request.param(model, train or samples(), val or samples(seed=1), **arguments(**changes))
        finally:
            counter.remove()
            assert len(seen) <= 8  # checks and the tracing of the graph, on a few samples each
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
            assert [part.training for part in model.modules()] == modes

    return run


def test_good_input_would_have_been_trained(run):
    """Otherwise the tests below would show nothing."""
    with pytest.raises(TrainingStartedError):
        run()


X, Y, B = samples()


def changed(tensor, value):
    tensor = tensor.clone()
    tensor[-1] = value
    return tensor


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bottleneck": "fc9"}, "unknown bottleneck 'fc9'; the modules of Sequential: fc1, relu, classifier"),
        ({"bottleneck": None}, "bottleneck must be the name of a module, got NoneType"),
        ({"gate": "soft"}, "unknown gate 'soft'; known gates: ffw, hard, bernoulli, concrete"),
        ({"granularity": "row"}, "unknown granularity 'row'; known granularities: weight, channel"),
        ({"method": "other"}, "unknown method 'other'; known methods: ffw, bise"),
        ({"schedule": "other"}, "unknown schedule 'other'; known schedules: published, adaptive, halving"),
        ({"precision": "fp8"}, "unknown precision 'fp8'; known precisions: fp32, bf16"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"max_epochs": 0}, "max_epochs must be a whole number of at least 1, got 0"),
        ({"num_bias_classes": 1}, "num_bias_classes must be a whole number of at least 2, got 1"),
        ({"num_bias_classes": 2}, "b holds label 2, but num_bias_classes is 2"),
        ({"gamma": -1.0}, "gamma must be a non-negative finite number, got -1.0"),
        ({"gamma": float("nan")}, "gamma must be a non-negative finite number, got nan"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"train": (X[:3], Y, B)}, "train: x, y and b differ in length: 3, 24 and 24"),
        ({"val": (X, Y[:3], B)}, "val: x, y and b differ in length: 24, 3 and 24"),
        ({"train": (X, Y, B[..., None])}, r"train: b must have shape \(n,\) or .* got \(24, 1, 1\)"),
        ({"train": (X[:0], Y[:0], B[:0])}, "train is empty"),
        ({"val": (X[:0], Y[:0], B[:0])}, "val is empty"),
        ({"train": (changed(X, float("nan")), Y, B)}, "train: x holds NaN or inf, first in sample 23"),
        ({"val": (changed(X, float("inf")), Y, B)}, "val: x holds NaN or inf, first in sample 23"),
        ({"train": (X, changed(Y, CLASSES), B)}, "y holds label 3, but the model has 3 classes"),
        ({"val": (X, changed(Y, CLASSES), B)}, "y holds label 3, but the model has 3 classes"),
        ({"train": (X, changed(Y, -1), B)}, "train: y holds negative labels, the lowest is -1"),
        ({"train": (X, Y, changed(B, CLASSES))}, "train: b holds label 3, but num_bias_classes is 3"),
        ({"val": (X, Y, changed(B, -2))}, "val: b holds negative labels, the lowest is -2"),
        ({"train": (X, Y.float(), B)}, "train: y must hold integers, got torch.float32"),
        ({"train": (X, Y, B.float())}, "train: b must hold integers, got torch.float32"),
        ({"train": (X.int(), Y, B)}, "train: x must be floating point, got torch.int32"),
        ({"train": (X.double(), Y, B)}, "train: x is torch.float64 and the model's weights are torch.float32"),
        ({"val": samples(biases=2)}, "train has 1 biases and val has 2"),
        ({"val": (X[:, :5], Y, B)}, r"samples of train and val differ in shape: \(6,\) and \(5,\)"),
        ({"train": (X[:, :5], Y, B), "val": (X[:, :5], Y, B)}, r"the model fails on samples x of shape \(2, 5\)"),
        ({"train": "a folder"}, "train must be tensors .* got str"),
        ({"model": nn.Sequential(nn.ReLU())}, "nothing to mask: Sequential has no Conv or Linear layer"),
        ({"model": mask_model(network())}, "layers 'fc1', 'classifier' are masked already"),
        ({"model": network().half()}, "layer 'fc1' is torch.float16, but scores are learned in float32 or float64"),
        ({"device": "tpu9"}, "cannot run on device 'tpu9'"),
        ({"device": "hpu"}, "cannot run on device 'hpu'"),
        ({"device": "privateuseone"}, "cannot run on device 'privateuseone'"),
        ({"device": "meta"}, "cannot run on device 'meta'"),
        ({"resume": True}, "resume"),
    ],
)
def test_bad_input(run, changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        run(**changes)


def test_dropout_in_training_mode_is_pointed_out(run):
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.Linear(8, CLASSES)).train()
    with pytest.warns(UserWarning, match="runs a copy in eval mode"), pytest.raises(TrainingStartedError):
        run(model, bottleneck="1")


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_that_cannot_be_written(no_training, tmp_path, name):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="file"):
        extract(network(), samples(), samples(), **arguments(run_dir=tmp_path / name))


# what is good input after all ----------------------------------------------------------------------------------------


@pytest.fixture
def few_head_epochs(monkeypatch):
    monkeypatch.setattr(heads, "MAX_EPOCHS", 5)


def assert_equal(given, expected):
    for name, scores in expected.scores.items():
        assert torch.equal(given.scores[name], scores)
    assert given.metrics["best"] == expected.metrics["best"]


@pytest.mark.parametrize("function", EXTRACTIONS)
def test_datasets_loaders_and_tensors_give_the_same(few_head_epochs, function):
    train, val = samples(30, 2), samples(20, 2, 1)
    expected = function(network(), train, val, **arguments())
    dataset = TensorDataset(train[0], train[1], train[2])
    pairs = [(x, (int(y), int(b[0]), int(b[1]))) for x, y, b in dataset]
    for given in (dataset, DataLoader(dataset, batch_size=7), pairs, DataLoader(pairs, batch_size=8)):
        assert_equal(function(network(), given, val, **arguments()), expected)


@pytest.mark.parametrize("function", EXTRACTIONS)
def test_one_seed_one_result_whatever_the_global_generators_say(few_head_epochs, function):
    """Also of a shuffled loader, which draws its order from the global generator."""
    loader = DataLoader(TensorDataset(*samples(30)), batch_size=7, shuffle=True)
    results = []
    for number in range(2):
        torch.manual_seed(number)
        random.seed(number)
        states = torch.get_rng_state(), random.getstate()
        results.append(function(network(), loader, samples(20, seed=1), **arguments(seed=5, gate="bernoulli")))
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
    assert_equal(*results)
    other = function(network(), loader, samples(20, seed=1), **arguments(seed=6, gate="bernoulli"))
    assert any(not torch.equal(other.scores[name], results[0].scores[name]) for name in other.scores)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("default", [lambda: torch.device("meta"), lambda: default_dtype(torch.float64)])
@pytest.mark.parametrize(
    "changes", [{"gate": "bernoulli"}, {"schedule": "adaptive"}, {"method": "bise", "max_epochs": 11}]
)
@pytest.mark.parametrize("function", EXTRACTIONS)
def test_the_default_device_and_dtype_of_pytorch_change_nothing(few_head_epochs, function, changes, default):
    model, val = network(), samples(20, seed=1)
    loader = DataLoader(TensorDataset(*samples(30)), batch_size=7, shuffle=True)
    expected = function(model, loader, val, **arguments(**changes))
    with default():
        given = function(model, loader, val, **arguments(**changes))
    assert_equal(given, expected)
    assert [row["loss"] for row in given.history] == [row["loss"] for row in expected.history]


@pytest.mark.parametrize("function", EXTRACTIONS)
def test_the_smallest_sets(few_head_epochs, function):
    found = function(network(), samples(1), samples(1, seed=1), **arguments(max_epochs=1))
    assert all(scores.isfinite().all() for scores in found.scores.values())


@pytest.mark.parametrize("function", EXTRACTIONS)
def test_a_model_in_training_mode_is_run_in_eval_mode(few_head_epochs, function):
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, CLASSES)).eval()
    with torch.no_grad():
        model[1].running_mean.fill_(0.3)
    before = copy.deepcopy(model.state_dict())
    expected = function(model, samples(), samples(seed=1), **arguments(bottleneck="2"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = function(model.train(), samples(), samples(seed=1), **arguments(bottleneck="2"))
    assert_equal(given, expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(part.training for part in model.modules())


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.uint16, torch.uint32])
def test_labels_of_every_integer_format(few_head_epochs, dtype):
    x, y, b = samples()
    expected = extract(network(), (x, y, b), samples(seed=1), **arguments())
    assert_equal(extract(network(), (x, y.to(dtype), b.to(dtype)), samples(seed=1), **arguments()), expected)
