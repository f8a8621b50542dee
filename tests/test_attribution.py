"""Where in an image a network finds its answer."""

import pytest
import torch
from torch import nn

from ffw_fast.attribution import attribution, conflicting_examples, explain
from ffw_fast.data.samples import Samples
from tests.small_images import biased_set, network


def test_grad_cam_is_what_its_definition_says():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)
    ).double()
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    maps, predictions = attribution(model, x)
    assert torch.equal(predictions, model(x).argmax(1))
    activations = model[0](x)  # the logit's gradient by a channel's pixel: its class's weight / 36 where ReLU is open
    gradient = model[4].weight[predictions][:, :, None, None] / 36 * (activations > 0)
    weights = gradient.mean((2, 3), keepdim=True)
    expected = (weights * activations).sum(1).clamp_min(0)
    torch.testing.assert_close(maps, expected / expected.amax((1, 2), keepdim=True))


def test_grad_cam_looks_at_the_last_convolution_of_more_than_one_pixel():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 5, 5), nn.Conv2d(5, 5, 4), nn.Flatten(), nn.Linear(5, 4))
    maps, _ = attribution(model, torch.randn(6, 3, 10, 10))  # 8 x 8, 4 x 4 and 1 x 1 pixels
    assert maps.shape == (6, 4, 4)


def test_without_convolutions_it_is_gradient_times_input():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    x = torch.randn(5, 3, 2, 2)
    maps, predictions = attribution(model, x)
    expected = (model[1].weight[predictions].view(5, 3, 2, 2) * x).sum(1).clamp_min(0)
    torch.testing.assert_close(maps, expected / expected.amax((1, 2), keepdim=True).clamp_min(1e-30))


class Aside(nn.Module):
    """A convolution whose output nobody reads behind one that somebody does, and an input that is overwritten."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.conv, self.aside, self.fc, self.frozen = nn.Conv2d(3, 2, 3), nn.Conv2d(2, 2, 3), nn.Linear(72, 3), frozen

    def forward(self, x):
        with torch.set_grad_enabled(not self.frozen):
            h = self.conv(x.sub_(0.5))
            self.aside(h)
        return self.fc(h.flatten(1))


@pytest.mark.parametrize("frozen", [False, True])
def test_networks_that_gradients_do_not_run_through_everywhere(frozen):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    before = x.clone()
    maps, _ = attribution(Aside(frozen), x)
    assert torch.equal(x, before)
    assert maps.shape == ((4, 8, 8) if frozen else (4, 6, 6))
    assert (maps == 0).all() == frozen


def test_a_network_that_answers_always_the_same_has_empty_maps():
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 36, 3))
    nn.init.zeros_(model[2].weight)
    maps, _ = attribution(model, torch.randn(2, 3, 8, 8))
    assert torch.equal(maps, torch.zeros(2, 6, 6))


def test_the_model_stays_as_it_is():
    model = network().requires_grad_(False)
    model.zero_grad()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        attribution(model, biased_set(4)[0])
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(part._forward_hooks for part in model.modules())


def test_examples_conflict_and_show_every_target_first():
    y = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    b = torch.tensor([[0], [1], [2], [0], [2], [2], [0]])
    chosen = conflicting_examples(Samples(torch.arange(7.0), y, b), count=4)
    assert chosen.x.tolist() == [1, 3, 6, 2]


def test_examples_conflict_with_all_biases():
    y = torch.tensor([0, 0, 1, 1])
    b = torch.tensor([[1, 0], [1, 2], [1, 0], [0, 2]])
    assert conflicting_examples(Samples(torch.arange(4.0), y, b)).x.tolist() == [1, 3]


@pytest.mark.parametrize("shape", [(6,), (2, 8, 8), (3, 1, 1)])
def test_only_images_are_explained(shape):
    samples = Samples(torch.randn(4, *shape), torch.zeros(4, dtype=torch.int64), torch.ones(4, 1, dtype=torch.int64))
    assert explain({"vanilla": network()}, samples) == {}


def test_networks_explain_the_same_samples():
    samples = Samples(*biased_set(40))
    found = explain({"vanilla": network(), "pruned": network(seed=1)}, samples)
    assert found["x"].shape == (8, 3, 8, 8)
    assert found["vanilla.map"].shape == found["pruned.map"].shape
    assert not torch.equal(found["vanilla.map"], found["pruned.map"])
    assert (found["b"][:, 0] != found["y"]).all()
