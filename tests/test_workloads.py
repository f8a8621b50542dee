"""The registry of workloads."""

import dataclasses
import inspect

import pytest
import torch

from ffw_fast.runs.request import Request
from ffw_fast.workloads import WORKLOADS, get_workload

ALL = pytest.mark.parametrize("workload", WORKLOADS.values(), ids=list(WORKLOADS))
SHIPPED = pytest.mark.parametrize("workload", [get_workload(name) for name in ("multi-color-mnist", "biased-mnist")])


def test_registry():
    assert list(WORKLOADS) == ["multi-color-mnist", "biased-mnist", "celeba", "corrupted-cifar10"]
    assert all(get_workload(name).name == name for name in WORKLOADS)
    with pytest.raises(
        ValueError, match="unknown workload 'mnist'; known workloads: multi-color-mnist, biased-mnist, celeba"
    ):
        get_workload("mnist")


def test_table_8():
    multi, biased = WORKLOADS["multi-color-mnist"], WORKLOADS["biased-mnist"]
    assert (multi.paper_seconds, biased.paper_seconds) == (1320, 12000)
    assert multi.recipe(full=True).epochs == 100
    assert multi.recipe(full=True).batch_size == 256
    assert biased.recipe(full=True).epochs == 80
    assert biased.recipe(full=False).epochs == 30
    celeba, cifar = WORKLOADS["celeba"], WORKLOADS["corrupted-cifar10"]
    assert (celeba.paper_seconds, cifar.paper_seconds) == (4500, 3120)
    assert celeba.recipe(full=True) == celeba.recipe(full=False)
    assert (celeba.full_recipe.optimizer, celeba.full_recipe.schedule) == ("sgd", "plateau")
    assert cifar.full_recipe.crop_padding == 4


@SHIPPED
def test_model_and_data_fit(workload):
    splits = workload.load(None, seed=0, train_size=20, unbiased_size=20)
    model = workload.build_model(seed=0).eval()
    with torch.no_grad():
        assert model(splits.train.x).shape == (20, workload.num_classes)
    model.get_submodule(workload.bottleneck)
    for samples in (splits.vanilla, splits.train, splits.val, splits.test):
        assert samples.b.shape == (len(samples.y), len(workload.bias_names))
        assert samples.y.min() >= 0
        assert samples.y.max() < workload.num_classes
        assert samples.b.min() >= 0
        assert samples.b.max() < workload.num_bias_classes


@ALL
def test_models_depend_on_the_seed_alone(workload):
    before = torch.get_rng_state()
    first = workload.build_model(1).state_dict()
    torch.rand(1)
    again, other = workload.build_model(1).state_dict(), workload.build_model(2).state_dict()
    torch.set_rng_state(before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@ALL
def test_building_leaves_the_global_generator_alone(workload):
    before = torch.get_rng_state()
    workload.build_model(1)
    assert torch.equal(torch.get_rng_state(), before)


@ALL
def test_options_are_those_that_the_data_takes(workload):
    parameters = inspect.signature(workload.data).parameters
    keywords = {name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}
    assert {option.name for option in workload.options} == keywords
    assert all(parameters[name].default is None for name in keywords)
    for option in workload.options:
        assert option.type in (int, float, bool, str)
        assert option.help
        assert option.flag == "--" + option.name.replace("_", "-")


@ALL
def test_unknown_options_are_refused(workload):
    with pytest.raises(ValueError, match=f"{workload.name} has no option tran_size; it understands .*train_size"):
        workload.load(None, seed=0, tran_size=3)


def test_layers_that_bise_gates_are_those_of_channels(tmp_path):
    def where(**given: str) -> str | None:
        extraction = {"method": "bise", "granularity": None, **given}
        return Request(get_workload("celeba"), tmp_path, extraction=extraction).settings.where

    assert where() == where(granularity="channel") == "layer*"
    assert where(where="layer1.*") == "layer1.*"
    assert where(granularity="weight") is None


def test_none_means_the_default():
    splits = get_workload("biased-mnist").load(None, 0, train_size=10, image_size=None, unbiased_size=None)
    assert splits.train.x.shape == (3000, 3, 28, 28)


def test_a_workload_is_a_value():
    workload = get_workload("biased-mnist")
    with pytest.raises(dataclasses.FrozenInstanceError):
        workload.name = "other"
    assert dataclasses.replace(workload, batch_size=50).batch_size == 50
