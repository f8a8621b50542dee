"""One extraction under way by BISE: what it does otherwise than FFW's loop."""

import time
from typing import Any

from torch import Tensor

from ffw_fast import bise, cautions
from ffw_fast.extraction import masks_of, weight_sparsity
from ffw_fast.inputs import Problem
from ffw_fast.loop import Loop
from ffw_fast.measure import Measurement
from ffw_fast.objective import Objective
from ffw_fast.optim import GatedOptimizer, GatedSGD


class BiseLoop(Loop):
    """An extraction by BISE: SGD on the biased set's own objective, heads fitted when T falls, on the pruned network.

    Args:
        selects: whether ``val`` is an unbiased set, by which the best scores are chosen; else it is the training set.
    """

    def __init__(self, problem: Problem, *, selects: bool) -> None:
        super().__init__(problem)
        self.selects = selects
        self.heads.epochs_a_fit = bise.HEAD_EPOCHS
        _features, logits = self.network.outputs(self.train.x[:1])
        self.objective = bise.BiasedObjective.from_settings(self.settings, self.train, logits.shape[1])

    def _make_optimizer(self) -> GatedOptimizer:
        return GatedSGD(self.gates, bise.SCORES_LR, bise.MOMENTUM, bise.WEIGHT_DECAY)

    def _objective(self, logits: Tensor, y: Tensor, head_logits: Tensor, b: Tensor) -> Objective:
        return self.objective(logits, y, head_logits, b)

    def epoch(self) -> None:
        started = time.perf_counter()
        temperature = self.gates.temperature.item()
        row = {"epoch": len(self.history) + 1, "temperature": temperature, **self.train_gates()}
        lower, falls = self.schedule.after_epoch(temperature, 0.0)
        if falls:
            self.gates.set_temperature(lower)
            with self.gates.pruned():
                row["head_epochs"] = self.refit(self.heads)
        if self.selects:
            row |= self._select()
        elapsed = time.perf_counter() - started
        self.seconds += elapsed
        self.history.append({**row, "seconds": elapsed})

    def _scores(self) -> Tensor:
        """A copy of all scores as they are."""
        return self.network.over_all(self.gates.scores).clone()

    def _judged(self) -> Measurement:
        """The pruned network by the heads as they are."""
        with self.gates.pruned():
            return self._measure(self.heads, self.gates.sparsity())

    def _select(self) -> dict[str, Any]:
        """Keep the scores of the pruned network with the highest task accuracy, the earliest of equals."""
        judged = self._judged()
        if self.best is None or judged.task_accuracy > self.best.task_accuracy:
            self.best, self.best_scores = judged, self._scores()
        return {
            "val_mi": sum(judged.bias_mi) / len(judged.bias_mi),
            "val_task_accuracy": judged.task_accuracy,
            "val_bias_accuracy": judged.bias_accuracy,
        }

    def _finish(self) -> None:
        started = time.perf_counter()
        last = self._judged()
        if not self.selects:
            self.best, self.best_scores = last, self._scores()
        assert self.best is not None
        for name, judged, scores in (("pruned", last, self._scores()), ("best", self.best, self.best_scores)):
            removed = weight_sparsity(self.dense_model, self.settings, masks_of(self._layers(scores)))
            self.metrics[name] = {**judged.as_dict(), "weight_sparsity": removed}
        self.metrics["selection"] = bise.selection(self.selects)
        self.metrics["measured_on"] = "val" if self.selects else "train"
        self._warn(cautions.of_schedule(self.schedule, self.gates, len(self.history)))
        self.seconds += time.perf_counter() - started
