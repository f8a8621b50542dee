"""FFW as published, in plain PyTorch, to be read beside the paper: the oracle of the tests and the honest baseline.

Nothing is cached or fused: gates are evaluated in every forward pass, the private heads are refitted by one pass of
the whole network per head epoch, and every evaluation is a pass of its own. What it shares with ``ffw_fast.extract`` is
what must be equal: the gate's and the MI's formulas, the plateau rule, the schedules, seeds and orders of samples.
"""

import copy
import math
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from ffw_fast import bise, optim, philox
from ffw_fast import heads as private_heads
from ffw_fast.bottleneck import bottleneck_module
from ffw_fast.channels import ChannelGraph
from ffw_fast.copies import copy_of
from ffw_fast.data.samples import Samples, batches_of
from ffw_fast.extraction import Extraction, gated_tensors, masks_of, sparsity, weight_sparsity
from ffw_fast.flat_layout import flat_offsets
from ffw_fast.gates import GateKind, gate, gate_movement, gate_slope, half_open
from ffw_fast.inputs import Problem, check_device, prepare
from ffw_fast.measure import Measurement, measure
from ffw_fast.modes import training_modes
from ffw_fast.ops import joint_distribution, joint_information
from ffw_fast.plateau import Plateau
from ffw_fast.precision import passes_in
from ffw_fast.progress import Progress, make_progress
from ffw_fast.run_state import RunState
from ffw_fast.schedule import LARGEST_FALL, STEPS_OF_SCORES, judging_shift, make_schedule
from ffw_fast.seeding import GATE_ORDERS, HEAD_ORDERS, epoch_order
from ffw_fast.settings import Settings


@training_modes()
def extract(
    model: nn.Module,
    train: Any,
    val: Any,
    *,
    device: torch.device | str | None = None,
    run_dir: str | None = None,
    resume: bool = False,
    shard: bool = False,
    progress: bool | Progress = True,
    quirks: bool = False,
    **settings: Any,
) -> Extraction:
    """``ffw_fast.extract`` in plain PyTorch; see there for the arguments, the result and the errors.

    Args:
        run_dir: the result is saved there at the end. There are no checkpoints, so ``resume`` is refused.
        shard: without effect, since this runs on one process.
        quirks: measure the MI that drives the temperature against the target label, as the published code does where
            it pairs a head's output with ``labels[i]`` instead of ``labels[1 + i]``. BISE has no such code.
    """
    if resume:
        raise ValueError("the reference keeps no checkpoints and cannot resume; use ffw_fast.extract")
    checked = Settings.of(**settings)
    val_is_given = val is not None
    check_device(device)
    problem = prepare(model, train, val, checked)
    RunState(run_dir, {}, resume=False)  # a folder that cannot be written is refused before any work
    where = torch.device(device) if device is not None else next(model.parameters()).device
    problem = problem.to(where)
    run = Reference(problem, quirks=quirks) if checked.method == "ffw" else BiseReference(problem, selects=val_is_given)
    with make_progress(progress) as shown:
        extraction = run.run(shown)
    if run_dir is not None:
        extraction.save(run_dir)
    return extraction


class StraightThroughGate(torch.autograd.Function):
    """The gate of every score; backward as if it were the sigmoid behind it (the table in ``ffw_fast.gates``)."""

    @staticmethod
    def forward(ctx, scores: Tensor, kind: GateKind, temperature: Tensor, uniform: Tensor | None) -> Tensor:
        ctx.save_for_backward(scores, temperature, uniform)
        ctx.kind = kind
        return gate(kind, scores, temperature, uniform)

    @staticmethod
    def backward(ctx, grad: Tensor):
        scores, temperature, uniform = ctx.saved_tensors
        return grad * gate_slope(ctx.kind, scores, temperature, uniform), None, None, None


