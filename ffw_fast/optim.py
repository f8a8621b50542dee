"""Adam on the scores, fused with the straight-through gradient before it and the gated weight after it; and SGD."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor

from ffw_fast import ops
from ffw_fast.flat_gates import FlatGates
from ffw_fast.schedule import LARGEST_FALL, STEPS_OF_SCORES

LR = 1e-3
BETAS = (0.9, 0.999)
EPS = 1e-8
WEIGHT_DECAY = 1e-4


class GatedOptimizer(torch.optim.Optimizer, ABC):
    """What the optimizers of scores share: their parameters are flat gated weights, whose gradients autograd fills.

    Args:
        gates: one or several ``FlatGates``, each a parameter group with settings of its own.
        defaults: the settings of a group.
    """

    def __init__(self, gates: FlatGates | Iterable[FlatGates], defaults: dict[str, Any]) -> None:
        groups = [gates] if isinstance(gates, FlatGates) else list(gates)
        if strangers := sorted({type(flat).__name__ for flat in groups if not isinstance(flat, FlatGates)}):
            raise TypeError(
                f"{type(self).__name__} takes ffw_fast.flat_gates.FlatGates, got {', '.join(strangers)}; the scores "
                "of masked layers are ordinary parameters, for torch.optim.Adam"
            )
        self._gates = {flat.gated: flat for flat in groups}
        super().__init__([{"params": [flat.gated]} for flat in groups], defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One step. Nothing is read back from the device."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (gated,) = group["params"]
            if not self.state[gated]:
                self.start()
            self._step(self._gates[gated], group)
            self._gates[gated].spread()
        return loss

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Zero the flat gradients. They are never set to None: the layers' gradients are views of them."""
        for gated in self._gates:
            assert gated.grad is not None
            gated.grad.zero_()

    @abstractmethod
    def _step(self, flat: FlatGates, group: dict) -> None:
        """One step of the scores of a group, and the gated weights of the new ones."""

    @abstractmethod
    def start(self) -> None:
        """Create the state, zero, before the first step; a checkpoint is loaded into it."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused after the start: gates stand behind gated weights, and are given to the constructor."""
        if any(gated not in self._gates for gated in param_group["params"]):
            name = type(self).__name__
            raise ValueError(f"{name} takes all its FlatGates in its constructor and no further parameters")
        super().add_param_group(param_group)

    def __deepcopy__(self, _memo: dict) -> Self:
        raise TypeError(
            f"{type(self).__name__} cannot be copied: build one on the copied FlatGates and load its state_dict"
        )


class GatedSGD(GatedOptimizer):
    """``torch.optim.SGD`` with momentum on gate scores, behind the straight-through gradient.

    Args:
        gates: one or several ``FlatGates``, each a parameter group with settings of its own.
        lr, momentum, weight_decay: as in ``torch.optim.SGD``; weight decay is added to the gradient.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self, gates: FlatGates | Iterable[FlatGates], lr: float, momentum: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        if not (0 < lr < math.inf and 0 <= momentum < 1 and 0 <= weight_decay < math.inf):
            raise ValueError(
                "expected lr > 0, momentum in [0, 1) and weight_decay >= 0, "
                f"got lr={lr}, momentum={momentum}, weight_decay={weight_decay}"
            )
        super().__init__(gates, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _step(self, flat: FlatGates, group: dict) -> None:
        gradient = ops.gate_weight_backward(
            flat.grad[flat.own],
            flat.weight[flat.own],
            flat.scores,
            flat.temperature,
            flat.draw_from(flat.draw, flat.own.start),
            int(flat.kind),
        )
        velocity = self.state[flat.gated]["velocity"]
        velocity.mul_(group["momentum"]).add_(gradient).add_(flat.scores, alpha=group["weight_decay"])
        flat.scores.sub_(velocity, alpha=group["lr"])
        if flat.kind.is_random:
            flat.draw[1] += 1
        flat.refresh_own()

    def start(self) -> None:
        for flat in self._gates.values():
            self.state[flat.gated] = {"velocity": torch.zeros_like(flat.scores)}


class GatedAdam(GatedOptimizer):
    """``torch.optim.Adam`` on gate scores, one pass a step over flat buffers.

    It is what ``ffw_fast.extract`` trains with. For masked layers use ``torch.optim.Adam`` on their scores.

    The parameters are the flat gated weights, whose gradients autograd fills; what is trained are the scores behind
    them. A step computes the scores' straight-through gradient, Adam with L2 weight decay (added to the gradient) and
    bias correction, and the gated weights of the new scores.

    Args:
        gates: one or several ``FlatGates``, each a parameter group with settings of its own.
        lr, betas, eps, weight_decay: as in ``torch.optim.Adam``.
        anneal_rate: where given, every step also lowers the temperature so that the mean gate moves by at most that
            much through it (the adaptive schedule), and scales the learning rate by ``min(1, T / (20 lr))``.

    Raises:
        ValueError: a setting out of its range.
        TypeError: other parameters than ``FlatGates``.
    """

    def __init__(
        self,
        gates: FlatGates | Iterable[FlatGates],
        lr: float = LR,
        betas: tuple[float, float] = BETAS,
        eps: float = EPS,
        weight_decay: float = WEIGHT_DECAY,
        anneal_rate: float | None = None,
    ) -> None:
        if not (0 < lr < math.inf and 0 < eps < math.inf and 0 <= weight_decay < math.inf) or not all(
            0 <= beta < 1 for beta in betas
        ):
            raise ValueError(
                f"expected lr > 0, betas in [0, 1), eps > 0 and weight_decay >= 0, "
                f"got lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}"
            )
        if anneal_rate is not None and not 0 < anneal_rate < math.inf:
            raise ValueError(f"anneal_rate must be positive and finite, got {anneal_rate}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "anneal_rate": anneal_rate}
        super().__init__(gates, defaults)
        if anneal_rate is not None:
            for flat in self._gates.values():
                flat.measure_movement()

    def _step(self, flat: FlatGates, group: dict) -> None:
        state = self.state[flat.gated]
        annealing = group["anneal_rate"] is not None
        lr = torch.full((), group["lr"], dtype=torch.float32, device=flat.temperature.device)
        next_temperature = flat.temperature
        if annealing:
            lr = lr * (flat.temperature / (STEPS_OF_SCORES * group["lr"])).clamp_max(1)
            fall = (group["anneal_rate"] * flat.count / flat.movement).clamp_max(LARGEST_FALL)
            next_temperature = flat.temperature * torch.exp(-fall).float()
            flat.movement.zero_()
        state["step"] += 1
        next_draw = flat.draw
        if flat.kind.is_random:
            next_draw = flat.draw.clone()
            next_draw[1:2].add_(1)
        ops.gated_adam_step_(
            flat.gated.detach()[flat.own],
            flat.scores,
            state["exp_avg"],
            state["exp_avg_sq"],
            flat.movement,
            flat.weight[flat.own],
            flat.grad[flat.own],
            flat.temperature,
            next_temperature,
            state["step"],
            lr,
            flat.draw_from(flat.draw, flat.own.start),
            flat.draw_from(next_draw, flat.own.start),
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            int(flat.kind),
            annealing,
        )
        flat.temperature.copy_(next_temperature)
        flat.draw.copy_(next_draw)
        if annealing:
            flat.total_(flat.movement)

    def start(self) -> None:
        for flat in self._gates.values():
            self.state[flat.gated] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.scores.device),
                "exp_avg": torch.zeros_like(flat.scores),
                "exp_avg_sq": torch.zeros_like(flat.scores),
            }
