"""The fused optimizer against ``torch.optim.Adam`` on straight-through scores."""

import io

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from ffw_fast import philox
from ffw_fast.flat_gates import FlatGates
from ffw_fast.flat_layout import flat_offsets
from ffw_fast.gates import GATES, GateKind, gate_kind, gate_movement
from ffw_fast.optim import GatedAdam
from tests.small_gates import PlainScores, backward, loss_of, make_gates


def assert_equal_scores(gates: FlatGates, plain: PlainScores) -> None:
    for name, scores in gates.views(gates.scores).items():
        torch.testing.assert_close(scores, plain.scores[name].detach(), rtol=1e-6, atol=1e-8)


SETTINGS = [
    {},
    {"lr": 0.05},
    {"lr": 0.05, "weight_decay": 0.3},
    {"lr": 0.05, "weight_decay": 0.0, "betas": (0.5, 0.9), "eps": 1e-3},
]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_is_adam_on_straight_through_scores(gate, settings):
    gates = make_gates(gate_kind(gate))
    plain = PlainScores(gates)
    ours = GatedAdam(gates, **settings)
    theirs = torch.optim.Adam(plain.scores.values(), **{"weight_decay": 1e-4, **settings})
    for step in range(12):
        ours.zero_grad()
        theirs.zero_grad()
        given = backward(gates, step)
        expected = loss_of(plain.gated(draws=step), step)
        assert given.item() == pytest.approx(expected.item(), rel=1e-6)
        expected.backward()
        ours.step()
        theirs.step()
        assert_equal_scores(gates, plain)
    assert not gates.gated[15:16].any()  # the padding behind 15 elements


def test_default_settings_are_the_published_ones():
    (group,) = GatedAdam(make_gates()).param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-3, (0.9, 0.999), 1e-8, 1e-4)


@pytest.mark.parametrize(
    "schedule",
    [lambda optimizer: CosineAnnealingLR(optimizer, 6), lambda optimizer: LambdaLR(optimizer, lambda step: 0.5**step)],
)
def test_learning_rate_schedulers(schedule):
    gates = make_gates()
    plain = PlainScores(gates)
    ours = GatedAdam(gates, lr=0.1)
    theirs = torch.optim.Adam(plain.scores.values(), lr=0.1, weight_decay=1e-4)
    schedulers = schedule(ours), schedule(theirs)
    for step in range(8):
        ours.zero_grad()
        theirs.zero_grad()
        backward(gates, step)
        loss_of(plain.gated(0), step).backward()
        ours.step()
        theirs.step()
        for scheduler in schedulers:
            scheduler.step()
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"] != 0.1
    assert_equal_scores(gates, plain)


def test_gradients_accumulate_until_they_are_zeroed():
    """``zero_grad`` zeroes in place, whatever ``set_to_none`` says: each layer's gradient is a view of the flat one."""
    gates = make_gates()
    optimizer = GatedAdam(gates)
    buffer = gates.gated.grad
    backward(gates)
    once = buffer.clone()
    backward(gates)
    torch.testing.assert_close(gates.gated.grad, 2 * once)
    for set_to_none in (False, True):
        backward(gates)
        optimizer.zero_grad(set_to_none=set_to_none)
        assert gates.gated.grad is buffer
        assert not buffer.any()


def test_closure():
    gates, twin = make_gates(), make_gates()
    with_closure, plain = GatedAdam(gates), GatedAdam(twin)

    def closure():
        with_closure.zero_grad()
        return backward(gates)

    with torch.no_grad():
        loss = with_closure.step(closure)
    plain.zero_grad()
    assert loss.item() == backward(twin).item()
    assert plain.step() is None
    assert torch.equal(gates.scores, twin.scores)


def test_several_gates_are_parameter_groups_with_settings_of_their_own():
    pair, alone = ([make_gates(GateKind.FFW, 1), make_gates(GateKind.BERNOULLI, 2)] for _ in range(2))
    together = GatedAdam(pair)
    together.param_groups[0]["lr"] = 0.2
    together.param_groups[1]["weight_decay"] = 0.5
    separate = [GatedAdam(alone[0], lr=0.2), GatedAdam(alone[1], weight_decay=0.5)]
    for step in range(3):
        together.zero_grad()
        for gates, twin, optimizer in zip(pair, alone, separate, strict=True):
            optimizer.zero_grad()
            backward(gates, step)
            backward(twin, step)
            optimizer.step()
        together.step()
    for gates, twin in zip(pair, alone, strict=True):
        assert torch.equal(gates.scores, twin.scores)
        assert torch.equal(gates.gated, twin.gated)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("anneal_rate", [None, 1e-4])
