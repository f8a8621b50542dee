"""One extraction under way by FFW: gates trained, heads refitted, T lowered, pruned networks judged, epoch by epoch."""

import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from ffw_fast import cautions
from ffw_fast.convolutions import repeatable_convolutions
from ffw_fast.convolutions.fft import memory_of_steps
from ffw_fast.data.samples import Inputs
from ffw_fast.distributed import Alone
from ffw_fast.extraction import Extraction, masks_of, weight_sparsity
from ffw_fast.failures import first_bad_step, memory_errors_explained
from ffw_fast.gated_network import GatedNetwork
from ffw_fast.heads import PrivateHeads
from ffw_fast.inputs import Problem
from ffw_fast.measure import Measurement, accuracy, measure, minibatch_information
from ffw_fast.objective import Objective
from ffw_fast.optim import LR, GatedAdam, GatedOptimizer
from ffw_fast.precision import passes_in
from ffw_fast.progress import Progress
from ffw_fast.run_state import RunState
from ffw_fast.schedule import Schedule, judging_shift, make_schedule, restore_schedule
from ffw_fast.seeding import GATE_ORDERS, epoch_order
from ffw_fast.step_graph import StepGraph

EXAMPLES = 8  # samples on which simplifications of the network are checked
SHARED_GATE_STATE = ("temperature", "draw", "movement")
HEAD_STATE = ("weight", "bias", "weight_momentum", "bias_momentum")


