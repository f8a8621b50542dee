"""Training of the vanilla network: ordinary cross-entropy on the biased set, before any debiasing."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ffw_fast.convolutions import cheapest_convolutions
from ffw_fast.data.augmentation import crop_at_random, flip_at_random
from ffw_fast.data.pixels import Pixels
from ffw_fast.data.samples import EVALUATION_BATCH, Samples, batches_of
from ffw_fast.files import DamagedFileError
from ffw_fast.modes import training_modes
from ffw_fast.precision import check_precision, passes_in
from ffw_fast.run_state import OtherRunError, Resumable, RunState
from ffw_fast.seeding import epoch_order, seeded_generator

PATIENCE = 10  # epochs without a new lowest validation loss, of the "plateau" schedule
COOLDOWN = 5  # epochs after a cut in which none is counted
# What a checkpoint keeps of PyTorch's optimizers and of its scheduler, by PyTorch's names.
OPTIMIZER_STATE = {"sgd": ("momentum_buffer",), "adam": ("step", "exp_avg", "exp_avg_sq")}
PLATEAU_STATE = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch", "_last_lr")


@dataclass(frozen=True)
class Recipe:
    """How to train a vanilla network (Table 8 of the FFW paper and the published code)."""

    optimizer: Literal["sgd", "adam"]
    lr: float
    batch_size: int
    epochs: int
    momentum: float = 0.9  # of SGD
    weight_decay: float = 1e-4  # added to the gradient, for Adam too
    schedule: Literal["steps", "cosine", "plateau"] = "steps"  # how the learning rate falls; see ``learning_rate``
    milestones: tuple[float, ...] = ()  # of "steps": when it is cut, as fractions of all epochs
    lr_cut: float = 0.1  # of "steps" and "plateau": the factor it is cut by
    lr_end: float = 0.0  # of "plateau": training ends where the learning rate has fallen below
    flips: bool = False  # mirror images at random
    crop_padding: int = 0  # pad images by so many black pixels and cut them to their size again at a random place

    def __post_init__(self) -> None:
        if self.optimizer not in ("sgd", "adam"):
            raise ValueError(f"unknown optimizer {self.optimizer!r}; known: 'sgd', 'adam'")
        if self.schedule not in ("steps", "cosine", "plateau"):
            raise ValueError(f"unknown schedule {self.schedule!r}; known: 'steps', 'cosine', 'plateau'")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {self.lr!r}")
        if self.batch_size < 1 or self.epochs < 0:
            raise ValueError(
                f"batch_size must be at least 1 and epochs at least 0, got {self.batch_size} and {self.epochs}"
            )
        if not all(0 <= milestone <= 1 for milestone in self.milestones):
            raise ValueError(f"milestones must be fractions of all epochs (0 to 1), got {self.milestones}")

    @property
    def augments(self) -> bool:
        return self.flips or self.crop_padding > 0

    def learning_rate(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0, before it is cut on plateaus.

        "steps" cuts it at the milestones, "cosine" lets it fall to 0 along half a cosine, and "plateau" leaves it to
        the validation loss: cut after more than 10 epochs without a new lowest one, then 5 epochs of rest.
        """
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        cuts = sum(epoch >= round(milestone * self.epochs, 6) for milestone in self.milestones)  # 0.55 of 100 is 55
        return self.lr * self.lr_cut**cuts

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of every parameter that asks for a gradient."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, self.lr, weight_decay=self.weight_decay, fused=True)
        return torch.optim.SGD(parameters, self.lr, momentum=self.momentum, weight_decay=self.weight_decay, fused=True)