class Reference:
    """One extraction, step by step."""

    def __init__(self, problem: Problem, *, quirks: bool) -> None:
        settings, model, train, device = problem.settings, problem.model, problem.train, problem.device
        self.settings, self.train, self.val, self.quirks = settings, train, problem.val, quirks
        self.dense_model = model
        self.network = copy_of(model).to(device).eval().requires_grad_(False)
        self.weights = gated_tensors(self.network, settings)
        if settings.granularity == "channel":
            self.gate_channels(ChannelGraph(self.network, settings.where))
        bottleneck_module(self.network, settings.bottleneck).register_forward_hook(self.keep_features)
        self.scores = {name: torch.zeros_like(weight, requires_grad=True) for name, weight in self.weights.items()}
        self.temperature = torch.ones((), dtype=torch.float32, device=device)
        self.draws = 0
        self.heads = self.make_heads(train.b.shape[1], problem.width, device)
        self.scores_optimizer = self.make_scores_optimizer()
        self.heads_optimizer = make_heads_optimizer(self.heads)
        self.head_epochs = 0
        self.autocast = passes_in(settings.precision, device)

    def gate_channels(self, channels: ChannelGraph) -> None:
        """Let the non-linearities' outputs be multiplied by what ``self.gated`` holds of them."""
        channels.check_bottleneck(self.settings.bottleneck)
        self.network, sites = channels.explicit()
        for name, place in channels.places.items():
            self.network.get_submodule(sites[name]).register_forward_hook(
                lambda _module, _inputs, output, name=name, place=place: output * self.gated[name].view(place.shape)
            )

    def make_scores_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(list(self.scores.values()), optim.LR, optim.BETAS, optim.EPS, optim.WEIGHT_DECAY)

    def make_heads(self, count: int, width: int, device: torch.device) -> nn.ModuleList:
        classes = self.settings.num_bias_classes
        weights, biases = private_heads.initial_parameters(count, classes, width, self.settings.seed)
        heads = nn.ModuleList(nn.utils.skip_init(nn.Linear, width, classes, dtype=weights.dtype) for _ in range(count))
        for head, weight, bias in zip(heads, weights, biases, strict=True):
            head.load_state_dict({"weight": weight, "bias": bias})
        return heads.to(device)

    def keep_features(self, _module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        self.features = output.flatten(1)

    def run(self, progress: Progress) -> Extraction:
        settings = self.settings
        started = time.perf_counter()
        schedule = make_schedule(settings.schedule, settings.anneal_rate, optim.LR)
        metrics: dict[str, Any] = {"vanilla": self.fit_vanilla_heads()}
        vanilla_heads, vanilla_epochs = copy.deepcopy(self.heads), self.head_epochs
        best: Measurement | None = None
        best_scores = self.scores
        history: list[dict[str, Any]] = []

        def judge() -> Measurement:
            """The pruned network, with its own head; keep its scores where its bias accuracy is the lowest."""
            nonlocal best, best_scores
            shift = judging_shift(settings.kind, self.temperature.item(), schedule.anneals)
            scores = {name: score.detach() + shift for name, score in self.scores.items()}
            heads = copy.deepcopy(vanilla_heads)
            masks = masks_of(scores)
            resumed_epochs, self.head_epochs = self.head_epochs, vanilla_epochs
            self.fit_heads(heads, make_heads_optimizer(heads), masks)
            self.head_epochs = resumed_epochs
            judged = self.measure(heads, masks)
            removed = weight_sparsity(self.dense_model, settings, masks)
            metrics["pruned"] = {**judged.as_dict(), "weight_sparsity": removed}
            if best is None or judged.mean_bias_accuracy < best.mean_bias_accuracy:
                best, best_scores = judged, scores
                metrics["best"] = metrics["pruned"]
            return judged

        progress.stage("reference extraction", settings.max_epochs)
        while len(history) < settings.max_epochs and not schedule.has_ended(self.temperature.item()):
            epoch_started = time.perf_counter()
            row: dict[str, Any] = {"epoch": len(history) + 1, "temperature": self.temperature.item()}
            row |= self.train_epoch(len(history), schedule.anneals)
            row["head_epochs"] = self.fit_heads(self.heads, self.heads_optimizer)
            self.evaluate(self.train, self.heads)  # as published: every epoch, on all sets
            logits, head_logits, row["val_mi"] = self.evaluate(self.val, self.heads)
            on_validation = measure(logits, head_logits, self.val.y, self.val.b, 0.0)
            row["val_task_accuracy"] = on_validation.task_accuracy
            row["val_bias_accuracy"] = on_validation.bias_accuracy
            scores_now = [score.detach() for score in self.scores.values()]
            row["half_open"] = half_open(settings.kind, scores_now, self.temperature)

            before = self.temperature.item()
            after, due = schedule.after_epoch(before, row["val_mi"])
            if after != before:
                self.temperature.fill_(after)
            if due:
                judged = judge()
                row["pruned_task_accuracy"] = judged.task_accuracy
                row["pruned_bias_accuracy"] = judged.bias_accuracy
                if after != before and not schedule.has_ended(after):
                    self.fit_heads(self.heads, self.heads_optimizer)
            history.append({**row, "seconds": time.perf_counter() - epoch_started})
            progress.epoch(history[-1])

        if "pruned_task_accuracy" not in history[-1]:
            judge()
        shift = judging_shift(settings.kind, self.temperature.item(), schedule.anneals)
        scores = {name: score.detach() + shift for name, score in self.scores.items()}
        metrics |= {"epochs": len(history), "seconds": time.perf_counter() - started}
        input_shape = tuple(self.train.x.shape[1:])
        return Extraction(self.dense_model, settings, scores, best_scores, history, metrics, input_shape)

    def uniforms(self) -> dict[str, Tensor | None]:
        """Each layer's uniform numbers: one draw for each update of the scores."""
        if not self.settings.kind.is_random:
            return dict.fromkeys(self.scores)
        offsets = flat_offsets(score.numel() for score in self.scores.values())
        result: dict[str, Tensor | None] = {}
        for (name, score), offset in zip(self.scores.items(), offsets, strict=False):
            draw = philox.make_draw(self.settings.seed, self.draws, offset, score.device)
            result[name] = philox.uniform(score.numel(), draw).view(score.shape).to(score.dtype)
        return result

    def forward(self, x: Tensor, masks: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Features (n, D) and logits (n, C) of the gated network, or of the pruned one where masks are given."""
        kind, uniforms = self.settings.kind, self.uniforms()
        self.gated: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            if masks is not None:
                gates = masks[name].to(weight.dtype)
            else:
                gates = StraightThroughGate.apply(self.scores[name], kind, self.temperature, uniforms[name])
            self.gated[name] = weight * gates
        in_layers = self.gated if self.settings.granularity == "weight" else {}
        gated = {f"{name}.weight": weight for name, weight in in_layers.items()}
        with self.autocast:
            logits = functional_call(self.network, gated, (x,), tie_weights=False)
        return self.features.float(), logits.float()

    def information(self, head_logits: Tensor, b: Tensor) -> Tensor:
        """Mean MI over the heads, differentiable: logits (n, heads, K), labels (n, heads)."""
        return joint_information(joint_distribution(head_logits, b)).mean()

    def losses(self, logits: Tensor, y: Tensor, head_logits: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Task loss and mutual information of a minibatch."""
        return cross_entropy(logits, y), self.information(head_logits, b)

    def train_epoch(self, epoch: int, anneals: bool) -> dict[str, float]:
        """A step of Adam on the scores and of SGD on the heads for each minibatch."""
        settings, totals = self.settings, torch.zeros(3, dtype=torch.float64, device="cpu")
        rows = epoch_order(len(self.train.y), settings.seed, GATE_ORDERS, epoch)
        for x, y, b in self.train.batches(rows, settings.batch_size):
            features, logits = self.forward(x)
            task_loss, information = self.losses(logits, y, frozen_logits(self.heads, features), b)
            loss = settings.alpha * task_loss + settings.gamma * information

            self.scores_optimizer.zero_grad()
            loss.backward()
            self.heads_optimizer.zero_grad()
            heads_loss(self.heads, features.detach(), b).backward()
            if anneals:
                next_temperature = self.anneal()
            self.scores_optimizer.step()
            self.draws += 1
            self.heads_optimizer.step()
            if anneals:
                self.temperature.copy_(next_temperature)
            totals += totals.new_tensor([loss.item(), task_loss.item(), information.item()]) * len(y)
        return dict(zip(("loss", "cross_entropy", "train_mi"), (totals / len(rows)).tolist(), strict=True))

    @torch.no_grad()
    def anneal(self) -> Tensor:
        """The temperature after this step, by the movement of the gates of its forward pass; sets the scores' lr."""
        kind, uniforms = self.settings.kind, self.uniforms()
        movements = [
            gate_movement(kind, score, self.temperature, uniforms[name]).sum(dtype=torch.float64).item()
            for name, score in self.scores.items()
        ]
        mean = sum(movements) / sum(score.numel() for score in self.scores.values())
        fall = min(self.settings.anneal_rate / mean, LARGEST_FALL) if mean > 0 else LARGEST_FALL
        for group in self.scores_optimizer.param_groups:
            group["lr"] = optim.LR * min(1.0, self.temperature.item() / (STEPS_OF_SCORES * optim.LR))
        return self.temperature * math.exp(-fall)

    def fit_heads(
        self, heads: nn.ModuleList, optimizer: torch.optim.SGD, masks: dict[str, Tensor] | None = None
    ) -> int:
        """Fit heads to a plateau: one forward pass of the network per head epoch. Epochs it took."""
        plateau = Plateau(private_heads.PLATEAU_THRESHOLD, private_heads.PLATEAU_PATIENCE)
        start, train = self.head_epochs, self.drawn()
        while self.head_epochs - start < private_heads.MAX_EPOCHS:
            if plateau.reached(self.head_epoch(train, heads, optimizer, masks)):
                break
        return self.head_epochs - start

    def fit_vanilla_heads(self) -> dict[str, Any]:
        """Fit the heads on the biased network, before the scores have left 0; what is measured of it."""
        whole = self.masks()  # random gates would be closed here and there
        self.fit_heads(self.heads, self.heads_optimizer, whole)
        return {**self.measure(self.heads, whole).as_dict(), "weight_sparsity": 0.0}

    def masks(self) -> dict[str, Tensor]:
        """What pruning keeps by the scores as they are."""
        return masks_of({name: score.detach() for name, score in self.scores.items()})

    def head_order(self) -> Tensor:
        """The order of the next head epoch."""
        return epoch_order(len(self.train.y), self.settings.seed, HEAD_ORDERS, self.head_epochs)

    def drawn(self) -> Samples:
        """What the heads learn from until they are fitted again: the training set, or one draw of it."""
        if not (self.train.augments and self.settings.cache_augmented):
            return self.train
        stream, y, b = self.train.in_order(self.head_order())
        return Samples(stream[:], y, b)

    def head_epoch(
        self,
        train: Samples,
        heads: nn.ModuleList,
        optimizer: torch.optim.SGD,
        masks: dict[str, Tensor] | None = None,
    ) -> float:
        """One pass over the training set, through the whole network; the mean loss of a head."""
        rows = self.head_order()
        self.head_epochs += 1
        total = 0.0
        for x, _y, b in train.batches(rows, self.settings.batch_size):
            with torch.no_grad():
                features, _logits = self.forward(x, masks)
            optimizer.zero_grad()
            loss = heads_loss(heads, features, b)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(b)
        return total / len(rows) / len(heads)

    @torch.no_grad()
    def evaluate(
        self, samples: Samples, heads: nn.ModuleList, masks: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, float]:
        """Logits, head logits, and the mean MI over minibatches, in one pass over a set."""
        labels = samples.y.unsqueeze(1).expand_as(samples.b) if self.quirks else samples.b
        logits, head_logits, information = [], [], []
        size = self.settings.batch_size
        for x, b in zip(batches_of(samples.x, size), labels.split(size), strict=True):
            features, batch_logits = self.forward(x, masks)
            logits.append(batch_logits)
            head_logits.append(frozen_logits(heads, features))
            information.append(self.information(head_logits[-1], b).item())
        return torch.cat(logits), torch.cat(head_logits), sum(information) / len(information)

    def measure(self, heads: nn.ModuleList, masks: dict[str, Tensor] | None = None) -> Measurement:
        logits, head_logits, _ = self.evaluate(self.val, heads, masks)
        return measure(logits, head_logits, self.val.y, self.val.b, 0.0 if masks is None else sparsity(masks))


class BiseReference(Reference):
    """One extraction by BISE, step by step.

    Args:
        selects: whether ``val`` is an unbiased set of its own, by which the best scores are chosen.
    """

    def __init__(self, problem: Problem, *, selects: bool) -> None:
        super().__init__(problem, quirks=False)
        self.selects = selects
        with torch.no_grad():
            _features, logits = self.forward(self.train.x[:1].clone())
        self.objective = bise.BiasedObjective.from_settings(self.settings, self.train, logits.shape[1])

    def make_scores_optimizer(self) -> torch.optim.Optimizer:
        scores = list(self.scores.values())
        return torch.optim.SGD(scores, bise.SCORES_LR, bise.MOMENTUM, weight_decay=bise.WEIGHT_DECAY)

    def losses(self, logits: Tensor, y: Tensor, head_logits: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Reweighted cross-entropy, and the sum of the MI of each bias over the samples that conflict with it."""
        weighted = (self.objective.weights(y, b) * cross_entropy(logits, y, reduction="none")).mean()
        information = torch.zeros((), dtype=torch.float32, device=y.device)
        for head in range(b.shape[1]):
            rows = b[:, head] != self.objective.aligned[y]
            if rows.any():
                joint = joint_distribution(head_logits[rows, head : head + 1], b[rows, head : head + 1])
                information = information + joint_information(joint).sum()
        return weighted, information

    def fit_heads(
        self, heads: nn.ModuleList, optimizer: torch.optim.SGD, masks: dict[str, Tensor] | None = None
    ) -> int:
        """A fixed number of epochs, each one pass of the network."""
        train = self.drawn()
        for _ in range(bise.HEAD_EPOCHS):
            self.head_epoch(train, heads, optimizer, masks)
        return bise.HEAD_EPOCHS

    def run(self, progress: Progress) -> Extraction:
        settings = self.settings
        started = time.perf_counter()
        schedule = make_schedule(settings.schedule, settings.anneal_rate, bise.SCORES_LR)
        metrics: dict[str, Any] = {"vanilla": self.fit_vanilla_heads()}
        best: Measurement | None = None
        best_scores = self.scores
        history: list[dict[str, Any]] = []
        progress.stage("reference extraction", settings.max_epochs)
        while len(history) < settings.max_epochs and not schedule.has_ended(self.temperature.item()):
            epoch_started = time.perf_counter()
            temperature = self.temperature.item()
            row: dict[str, Any] = {"epoch": len(history) + 1, "temperature": temperature}
            row |= self.train_epoch(len(history), anneals=False)
            lower, falls = schedule.after_epoch(temperature, 0.0)
            if falls:
                self.temperature.fill_(lower)
                row["head_epochs"] = self.fit_heads(self.heads, self.heads_optimizer, self.masks())
            if self.selects:
                judged = self.measure(self.heads, self.masks())
                if best is None or judged.task_accuracy > best.task_accuracy:
                    best, best_scores = judged, {name: score.detach().clone() for name, score in self.scores.items()}
                row["val_mi"] = sum(judged.bias_mi) / len(judged.bias_mi)
                row |= {"val_task_accuracy": judged.task_accuracy, "val_bias_accuracy": judged.bias_accuracy}
            history.append({**row, "seconds": time.perf_counter() - epoch_started})
            progress.epoch(history[-1])

        scores = {name: score.detach().clone() for name, score in self.scores.items()}
        last = self.measure(self.heads, self.masks())
        if best is None:
            best, best_scores = last, scores
        for name, judged, kept in (("pruned", last, scores), ("best", best, best_scores)):
            removed = weight_sparsity(self.dense_model, settings, masks_of(kept))
            metrics[name] = {**judged.as_dict(), "weight_sparsity": removed}
        metrics |= {"selection": bise.selection(self.selects), "measured_on": "val" if self.selects else "train"}
        metrics |= {"epochs": len(history), "seconds": time.perf_counter() - started}
        input_shape = tuple(self.train.x.shape[1:])
        return Extraction(self.dense_model, settings, scores, best_scores, history, metrics, input_shape)


def make_heads_optimizer(heads: nn.ModuleList) -> torch.optim.SGD:
    return torch.optim.SGD(
        heads.parameters(), private_heads.LR, private_heads.MOMENTUM, weight_decay=private_heads.WEIGHT_DECAY
    )


def frozen_logits(heads: nn.ModuleList, features: Tensor) -> Tensor:
    """Logits (n, heads, K): gradients reach the features, never the heads' own parameters."""
    values = [[value.detach() for value in head.parameters()] for head in heads]
    return torch.stack([features @ weight.T + bias for weight, bias in values], dim=1)


def heads_loss(heads: nn.ModuleList, features: Tensor, b: Tensor) -> Tensor:
    """Sum of the heads' cross-entropies on features (n, D) and bias labels (n, heads)."""
    return torch.stack([cross_entropy(head(features), labels) for head, labels in zip(heads, b.T, strict=True)]).sum()