class Loop:
    """One extraction under way: network, heads, optimizer and schedule, and what has been found so far."""

    def __init__(self, problem: Problem, group: Alone | None = None) -> None:
        settings, model, train, device = problem.settings, problem.model, problem.train, problem.device
        self.settings = settings
        self.group = group or Alone()
        self.train, self.val = train, problem.val
        self.input_shape = tuple(train.x.shape[1:])  # before the frozen part is taken out
        self.autocast = passes_in(settings.precision, device, cache_enabled=False)
        self.dense_model = model
        self.network = GatedNetwork(
            model,
            settings.bottleneck,
            settings.kind,
            settings.seed,
            train.x[:EXAMPLES],
            settings.granularity,
            settings.where,
            self.group,
        )
        self.gates = self.network.gates
        self.schedule: Schedule = make_schedule(settings.schedule, settings.anneal_rate, LR)
        self.optimizer = self._make_optimizer()
        self.optimizer.start()  # so that a checkpoint has the same tensors from the beginning
        self.heads = PrivateHeads.of(settings, train, problem.width)
        self.vanilla_heads = self.heads
        self.best_scores = self.network.over_all(self.gates.scores)  # until the first judgement
        self.metrics: dict[str, Any] = {"warnings": []}
        self.best: Measurement | None = None
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.totals = torch.zeros(3, dtype=torch.float64, device=train.y.device)  # of (J, CE, MI) over an epoch
        step = WeakMethod(self.counted_step)  # so that all memory is free at once when the loop is
        self.step_graph = StepGraph(lambda *told: step()(*told), settings.batch_size, train.y.device)  # type: ignore[misc]

    def _make_optimizer(self) -> GatedOptimizer:
        return GatedAdam(self.gates, anneal_rate=self.settings.anneal_rate if self.schedule.anneals else None)

    def run(self, state: RunState, progress: Progress) -> None:
        """All epochs, from the start or from the checkpoint that the state holds."""
        progress.stage("extraction", self.settings.max_epochs)
        device = self.gates.scores.device
        explained = memory_errors_explained("the extraction", self.settings.batch_size, device)
        with explained, repeatable_convolutions(), memory_of_steps():
            examples = self.train.x[:EXAMPLES]
            doubts = list(cautions.of_bottleneck(self.network.module, self.settings.bottleneck, examples))
            self._take_out_frozen_part()
            if self.group.told(self.group.together(lambda: state.restore(self))):
                self.group.share(self, state)
                self.gates.spread()
                progress.note(self._resumed_note())
            else:
                self.start()
                self._warn(doubts)
                state.keep(self)
            while len(self.history) < self.settings.max_epochs and not self.has_ended():
                try:
                    self.epoch()
                except FloatingPointError as error:
                    raise FloatingPointError(f"{error}; {self._where_it_began(state)}") from error
                state.save(self)
                progress.epoch(self.history[-1])
            self._finish()

    def _where_it_began(self, state: RunState) -> str:
        """Runs the epoch again from the last good state, which is what the checkpoint keeps."""
        assert state.last is not None
        state.last.load_into(self)
        self.gates.spread()
        steps = (self._step(*self._minibatch(*batch)) for batch in self.batches())
        return first_bad_step(steps, self.network.module, self.gates, self.heads, self.group)

    def _warn(self, doubts: Iterable[str]) -> None:
        for text in doubts:
            self.metrics["warnings"].append(text)
            if self.group.rank == 0:
                warnings.warn(text, stacklevel=2)

    def _take_out_frozen_part(self) -> None:
        """Run what lies before the first channel gate once for all."""
        with self.autocast:
            train, val = self.network.take_out_frozen_part(self.train.x, self.val.x)
        self.train, self.val = self.train._replace(x=train), self.val._replace(x=val)

    def has_ended(self) -> bool:
        """Whether the schedule has, however many epochs may still be run."""
        return self.schedule.has_ended(self.gates.temperature.item())

    def start(self) -> None:
        """Fit the heads on the biased network; the pruned networks' heads start from these."""
        started = time.perf_counter()
        if self.schedule.anneals:
            self.gates.total_(self.gates.movement)
        with self.gates.pruned():  # of nothing, as all scores are 0; a random gate would be closed here and there
            self.refit(self.heads)
            vanilla = self._measure(self.heads, sparsity=0.0)
        self.vanilla_heads = self.heads.with_fresh_optimizer()
        self.metrics["vanilla"] = {**vanilla.as_dict(), "weight_sparsity": 0.0}
        self._warn(cautions.of_settings(self.settings))
        self._warn(cautions.of_layers(self.dense_model))
        self._warn(cautions.of_vanilla(vanilla, self.val.y, self.val.b))
        self.seconds += time.perf_counter() - started

    def epoch(self) -> None:
        """One epoch of gates and heads, and what the schedule does at its end; adds a row to the history."""
        started = time.perf_counter()
        temperature = self.gates.temperature.item()
        row = {"epoch": len(self.history) + 1, "temperature": temperature, **self.train_gates()}
        row["head_epochs"] = self.refit(self.heads)
        row |= self._validate()
        row["half_open"] = self.gates.half_open()
        row |= self._end_epoch(row["val_mi"])
        elapsed = time.perf_counter() - started
        self.seconds += elapsed
        self.history.append({**row, "seconds": elapsed})

    def train_gates(self) -> dict[str, float]:
        """One pass over the training set: a step of the scores and of the heads for each minibatch."""
        self.totals.zero_()
        for batch in self.batches():
            self.step_graph(*batch)
        loss, cross_entropy, information = (self.totals / len(self.train.y)).tolist()  # the one read of an epoch
        if not self.gates.are_finite() or not torch.isfinite(self.totals).all():
            raise FloatingPointError(f"a loss or a score is no longer finite in epoch {len(self.history) + 1}")
        return {"loss": loss, "cross_entropy": cross_entropy, "train_mi": information}

    def batches(self) -> Iterator[tuple[Tensor, ...]]:
        """What the steps of the next epoch are told: the rows of a minibatch, or its (x, y, b), x of this process.

        Rows are enough where a step can read them itself, which on a GPU is part of the graph.
        """
        order = epoch_order(len(self.train.y), self.settings.seed, GATE_ORDERS, len(self.history))
        if self.group.count == 1 and self.train.are_at_hand:
            return ((rows,) for rows in order.to(self.train.y.device).split(self.settings.batch_size))
        return self.group.batches(self.train, order, self.settings.batch_size)

    def _minibatch(self, *told: Tensor) -> tuple[Tensor, ...]:
        """(x, y, b) of a minibatch."""
        return self.train.at(*told) if len(told) == 1 else told

    def counted_step(self, *told: Tensor) -> None:
        """One minibatch; adds its losses to the totals. Nothing is read back."""
        x, y, b = self._minibatch(*told)
        self.totals.add_(self._step(x, y, b), alpha=len(y))

    def _step(self, x: Tensor, y: Tensor, b: Tensor) -> Tensor:
        """One minibatch, of which this process has the inputs x; (J, CE, MI) before the step."""
        self.optimizer.zero_grad()
        with self.autocast:
            features, logits = self.network(x)
        features, logits = features.float(), logits.float()
        found = self._objective(logits, y, self.heads.logits(features.detach()), b)
        found.backward(logits, features, self.heads)
        if self.network.gradient_sum is not None:
            self.network.gradient_sum.finish()
        self.heads.step(self.group.rows(features.detach(), len(b)), b)
        self.optimizer.step()
        return found.losses

    def _objective(self, logits: Tensor, y: Tensor, head_logits: Tensor, b: Tensor) -> Objective:
        """J of one minibatch."""
        return self.group.objective(logits, y, head_logits, b, self.settings.alpha, self.settings.gamma)

    def refit(self, heads: PrivateHeads) -> int:
        """Fit heads to a plateau on the features of the network as it is now. Epochs it took."""
        epochs = heads.fit_on(self.train, self.features, self.settings.cache_augmented)
        self.group.copy_(*(getattr(heads, name) for name in HEAD_STATE))
        return epochs

    def features(self, x: Inputs) -> Tensor:
        """float32 features (n, D) of all samples, of which each process runs its part."""
        with self.autocast:
            features = self.network.features(self.group.part(x))
        return self.group.rows(features.float(), len(x))

    def _outputs(self, heads: PrivateHeads) -> tuple[Tensor, Tensor]:
        """Logits (n, C) and head logits (n, heads, K) on the validation set."""
        with self.autocast:
            features, logits = self.network.outputs(self.group.part(self.val.x))
        features, logits = (self.group.rows(part.float(), len(self.val.y)) for part in (features, logits))
        return logits, heads.logits(features)

    def _measure(self, heads: PrivateHeads, sparsity: float) -> Measurement:
        return measure(*self._outputs(heads), self.val.y, self.val.b, sparsity)

    def _validate(self) -> dict[str, Any]:
        logits, head_logits = self._outputs(self.heads)
        return {
            "val_mi": self.group.told(minibatch_information(head_logits, self.val.b, self.settings.batch_size)),
            "val_task_accuracy": accuracy(logits, self.val.y).item(),
            "val_bias_accuracy": accuracy(head_logits, self.val.b).tolist(),
        }

    def _end_epoch(self, validation_mi: float) -> dict[str, Any]:
        """Let the schedule lower T; where the pruned network is due, judge it; refit the heads at a new T."""
        before = self.gates.temperature.item()
        after, due = self.schedule.after_epoch(before, validation_mi)
        if after != before:
            self.gates.set_temperature(after)
        if not due:
            return {}
        judged = self.judge()
        if after != before and not self.has_ended():
            self.refit(self.heads)
        return {"pruned_task_accuracy": judged.task_accuracy, "pruned_bias_accuracy": judged.bias_accuracy}

    def judge(self) -> Measurement:
        """Measure the pruned network with heads of its own, and keep its scores if its bias accuracy is the lowest."""
        temperature = self.gates.temperature.item()
        shift = judging_shift(self.settings.kind, temperature, self.schedule.anneals)
        heads = self.vanilla_heads.with_fresh_optimizer()
        with self.gates.pruned(shift):
            self.refit(heads)
            judged = self._measure(heads, self.gates.sparsity(shift))
        removed = judged.sparsity
        if self.settings.granularity == "channel":
            masks = masks_of(self.gates.views(self.gates.whole(self.gates.scores + shift)))
            removed = weight_sparsity(self.dense_model, self.settings, masks)
        self.metrics["pruned"] = {**judged.as_dict(), "weight_sparsity": removed}
        if self.best is None or judged.mean_bias_accuracy < self.best.mean_bias_accuracy:
            own = self.best_scores if self.best is not None else None
            self.best, self.best_scores = judged, torch.add(self.network.over_all(self.gates.scores), shift, out=own)
            self.metrics["best"] = self.metrics["pruned"]
        return judged

    def _finish(self) -> None:
        """Judge the last scores, unless the last epoch has done so."""
        started = time.perf_counter()
        if "pruned_task_accuracy" not in self.history[-1]:
            self.judge()
        self._warn(cautions.of_gates(self.gates, self.optimizer.state[self.gates.gated]["exp_avg_sq"]))
        self._warn(cautions.of_schedule(self.schedule, self.gates, len(self.history)))
        steps = len(self.history) * self.settings.steps_of(len(self.train.y))
        self._warn(cautions.of_annealing(self.schedule, self.gates.temperature.item(), steps))
        self.seconds += time.perf_counter() - started

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the rest of the run depends on; orders are drawn anew from the seed and the epoch."""
        own = {name: self.gates.to_first(tensor) for name, tensor in self._own_state().items()}
        tensors = {**own, **self._shared_state()}
        record = {
            "schedule": asdict(self.schedule),
            "head_epochs": [self.heads.epochs, self.vanilla_heads.epochs],
            "best": self.best and self.best.as_dict(),
            "metrics": self.metrics,
            "history": self.history,
            "seconds": self.seconds,
            "processes": self.group.count,
        }
        return tensors, record

    def forms(self) -> dict[str, tuple[torch.dtype, torch.Size]]:
        """Of the tensors that ``state`` gives on the first process."""
        whole = torch.Size([self.network.layout.length])
        return {
            **{name: (tensor.dtype, whole) for name, tensor in self._own_state().items()},
            **{name: (tensor.dtype, tensor.shape) for name, tensor in self._shared_state().items()},
        }

    def _own_state(self) -> dict[str, Tensor]:
        """What each process keeps of its own gates."""
        optimizer = self.optimizer.state[self.gates.gated]
        moments = {f"optimizer.{name}": value for name, value in optimizer.items() if value.dim() > 0}
        own = {"scores": self.gates.scores, **moments}
        return {name: self.network.over_all(value) for name, value in own.items()} | {"best_scores": self.best_scores}

    def _shared_state(self) -> dict[str, Tensor]:
        """What all processes keep, the same."""
        optimizer = self.optimizer.state[self.gates.gated]
        return {
            **{name: getattr(self.gates, name) for name in SHARED_GATE_STATE},
            **{f"optimizer.{name}": value for name, value in optimizer.items() if value.dim() == 0},
            **{f"heads.{name}": getattr(self.heads, name) for name in HEAD_STATE},
            **{f"vanilla_heads.{name}": getattr(self.vanilla_heads, name) for name in HEAD_STATE},
        }

    def load_state(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Continue from what ``state`` gave, on any process. The gated weights are computed of the own gates alone."""
        done = len(record["history"])
        if done > self.settings.max_epochs:
            raise ValueError(f"it holds {done} epochs, more than max_epochs={self.settings.max_epochs}")
        for name in SHARED_GATE_STATE:
            getattr(self.gates, name).copy_(tensors[name])
        self.gates.scores.copy_(self._kept(tensors["scores"]))
        self.gates.refresh_own()
        for name, value in self.optimizer.state[self.gates.gated].items():
            found = tensors[f"optimizer.{name}"]
            value.copy_(self._kept(found) if value.dim() > 0 else found)
        self.vanilla_heads = self.heads.with_fresh_optimizer()
        for prefix, heads, epochs in zip(
            ("heads", "vanilla_heads"), (self.heads, self.vanilla_heads), record["head_epochs"], strict=True
        ):
            heads.epochs = epochs
            for name in HEAD_STATE:
                getattr(heads, name).copy_(tensors[f"{prefix}.{name}"])
        self.best_scores = self.gates.kept(tensors["best_scores"]).to(self.gates.scores.device, copy=True)
        self.schedule = restore_schedule(self.schedule, record["schedule"])
        self.best = record["best"] and Measurement(**record["best"])
        self.metrics, self.history, self.seconds = record["metrics"], record["history"], record["seconds"]
        self.processes_before = record["processes"]

    def _kept(self, state: Tensor) -> Tensor:
        """What this process keeps, of the gates that it trains, of a buffer that ``state`` gave."""
        return self.gates.kept(self.network.over_trained(state))

    def _resumed_note(self) -> str | None:
        """What changes where the run goes on with another number of processes."""
        before, now = self.processes_before, self.group.count
        if before == now:
            return None
        return f"goes on with {now} processes where {before} were: the same scores within the rounding of float sums"

    def extraction(self, model: nn.Module) -> Extraction:
        """What was found, for the model that it was found in."""
        shift = judging_shift(self.settings.kind, self.gates.temperature.item(), self.schedule.anneals)
        return Extraction(
            dense_model=model,
            settings=self.settings,
            scores=self._layers(self.gates.whole(self.network.over_all(self.gates.scores) + shift)),
            best_scores=self._layers(self.gates.whole(self.best_scores)),
            history=self.history,
            metrics={**self.metrics, "epochs": len(self.history), "seconds": self.seconds},
            input_shape=self.input_shape,
        )

    def _layers(self, scores: Tensor) -> dict[str, Tensor]:
        return {name: view.clone() for name, view in self.network.layout.views(scores).items()}