@training_modes()
def train_vanilla(
    model: nn.Module,
    samples: Samples,
    recipe: Recipe,
    *,
    seed: int,
    device: torch.device | str | None = None,
    precision: str = "fp32",
    val: Samples | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
    state: RunState | None = None,
) -> nn.Module:
    """Trains ``model`` in place and returns it in eval mode.

    Args:
        model: from ``samples.x`` to logits (n, classes).
        samples: the biased training set; it is moved to the device once, as a whole.
        recipe: optimizer, learning rate and their like.
        seed: of the order of the samples; the global generator is left alone.
        device: where to train, and where the model is afterwards; None for where it is.
        precision: "bf16" runs the network under autocast, with weights and their updates in float32. On a
            processor without bf16 instructions that is many times slower than "fp32".
        val: where the loss is measured after every epoch of a "plateau" schedule.
        on_epoch: called after every epoch with the number of epochs done and the mean training loss; also where the
            training goes on from a checkpoint.
        state: checkpoints that the training goes on from, to the same bits, and that it leaves; None for none. Where
            they belong to another training, or none is whole, a warning says so and it begins anew.

    Raises:
        FloatingPointError: the loss is no longer finite.
        ValueError, TypeError: a recipe that the samples do not fit, or that needs ``val``.
    """
    check_precision(precision)
    if len(samples.x) != len(samples.y) or len(samples.y) == 0:
        raise ValueError(
            f"expected as many inputs as labels and at least one of each, got {len(samples.x)} and {len(samples.y)}"
        )
    device = torch.device(device) if device is not None else next(model.parameters()).device
    training = _Training(model.to(device).train(), samples.to(device), recipe, seed, precision, val)
    if state is not None and _goes_on(training, state) and on_epoch is not None:
        on_epoch(training.epochs, training.loss)
    with cheapest_convolutions(model, training.samples.x[:2]):
        while not training.has_ended:
            training.train_epoch()
            if state is not None:
                state.save(training)
            if on_epoch is not None:
                on_epoch(training.epochs, training.loss)
    return model.eval()


def _goes_on(training: "_Training", state: RunState) -> bool:
    """Whether there was a checkpoint to go on from."""
    try:
        return state.restore(training)
    except (DamagedFileError, OtherRunError) as error:  # before anything was loaded
        warnings.warn(f"{error}; the biased network is trained from the beginning", stacklevel=3)
        return False


class _Training(Resumable):
    """A training under way: the network, its optimizer, and how far they are."""

    def __init__(
        self, model: nn.Module, samples: Samples, recipe: Recipe, seed: int, precision: str, val: Samples | None
    ) -> None:
        self.model, self.samples, self.recipe, self.seed, self.precision = model, samples, recipe, seed, precision
        self.optimizer = recipe.build_optimizer(model)
        self.plateau = _Plateau(recipe, model, val, self.optimizer, precision) if recipe.schedule == "plateau" else None
        self.epochs, self.loss = 0, math.nan  # done, and of the last one

    @property
    def has_ended(self) -> bool:
        return self.epochs >= self.recipe.epochs or (self.plateau is not None and self.plateau.has_ended)

    def train_epoch(self) -> None:
        recipe, epoch = self.recipe, self.epochs
        if self.plateau is None:
            self.optimizer.param_groups[0]["lr"] = recipe.learning_rate(epoch)
        order = epoch_order(len(self.samples.y), self.seed, "vanilla batches", epoch)
        augmentation = seeded_generator(self.seed, f"vanilla augmentation {epoch}")
        batches = _batches(self.samples, order, recipe, augmentation)
        self.loss = _train_epoch(self.model, batches, self.optimizer, self.precision)
        if not math.isfinite(self.loss):
            raise FloatingPointError(
                f"the vanilla network's training loss is {self.loss} in epoch {epoch + 1} of {recipe.epochs} "
                f"({recipe.optimizer}, learning rate {recipe.learning_rate(epoch):g}); "
                "lower the learning rate, or check the inputs for NaN"
            )
        if self.plateau is not None:
            self.plateau.judge()
        self.epochs += 1

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the next epoch depends on. Orders and augmentation follow from the seed and the epoch."""
        network = {f"network.{name}": value for name, value in self.model.state_dict().items()}
        record: dict[str, Any] = {"epochs": self.epochs, "loss": self.loss}
        if self.plateau is not None:
            record["plateau"] = self.plateau.state()
        return {**network, **self._optimizer_state()}, record

    def load_state(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        self.model.load_state_dict({name: tensors[f"network.{name}"] for name in self.model.state_dict()})
        for name, value in self._optimizer_state().items():
            value.copy_(tensors[name])
        if self.plateau is not None:
            self.plateau.load_state(record["plateau"])
        self.epochs, self.loss = record["epochs"], record["loss"]

    def _optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's own tensors; zeros, as it would begin with, where it has not made them yet."""
        tensors = {}
        (group,) = self.optimizer.param_groups
        for number, parameter in enumerate(group["params"]):
            for name in OPTIMIZER_STATE[self.recipe.optimizer]:
                own = self.optimizer.state[parameter]
                if own.get(name) is None:
                    # Adam keeps its count of steps on the CPU, and would read one on a GPU back in every step.
                    steps = torch.zeros((), dtype=torch.float32, device="cpu")
                    own[name] = steps if name == "step" else torch.zeros_like(parameter)
                tensors[f"optimizer.{number}.{name}"] = own[name]
        return tensors


