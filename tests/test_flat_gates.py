"""Flat buffers of gates: where layers lie, what counts, and what pruning and T do to the gated weights."""

import pytest
import torch

from ffw_fast.flat_gates import FlatGates
from ffw_fast.gates import GateKind
from ffw_fast.optim import GatedAdam
from tests.small_gates import spread_scores


def test_layers_start_at_multiples_of_16_and_the_padding_stays_zero():
    weights = {"a": torch.randn(5, 3), "b": torch.randn(16), "c": torch.randn(2, 1, 3, 3)}
    gates = FlatGates(weights, GateKind.FFW, seed=0)
    assert gates.count == 15 + 16 + 18
    assert len(gates.weight) == 16 + 16 + 32
    starts = [view.storage_offset() for view in gates.views(gates.weight).values()]
    assert starts == [0, 16, 32]
    for name, view in gates.views(gates.gated).items():
        assert torch.equal(view, weights[name])
    padding = [15, *range(50, 64)]
    optimizer = GatedAdam(gates)
    gates.gated.grad.fill_(1.0)
    optimizer.step()
    for buffer in (gates.weight, gates.gated):
        assert not buffer[padding].any()
    assert gates.gated.grad.data_ptr() == optimizer.param_groups[0]["params"][0].grad.data_ptr()


def test_sparsity_counts_gates_and_no_padding():
    gates = FlatGates({"a": torch.ones(3), "b": torch.ones(17)}, GateKind.FFW, seed=0)
    assert gates.sparsity() == 0
    gates.view(gates.scores, "b")[:5] = -0.1
    assert gates.sparsity() == 0.25
    gates.scores[0] = -0.0
    assert gates.sparsity() == 0.25
    assert gates.sparsity(shift=0.2) == 0


@pytest.mark.parametrize("kind", GateKind)
def test_pruned_weights_within_and_gated_ones_again_after(kind):
    gates = FlatGates({"a": torch.randn(40)}, kind, seed=1)
    spread_scores(gates)
    before = gates.gated.detach().clone()
    for shift in (0.0, 0.4):
        with gates.pruned(shift):
            assert torch.equal(gates.gated, torch.where(gates.scores + shift >= 0, gates.weight, 0))
        assert torch.equal(gates.gated, before)
    with pytest.raises(RuntimeError, match="within"), gates.pruned():
        raise RuntimeError("within")
    assert torch.equal(gates.gated, before)


def test_temperature_recomputes_the_gates():
    gates = FlatGates({"a": torch.ones(16)}, GateKind.FFW, seed=1)
    gates.scores.fill_(-1.0)
    gates.set_temperature(0.5)
    torch.testing.assert_close(gates.gated.detach(), 2 * torch.sigmoid(torch.full((16,), -2.0)))
