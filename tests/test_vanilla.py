"""Training of the vanilla network."""

import dataclasses
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ffw_fast.data import Samples, multi_color_mnist
from ffw_fast.data.pixels import Pixels
from ffw_fast.models import MLP, SimpleConvNet
from ffw_fast.run_state import Checkpoints, RunState
from ffw_fast.vanilla import Recipe, train_vanilla
from ffw_fast.workloads import get_workload
from tests import six_features

pytestmark = pytest.mark.usefixtures("one_thread")
ADAM = Recipe("adam", lr=1e-3, batch_size=64, epochs=10)


def accuracy(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return (model(x).argmax(dim=1) == labels).float().mean().item()


def few_samples(n: int = 10) -> Samples:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((n, 3, 28, 28), generator=generator)
    return Samples(x, torch.arange(n) % 10, torch.zeros((n, 1), dtype=torch.int64))


def test_it_learns_the_color_and_not_the_digit():
    splits = multi_color_mnist(train_size=2000)
    model = get_workload("multi-color-mnist").build_model(0)
    trained = train_vanilla(model, splits.vanilla, ADAM, seed=0)
    assert trained is model
    assert not model.training
    assert accuracy(model, splits.vanilla.x, splits.vanilla.y) > 0.95
    test = splits.test
    agreeing = test.b[:, 0] == test.b[:, 1]
    assert accuracy(model, test.x[agreeing], test.b[agreeing, 0]) > 0.8
    assert accuracy(model, test.x, test.y) < 0.4


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_it_agrees_with_a_plain_training_loop(optimizer):
    samples = few_samples()
    recipe = Recipe(optimizer, lr=0.01, batch_size=4, epochs=4, milestones=(0.5,), lr_cut=0.5)
    workload = get_workload("multi-color-mnist")
    model, plain = workload.build_model(0), workload.build_model(0)
    orders = []
    model.flatten.register_forward_hook(lambda module, inputs, output: orders.append(inputs[0].clone()))
    losses = []
    train_vanilla(model, samples, recipe, seed=5, on_epoch=lambda epoch, loss: losses.append((epoch, loss)))
    assert [len(batch) for batch in orders] == [4, 4, 2] * 4, "the short last minibatch is kept"

    if optimizer == "adam":
        steps: torch.optim.Optimizer = torch.optim.Adam(plain.parameters(), 0.01, weight_decay=1e-4)
    else:
        steps = torch.optim.SGD(plain.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    label = {image.numpy().tobytes(): int(y) for image, y in zip(samples.x, samples.y, strict=True)}
    total = 0.0
    for number, batch in enumerate(orders):
        steps.param_groups[0]["lr"] = 0.01 if number < 6 else 0.005
        targets = torch.tensor([label[image.numpy().tobytes()] for image in batch])
        loss = nn.functional.cross_entropy(plain(batch), targets)
        total += loss.item() * len(batch) if number >= 9 else 0
        steps.zero_grad()
        loss.backward()
        steps.step()
    for trained, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(trained, expected)
    assert [epoch for epoch, _ in losses] == [1, 2, 3, 4]
    assert losses[-1][1] == pytest.approx(total / 10, rel=1e-4)


def test_every_epoch_has_its_own_order():
    seen = []
    model = MLP()
    model.flatten.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0][:, 0, 0, 0].clone()))
    samples = few_samples()
    train_vanilla(model, samples, dataclasses.replace(ADAM, batch_size=10, epochs=3), seed=0)
    assert len({tuple(order.tolist()) for order in seen}) == 3
    assert all(torch.equal(order.sort().values, samples.x[:, 0, 0, 0].sort().values) for order in seen)


def test_deterministic_and_the_global_generator_untouched():
    samples = few_samples()
    workload = get_workload("multi-color-mnist")

    def trained(seed: int) -> torch.Tensor:
        model = workload.build_model(0)
        return train_vanilla(model, samples, dataclasses.replace(ADAM, batch_size=3, epochs=1), seed=seed).fc1.weight

    before = torch.get_rng_state()
    first, again, other = trained(1), trained(1), trained(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_convolutions_and_batch_norm(precision):
    samples = few_samples()
    model = SimpleConvNet()
    recipe = Recipe("sgd", lr=0.1, batch_size=4, epochs=1)
    train_vanilla(model, Samples(samples.x[:, :, :8, :8], samples.y, samples.b), recipe, seed=0, precision=precision)
    assert model.bn1.num_batches_tracked == 3
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_frozen_parameters_stay():
    model = MLP()
    model.fc1.requires_grad_(False)
    before = [parameter.detach().clone() for parameter in (model.fc1.weight, model.fc2.weight)]
    train_vanilla(model, few_samples(), dataclasses.replace(ADAM, epochs=1), seed=0)
    assert torch.equal(model.fc1.weight, before[0])
    assert not torch.equal(model.fc2.weight, before[1])


def test_a_loss_that_is_not_finite_stops_training():
    samples = few_samples()
    samples.x[3, 0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="training loss is nan in epoch 1 of 10"):
        train_vanilla(MLP(), samples, ADAM, seed=0)


def test_bad_arguments():
    samples = few_samples()
    with pytest.raises(ValueError, match="got 10 and 9"):
        train_vanilla(MLP(), Samples(samples.x, samples.y[:9], samples.b), ADAM, seed=0)
    with pytest.raises(ValueError, match="unknown precision 'fp8'"):
        train_vanilla(MLP(), samples, ADAM, seed=0, precision="fp8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "lion"}, "unknown optimizer 'lion'"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"epochs": -1}, "epochs at least 0"),
        ({"milestones": (40, 60)}, "fractions of all epochs"),
        ({"schedule": "linear"}, "unknown schedule 'linear'"),
    ],
)
def test_bad_recipes(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ADAM, **change)