def test_a_loaded_state_goes_on_with_the_same_bits(gate, anneal_rate):
    def train(gates, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            backward(gates, step)
            optimizer.step()

    gates = make_gates(gate_kind(gate), dtype=torch.float32)
    optimizer = GatedAdam(gates, lr=0.03, anneal_rate=anneal_rate)
    train(gates, optimizer, range(3))
    file = io.BytesIO()
    names = ("scores", "temperature", "draw", "movement")
    torch.save([optimizer.state_dict(), {name: getattr(gates, name) for name in names}], file)
    train(gates, optimizer, range(3, 6))

    file.seek(0)
    state, buffers = torch.load(file, weights_only=True)
    twin = make_gates(gate_kind(gate), dtype=torch.float32)
    fresh = GatedAdam(twin, lr=1.0, anneal_rate=anneal_rate)
    fresh.load_state_dict(state)
    for name in names:
        getattr(twin, name).copy_(buffers[name])
    twin.refresh()
    assert fresh.param_groups[0]["lr"] == 0.03
    train(twin, fresh, range(3, 6))
    for name in (*names, "gated"):
        assert torch.equal(getattr(twin, name), getattr(gates, name)), name
    for name, value in optimizer.state_dict()["state"][0].items():
        assert torch.equal(fresh.state_dict()["state"][0][name], value)


def test_annealing_by_the_movement_of_the_gates():
    """T falls by the rule, at most by 2% a step, and the learning rate follows T below 20 lr."""
    gates = make_gates()
    plain = PlainScores(gates)
    lr, rate, temperature = 0.1, 0.001, 1.0
    ours = GatedAdam(gates, lr=lr, anneal_rate=rate)
    theirs = torch.optim.Adam(plain.scores.values(), lr=lr, weight_decay=1e-4)
    falls = []
    for step in range(10):
        ours.zero_grad()
        theirs.zero_grad()
        backward(gates, step)
        loss_of(plain.gated(0, temperature), step).backward()
        scores = torch.cat([score.detach().flatten() for score in plain.scores.values()])
        s = torch.sigmoid(scores / temperature)
        movement = torch.where(scores < 0, (2 * s * (1 - s) * scores / temperature).abs(), 0).mean().item()
        theirs.param_groups[0]["lr"] = lr * min(1, temperature / (20 * lr))
        ours.step()
        theirs.step()
        falls.append(min(rate / movement, 0.02))
        temperature *= float(torch.tensor(-falls[-1]).exp())
        assert gates.temperature.item() == pytest.approx(temperature, rel=1e-5)
    for name, scores in gates.views(gates.scores).items():
        torch.testing.assert_close(scores, plain.scores[name].detach(), rtol=1e-4, atol=1e-6)
    assert max(falls) < 0.02  # the rule, and not the limit, was what held


@pytest.mark.parametrize("kind", [GateKind.FFW, GateKind.BERNOULLI, GateKind.CONCRETE])
def test_the_padding_has_no_part_in_the_movement(kind):
    gates = make_gates(kind)
    optimizer = GatedAdam(gates, anneal_rate=1e-3)
    for step in range(3):
        expected = 0.0
        for scores, offset in zip(gates.views(gates.scores).values(), flat_offsets([15, 24]), strict=False):
            draw = philox.make_draw(7, step, offset)
            uniform = philox.uniform(scores.numel(), draw).view(scores.shape).double()
            expected += gate_movement(kind, scores, gates.temperature, uniform).sum().item()
        assert gates.movement.item() == pytest.approx(expected, rel=1e-6)
        optimizer.step()


def test_gates_that_do_not_move_let_the_temperature_fall_by_the_limit():
    gates = make_gates()
    gates.scores.fill_(3.0)
    gates.refresh()
    optimizer = GatedAdam(gates, anneal_rate=1e-4)
    optimizer.step()
    assert gates.temperature.item() == pytest.approx(0.980198673, rel=1e-6)  # exp(-0.02)


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0},
        {"lr": -1.0},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, -0.1)},
        {"eps": 0},
        {"weight_decay": -1e-9},
    ],
)
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=r"expected lr > 0, betas in .* got lr="):
        GatedAdam(make_gates(), **settings)


@pytest.mark.parametrize("rate", [0, -1e-4, float("inf"), float("nan")])
def test_bad_anneal_rate(rate):
    with pytest.raises(ValueError, match="anneal_rate must be positive and finite, got"):
        GatedAdam(make_gates(), anneal_rate=rate)


def test_parameters_are_refused():
    with pytest.raises(TypeError, match=r"takes ffw_fast\.flat_gates\.FlatGates, got Parameter; the scores of"):
        GatedAdam(torch.nn.Linear(2, 2).parameters())