class _Plateau:
    """Cuts the learning rate where the validation loss has stopped falling."""

    def __init__(
        self, recipe: Recipe, model: nn.Module, val: Samples | None, optimizer: torch.optim.Optimizer, precision: str
    ) -> None:
        if val is None:
            raise ValueError("a plateau schedule needs a validation set")
        self.model, self.lr_end, self.precision = model, recipe.lr_end, precision
        self.val = val.to(next(model.parameters()).device)
        self.scheduler = ReduceLROnPlateau(
            optimizer, factor=recipe.lr_cut, patience=PATIENCE, threshold=0, cooldown=COOLDOWN
        )

    def judge(self) -> None:
        """Take in the epoch that has just ended."""
        self.scheduler.step(self._loss())

    @property
    def has_ended(self) -> bool:
        """Whether the learning rate has fallen far enough."""
        return float(self.scheduler.get_last_lr()[0]) < self.lr_end

    def state(self) -> dict[str, Any]:
        return {name: getattr(self.scheduler, name) for name in PLATEAU_STATE}

    def load_state(self, state: dict[str, Any]) -> None:
        self.scheduler.load_state_dict({name: state[name] for name in PLATEAU_STATE})
        (self.scheduler.optimizer.param_groups[0]["lr"],) = self.scheduler.get_last_lr()

    @torch.no_grad()
    def _loss(self) -> float:
        self.model.eval()
        with passes_in(self.precision, self.val.y.device):
            logits = torch.cat([self.model(x).float() for x in batches_of(self.val.x, EVALUATION_BATCH)])
        self.model.train()
        return F.cross_entropy(logits, self.val.y).item()


def _batches(
    samples: Samples, order: Tensor, recipe: Recipe, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Minibatches (x, y, b), with flips and crops where the recipe has them: before normalisation, on bytes."""
    if not recipe.augments:
        yield from samples.batches(order, recipe.batch_size)
        return
    if not isinstance(samples.x, Pixels):
        raise TypeError(f"flips and crops are of images kept as bytes (Pixels), got {type(samples.x).__name__}")
    for rows in order.split(recipe.batch_size):
        images = samples.x.raw(rows)
        if recipe.crop_padding:
            images = crop_at_random(images, recipe.crop_padding, generator)
        if recipe.flips:
            images = flip_at_random(images, generator)
        here = rows.to(samples.y.device)
        yield samples.x.normalised(images), samples.y[here], samples.b[here]


def _train_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    precision: str,
) -> float:
    """One pass over minibatches (x, y, b); returns the mean loss.

    A last one of a single sample is left out where there is batch norm, which may have no variance of it.
    """
    total, count, size = torch.zeros((), dtype=torch.float32, device="cpu"), 0, 0
    has_norms = any(isinstance(part, _BatchNorm) for part in model.modules())
    for x, y, _b in batches:
        size = size or len(y)
        if has_norms and len(y) == 1 < size:
            continue
        with passes_in(precision, x.device):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total, count = total.to(y.device) + loss.detach() * len(y), count + len(y)
    return total.item() / count  # the one read of an epoch: a GPU need not wait in every step