def test_learning_rate_is_cut_at_the_milestones():
    recipe = get_workload("biased-mnist").recipe(full=True)
    rates = [recipe.learning_rate(epoch) for epoch in range(recipe.epochs)]
    assert rates == pytest.approx([0.1] * 40 + [0.01] * 20 + [0.001] * 20)
    short = get_workload("biased-mnist").recipe(full=False)
    rates = [short.learning_rate(epoch) for epoch in range(short.epochs)]
    assert rates == pytest.approx([0.1] * 15 + [0.01] * 8 + [0.001] * 7)


def test_the_cosine_falls_to_nothing():
    recipe = get_workload("corrupted-cifar10").recipe(full=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(recipe.build_optimizer(MLP()), recipe.epochs)
    for epoch in range(recipe.epochs):
        assert recipe.learning_rate(epoch) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-6, abs=1e-12)
        scheduler.optimizer.step()
        scheduler.step()


def test_plateaus_of_the_validation_loss_cut_the_learning_rate_and_end_the_training(monkeypatch):
    """A loss that never falls: patience 10 and cooldown 5, so cuts after epochs 12, 28 and 44, the last below 1e-3."""
    recipe, rates = Recipe("sgd", lr=0.1, batch_size=10, epochs=80, schedule="plateau", lr_end=1e-3), []

    def loss(plateau) -> float:
        rates.append(plateau.scheduler.optimizer.param_groups[0]["lr"])
        return 1.0

    monkeypatch.setattr("ffw_fast.vanilla._Plateau._loss", loss)
    train_vanilla(MLP(), few_samples(), recipe, seed=0, val=few_samples())
    assert rates == pytest.approx([0.1] * 12 + [0.01] * 16 + [0.001] * 16)


def test_the_plateau_is_of_the_loss_in_eval_mode():
    samples, losses = few_samples(), []
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3 * 28 * 28), nn.Linear(3 * 28 * 28, 10))
    recipe = Recipe("sgd", lr=0.01, batch_size=10, epochs=3, schedule="plateau")
    model[0].register_forward_hook(lambda module, *_: losses.append(module.training))
    train_vanilla(model, samples, recipe, seed=0, val=samples)
    assert losses == [True, False] * 3
    with pytest.raises(ValueError, match="needs a validation set"):
        train_vanilla(model, samples, recipe, seed=0)


