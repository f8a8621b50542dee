"""Settings are checked when they are made, and name what is wrong with them."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffw_fast import extract, reference
from ffw_fast.gates import GATES, GateKind
from ffw_fast.precision import PRECISIONS
from ffw_fast.settings import Settings
from tests.six_features import network, samples

NEEDED = {"bottleneck": "pool", "num_bias_classes": 10}
NOT_WHOLE = (1.0, True, "3", None)


def test_defaults_are_the_published_ones():
    settings = Settings(**NEEDED)
    assert (settings.method, settings.gate, settings.granularity) == ("ffw", "ffw", "weight")
    assert (settings.schedule, settings.anneal_rate) == ("published", 1e-4)
    assert (settings.gamma, settings.alpha, settings.max_epochs, settings.batch_size) == (10.0, 1.0, 200, 100)
    assert (settings.seed, settings.precision, settings.kind) == (0, "fp32", GateKind.FFW)


@given(
    st.fixed_dictionaries(
        {
            "gamma": st.floats(0, 1e300) | st.integers(0, 10**6),
            "alpha": st.floats(0, 1e300),
            "gate": st.sampled_from(GATES),
            "anneal_rate": st.floats(1e-300, 1e300),
            "max_epochs": st.integers(1),
            "batch_size": st.integers(1),
            "seed": st.integers(0, 2**63 - 1),
            "num_bias_classes": st.integers(2),
            "precision": st.sampled_from(sorted(PRECISIONS)),
        }
    )
)
def test_settings_survive_json(changes):
    settings = Settings(**{**NEEDED, **changes})
    assert Settings(**json.loads(json.dumps(settings.as_dict()))) == settings


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("bottleneck", (None, 3, b"pool"), "bottleneck must be the name of a module, got"),
        ("method", ("bice", None, ""), "unknown method .*; known methods: ffw, bise"),
        ("gate", ("soft", None, "FFW"), "unknown gate .*; known gates: ffw, hard, bernoulli, concrete"),
        ("granularity", ("row", None), "unknown granularity .*; known granularities: weight, channel"),
        ("schedule", ("linear", None), "unknown schedule .*; known schedules: published, adaptive, halving"),
        ("precision", ("fp16", None, 32), "unknown precision .*; known precisions: fp32, bf16"),
        ("gamma", (-1, float("nan"), float("inf"), "1", True, None), "gamma must be a non-negative finite number, got"),
        ("alpha", (-1e-9, float("nan"), float("inf"), None), "alpha must be a non-negative finite number, got"),
        ("anneal_rate", (0, -1.0, float("nan"), float("inf")), "anneal_rate must be a positive finite number, got"),
        ("num_bias_classes", (1, 0, -3, *NOT_WHOLE), "num_bias_classes must be a whole number of at least 2, got"),
        ("max_epochs", (0, -1, *NOT_WHOLE), "max_epochs must be a whole number of at least 1, got"),
        ("batch_size", (0, -1, *NOT_WHOLE), "batch_size must be a whole number of at least 1, got"),
        ("seed", (-1, 2**63, *NOT_WHOLE), "seed must be a whole number from 0 to"),
    ],
)
def test_bad_settings(name, values, message):
    for value in values:
        with pytest.raises((ValueError, TypeError), match=message):
            Settings(**{**NEEDED, name: value})


def test_hard_gates_do_not_go_with_annealing_by_their_movement():
    with pytest.raises(ValueError, match=r"schedule 'adaptive' .* gate 'hard' has no T"):
        Settings(**NEEDED, gate="hard", schedule="adaptive")
    for gate in ("ffw", "bernoulli", "concrete"):
        Settings(**NEEDED, gate=gate, schedule="adaptive")


def test_numbers_of_numpy_are_numbers():
    bise = {"method": "bise", "gate": "hard", "granularity": "channel", "schedule": "halving"}
    ours = {"gamma": 0.5, "batch_size": 7, "seed": 3, "cache_augmented": True, "correlations": [0.25], "aligned": [1]}
    theirs = {
        "gamma": np.float32(0.5),
        "batch_size": np.int64(7),
        "seed": np.uint8(3),
        "cache_augmented": np.bool_(True),
        "correlations": [np.float32(0.25)],
        "aligned": (np.int32(1),),
    }
    settings = Settings(**NEEDED, **bise, **theirs)
    assert settings == Settings(**NEEDED, **bise, **ours)
    assert Settings(**json.loads(json.dumps(settings.as_dict()))) == settings
    with pytest.raises(ValueError, match=r"batch_size must be a whole number of at least 1, got 0$"):
        Settings(**NEEDED, batch_size=np.int64(0))


@pytest.mark.parametrize("function", [extract, reference.extract])
def test_an_unknown_argument_is_named_beside_the_known_ones(function):
    with pytest.raises(TypeError, match="'gama'"):
        function(network(), samples(), samples(), bottleneck="relu", num_bias_classes=3, gama=1.0)
    with pytest.raises(TypeError, match=r"unknown argument 'gama'; those of extract are: bottleneck, .*gamma"):
        Settings.of(**NEEDED, gama=1.0)