def test_flips_and_crops_are_of_the_bytes_and_seeded():
    images = torch.randint(1, 256, (8, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    samples = Samples(Pixels(images, (0.5,) * 3, (0.25,) * 3), few_samples(8).y, few_samples(8).b)
    recipe = Recipe("sgd", lr=0.01, batch_size=8, epochs=2, flips=True, crop_padding=2)

    def seen(seed: int) -> list[torch.Tensor]:
        inputs: list[torch.Tensor] = []
        model = MLP()
        model.flatten.register_forward_hook(lambda _module, given, _output: inputs.append(given[0]))
        train_vanilla(model, samples, recipe, seed=seed)
        return inputs

    state = torch.get_rng_state()
    first, again = seen(1), seen(1)
    torch.set_rng_state(state)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert not torch.equal(first[0].sort(0).values, first[1].sort(0).values), "other draws in every epoch"
    assert (first[0] == -2).any(), "black borders: (0 - 0.5) / 0.25"
    with pytest.raises(TypeError, match="flips and crops are of images kept as bytes"):
        train_vanilla(MLP(), few_samples(), recipe, seed=0)


# checkpoints ---------------------------------------------------------------------------------------------------------

FILES = Checkpoints.named("training")
RECIPES = {
    "adam": Recipe("adam", lr=0.01, batch_size=4, epochs=6, schedule="cosine"),
    "sgd": Recipe("sgd", lr=0.1, batch_size=4, epochs=6, milestones=(0.3, 0.6)),
    "plateau": Recipe("sgd", lr=0.1, batch_size=4, epochs=30, schedule="plateau", lr_end=1e-3, flips=True),
}


class Interrupted(Exception):
    pass


@pytest.fixture
def quick_plateaus(monkeypatch):
    monkeypatch.setattr("ffw_fast.vanilla.PATIENCE", 0)
    monkeypatch.setattr("ffw_fast.vanilla.COOLDOWN", 1)


def images(seed: int) -> Samples:
    source = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (10, 3, 8, 8), dtype=torch.uint8, generator=source)
    return Samples(Pixels(x, (0.5,) * 3, (0.25,) * 3), torch.arange(10), torch.zeros((10, 1), dtype=torch.int64))


def bits(folder: Path | None, recipe: Recipe, stop_after: int | None = None) -> tuple[dict[str, torch.Tensor], list]:
    """Weights and buffers of a trained network, and its losses; what was reached goes on in the same folder."""
    model, losses = get_workload("biased-mnist").build_model(0), []

    def on_epoch(epoch: int, loss: float) -> None:
        losses.append((epoch, loss))
        if epoch == stop_after:
            raise Interrupted

    with RunState(folder, dataclasses.asdict(recipe) | {"milestones": []}, folder is not None, FILES) as state:
        train_vanilla(model, images(1), recipe, seed=3, val=images(2), on_epoch=on_epoch, state=state)
    return model.state_dict(), losses


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", RECIPES)
def test_a_training_that_was_cut_off_ends_with_the_same_bits(tmp_path, name, quick_plateaus):
    recipe = RECIPES[name]
    expected, losses = bits(None, recipe)
    assert (len(losses) < recipe.epochs) == (name == "plateau"), "the learning rate fell below its end"
    for stop in (1, 2, 5, len(losses)):
        with pytest.raises(Interrupted):
            bits(tmp_path, recipe, stop)
    found, rest = bits(tmp_path, recipe)
    assert_same_bits(found, expected)
    assert rest == losses[-1:], "nothing is trained twice"
    assert {path.name for path in tmp_path.iterdir()} >= {FILES.newest}


def test_a_checkpoint_within_an_epoch_is_of_the_one_before(tmp_path):
    """Ctrl-C comes anywhere."""
    recipe = RECIPES["sgd"]
    expected, losses = bits(None, recipe)
    steps = []

    def step(optimizer, *_given):
        steps.append(optimizer)
        if len(steps) == 8:
            raise KeyboardInterrupt

    hook = register_optimizer_step_post_hook(step)
    with pytest.raises(KeyboardInterrupt):
        bits(tmp_path, recipe)
    hook.remove()
    found, rest = bits(tmp_path, recipe)
    assert_same_bits(found, expected)
    assert rest == losses[1:]


def test_a_damaged_checkpoint_falls_back_and_two_begin_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("ffw_fast.run_state.LONGEST", 0.0)
    recipe = RECIPES["adam"]
    expected, losses = bits(None, recipe)
    with pytest.raises(Interrupted):
        bits(tmp_path, recipe, 3)
    (tmp_path / FILES.newest).write_bytes(b"half")
    with pytest.warns(UserWarning, match=rf"{FILES.newest} is damaged.*goes on from the checkpoint before it"):
        found, rest = bits(tmp_path, recipe)
    assert_same_bits(found, expected)
    assert rest == losses[1:]
    for name in FILES:
        (tmp_path / name).write_bytes(b"half")
    with pytest.warns(UserWarning, match=r"is damaged.*is damaged.*trained from the beginning"):
        found, rest = bits(tmp_path, recipe)
    assert_same_bits(found, expected)
    assert rest == losses


def test_a_checkpoint_of_another_training_begins_anew(tmp_path):
    with suppress(Interrupted):
        bits(tmp_path, RECIPES["sgd"], 3)
    expected, losses = bits(None, RECIPES["adam"])
    with pytest.warns(UserWarning, match=r"another run: .*lr was 0.1 and is now 0.01; .*from the beginning"):
        found, rest = bits(tmp_path, RECIPES["adam"])
    assert_same_bits(found, expected)
    assert rest == losses


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    recipe = RECIPES["sgd"]
    expected, losses = bits(None, recipe)
    rate = Recipe.learning_rate
    with monkeypatch.context() as patch:
        patch.setattr(Recipe, "learning_rate", lambda self, epoch: float("nan") if epoch == 3 else rate(self, epoch))
        with pytest.raises(FloatingPointError, match="epoch 4 of 6"):
            bits(tmp_path, recipe)
    found, rest = bits(tmp_path, recipe)
    assert_same_bits(found, expected)
    assert rest == losses[2:]


def test_a_last_minibatch_of_one_sample_is_left_out_beside_batch_norm():
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    data = six_features.samples(21)
    trained = train_vanilla(model, Samples(*data), Recipe("adam", lr=0.01, batch_size=10, epochs=2), seed=0)
    assert trained[2].num_batches_tracked == 4


def test_minibatches_of_one_sample_are_all_learned_from_where_batch_norm_can():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    data = Samples(torch.randn(5, 3, 4, 4), torch.arange(5) % 3, torch.zeros(5, 1, dtype=torch.int64))
    trained = train_vanilla(model, data, Recipe("adam", lr=0.01, batch_size=1, epochs=2), seed=0)
    assert trained[1].num_batches_tracked == 10


def test_milestones_are_whole_epochs():
    recipe = Recipe("sgd", lr=1.0, batch_size=10, epochs=100, milestones=(0.55,))
    assert [recipe.learning_rate(epoch) for epoch in (54, 55)] == [1.0, pytest.approx(0.1)]
