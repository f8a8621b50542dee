"""What an extraction gives back, and how it is kept on disk."""

import csv
import io
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ffw_fast.channel_sparsity import share_gone
from ffw_fast.channels import ChannelGraph
from ffw_fast.compact import compact as compacted
from ffw_fast.copies import copy_of, state_tensors
from ffw_fast.files import ShapesCheck, read_json, read_tensors, read_text, write_json, write_tensors, written_whole
from ffw_fast.finetune import EPOCHS, finetune
from ffw_fast.masking import maskable_layers
from ffw_fast.seeding import seeded_generator
from ffw_fast.settings import Settings

SCORES = "scores.safetensors"
BEST_SCORES = "best_scores.safetensors"
MODEL = "model.safetensors"
CONFIG = "config.json"
METRICS = "metrics.json"
HISTORY = "history.csv"


@dataclass
class Extraction:
    """The sub-network that ``ffw_fast.extract`` found.

    Attributes:
        dense_model: the biased network as given, no copy: what is changed in it later changes what ``model`` gives.
        settings: what the extraction was asked for.
        scores: layer name -> scores at the end, shaped as the layer's weight, or (channels,) where channels are gated.
            A weight or channel is kept where they are >= 0.
        best_scores: likewise, of the pruned network with the lowest mean validation bias accuracy; of BISE with the
            highest validation task accuracy, or those at the end where there was no validation set.
        history: one dict an epoch: ``epoch``, ``temperature``, ``loss``, ``cross_entropy``, ``train_mi``,
            ``head_epochs``, ``val_mi``, ``val_task_accuracy``, ``val_bias_accuracy`` (list), ``half_open`` (how
            far gates are from open or shut, see ``ffw_fast.gates.half_open``), ``seconds``, and where the pruned
            network was judged ``pruned_task_accuracy`` and ``pruned_bias_accuracy`` (list).
        metrics: ``vanilla``, ``pruned`` and ``best`` on the validation set, or where there was none on the training
            set (BISE's ``measured_on`` and ``selection`` say which), each with ``task_accuracy``,
            ``bias_accuracy`` (list), ``bias_mi`` (list), ``sparsity`` (share of the gates that are closed) and
            ``weight_sparsity`` (share of the Conv and Linear weights that are gone); ``epochs``, ``seconds`` and
            ``warnings``.
        input_shape: of one sample; empty where it is unknown.
    """

    dense_model: nn.Module
    settings: Settings
    scores: dict[str, Tensor]
    best_scores: dict[str, Tensor]
    history: list[dict[str, Any]]
    metrics: dict[str, Any]
    input_shape: tuple[int, ...] = ()

    @property
    def warnings(self) -> list[str]:
        """What the run should make one doubt, in plain words: see ``ffw_fast.cautions``."""
        return list(self.metrics.get("warnings", []))

    @property
    def masks(self) -> dict[str, Tensor]:
        """Layer name -> boolean mask of the weights or channels that the final scores keep."""
        return masks_of(self.scores)

    @property
    def best_masks(self) -> dict[str, Tensor]:
        """Layer name -> boolean mask of the weights or channels that the best scores keep."""
        return masks_of(self.best_scores)

    def model(self, best: bool = False, compact: bool = False) -> nn.Module:
        """The pruned network: a copy of the biased one, in eval mode, with zeros where the (best) scores are < 0.

        A pruned channel is zeros in the layer and its batch norm. Where these do not suffice, because a shortcut enters
        the sum or the non-linearity does not map 0 to 0, a ``ffw_fast.channels.ChannelMask`` follows the non-linearity.

        With ``compact``, channels that zeros have made useless are cut out: it is smaller and computes the same; see
        ``ffw_fast.compact`` for what stays and what is raised.
        """
        masks = self.best_masks if best else self.masks
        model = copy_of(self.dense_model)
        if self.settings.granularity == "channel":
            pruned = ChannelGraph(model, self.settings.where).prune(masks).eval()
        else:
            pruned = apply_masks(model, masks).eval()
        return compacted(pruned, self.example()) if compact else pruned

    def example(self, count: int = 2) -> Tensor:
        """Noise of shape (count, ...) that the network can be called with, on its device and in its dtype.

        Raises:
            ValueError: the shape of the input is not known.
        """
        if not self.input_shape:
            raise ValueError(
                "this extraction does not know the shape of its input: set input_shape, as in (3, 224, 224)"
            )
        source = seeded_generator(self.settings.seed, "example")
        weight = next(self.dense_model.parameters())
        return torch.randn(count, *self.input_shape, generator=source, dtype=torch.float32, device="cpu").to(weight)

    def finetune(
        self, train: Any, val: Any, epochs: int = EPOCHS, *, gamma: float = 0.0, best: bool = False
    ) -> nn.Module:
        """The pruned network with its surviving weights trained further; see ``ffw_fast.finetune.finetune``."""
        masks = self.best_masks if best else self.masks
        if self.settings.granularity == "channel":  # all layers are trained, the rows of pruned channels excepted
            masks = ChannelGraph(self.dense_model, self.settings.where).kept_rows(masks)
        return finetune(self.model(best), masks, train, val, self.settings, epochs=epochs, gamma=gamma)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write ``config.json``, ``metrics.json``, ``history.csv``, the scores and the pruned network's weights."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG, {"settings": self.settings.as_dict(), "input_shape": list(self.input_shape)})
        write_json(folder / METRICS, self.metrics)
        write_history(folder / HISTORY, self.history)
        save_scores(folder / SCORES, self.scores)
        save_scores(folder / BEST_SCORES, self.best_scores)
        write_tensors(folder / MODEL, {name: value.clone() for name, value in state_tensors(self.model()).items()})

    @classmethod
    def load(cls, directory: str | os.PathLike[str], model: nn.Module) -> Self:
        """Read what ``save`` wrote, for the biased network ``model`` that the scores were learned on.

        Warns where the model has other weights than that network.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, or scores do not fit the model.
        """
        folder = Path(directory)
        config = read_json(folder / CONFIG)
        try:
            settings = Settings(**(config.get("settings") or {}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder / CONFIG} does not hold the settings of an extraction: {error}") from error
        gated = gated_tensors(model, settings)
        scores, best_scores = (load_scores(folder / name, gated) for name in (SCORES, BEST_SCORES))
        shape = config.get("input_shape", [])
        if not isinstance(shape, list) or not all(isinstance(size, int) and size > 0 for size in shape):
            raise ValueError(f"{folder / CONFIG}: input_shape must be a list of positive integers, got {shape!r}")
        history, metrics = read_history(folder / HISTORY), read_json(folder / METRICS)
        _check_complete(folder, history, metrics)
        found = cls(model, settings, scores, best_scores, history, metrics, tuple(shape))
        found._compare_with(folder / MODEL)
        return found

    def _compare_with(self, path: Path) -> None:
        """Warn where the file, if there is one, holds another pruned network than these scores make of the model."""
        if not path.is_file():
            return
        saved, _ = read_tensors(path)
        ours = {name: value.cpu() for name, value in state_tensors(self.model()).items()}
        same = saved.keys() == ours.keys() and all(
            value.dtype == saved[name].dtype and torch.equal(value, saved[name]) for name, value in ours.items()
        )
        if not same:
            warnings.warn(
                f"the model's weights are not those that the scores were learned on: pruned, it is not the network of "
                f"{path}",
                stacklevel=3,
            )


def _check_complete(folder: Path, history: list[dict[str, Any]], metrics: dict[str, Any]) -> None:
    """``ValueError`` where figures of a network or epochs are missing."""
    if missing := [name for name in ("vanilla", "pruned", "best", "epochs") if name not in metrics]:
        raise ValueError(f"{folder / METRICS} is damaged: it lacks {', '.join(missing)}")
    if len(history) != metrics["epochs"]:
        raise ValueError(f"{folder / HISTORY} has {len(history)} epochs and {METRICS} says {metrics['epochs']}")


def gated_tensors(model: nn.Module, settings: Settings) -> dict[str, Tensor]:
    """Layer name -> what its gates multiply: the frozen weight, or ones (channels,) where channels are gated."""
    weights = {name: layer.weight.detach() for name, layer in maskable_layers(model).items()}
    if settings.granularity == "weight":
        return weights
    shapes = ChannelGraph(model, settings.where).shapes
    return {name: weights[name].new_ones(shape) for name, shape in shapes.items()}


def weight_sparsity(model: nn.Module, settings: Settings, masks: dict[str, Tensor]) -> float:
    """Share of the Conv and Linear weights that pruning removes; that of a pruned channel's readers included."""
    if settings.granularity == "weight":
        return sparsity(masks)
    return share_gone(ChannelGraph(model, settings.where), masks)


def masks_of(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """The one pruning rule: keep where the score is at least 0."""
    return {name: score >= 0 for name, score in scores.items()}


@torch.no_grad()
def apply_masks(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """Give the named layers weights that are zero where their mask is false; returns the model.

    A weight that another module holds too, such as an embedding, stays there as it was: masks are of layers.

    Raises:
        ValueError, TypeError: no masks by name, a layer that the model has not or whose weight is computed, a mask that
            has another shape than its weight or is not boolean; nothing is changed.
    """
    if not isinstance(masks, Mapping):
        raise TypeError(f"masks must map names of layers to tensors, got {type(masks).__name__}")
    layers = dict(model.named_modules())
    for name, mask in masks.items():
        if not isinstance(mask, Tensor):
            raise TypeError(f"the mask of {name!r} must be a tensor, got {type(mask).__name__}")
        weight = getattr(layers.get(name), "weight", None)
        if not isinstance(weight, Tensor):
            raise ValueError(f"masks: {type(model).__name__} has no layer {name!r} with a weight")
        if layers[name]._parameters.get("weight") is None:
            raise ValueError(f"the weight of layer {name!r} is computed (weight_norm, prune): remove that first")
        if mask.dtype != torch.bool:
            raise TypeError(f"the mask of {name!r} must be boolean, got {mask.dtype}; scores are masks where >= 0")
        if mask.shape != weight.shape:
            raise ValueError(f"the mask of {name!r} has shape {tuple(mask.shape)}, expected {tuple(weight.shape)}")
    for name, mask in masks.items():
        layer = layers[name]
        weight = layer.weight
        assert isinstance(weight, Tensor)
        pruned = weight.masked_fill(~mask.to(weight.device), 0)
        layer.weight = nn.Parameter(pruned, requires_grad=weight.requires_grad)
    return model


def load_masks(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Layer name -> boolean mask of what is kept, from a ``scores.safetensors`` or ``best_scores.safetensors``.

    For ``apply_masks``, ``torch.nn.utils.prune.custom_from_mask`` and the like, on any copy of the network.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is damaged, or what it holds are no scores, or NaN.
    """
    return masks_of(_read_scores(Path(path), partial(_check_layers_names, path)))


def _check_layers_names(path: Any, shapes: Iterable[str]) -> None:
    """Scores have the names of layers, a network's weights those of its parameters."""
    if weights := [name for name in shapes if name.endswith(".weight")]:
        raise ValueError(
            f"{path} holds a network's {weights[0]!r}, and no scores; those are in {SCORES} and {BEST_SCORES}"
        )


def sparsity(masks: dict[str, Tensor]) -> float:
    """Share of the gates, of weights or channels, that are closed."""
    return sum(int((~mask).sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


def save_scores(path: Path, scores: dict[str, Tensor]) -> None:
    """Write scores, or masks, by layer name."""
    write_tensors(path, scores)


def load_scores(path: Path, gated: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read scores by layer name and check them against what the gates multiply.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is damaged, a name, shape or dtype does not fit, or a score is NaN.
    """

    def check(shapes: dict[str, tuple[int, ...]]) -> None:
        if unknown := sorted(shapes.keys() ^ gated.keys()):
            raise ValueError(f"{path} and the model differ in their layers: {', '.join(unknown)}")
        for name, shape in shapes.items():
            if shape != (expected := tuple(gated[name].shape)):
                raise ValueError(f"{path}: the scores of {name!r} have shape {shape}, expected {expected}")

    scores = _read_scores(path, check)
    return {name: score.to(gated[name].device) for name, score in scores.items()}


def _read_scores(path: Path, check: ShapesCheck | None = None) -> dict[str, Tensor]:
    scores, _ = read_tensors(path, check)
    for name, score in scores.items():
        if not score.is_floating_point():
            raise ValueError(f"{path}: the scores of {name!r} are {score.dtype}, expected a floating-point format")
        if score.isnan().any():
            raise ValueError(f"{path}: the scores of {name!r} hold NaN, which neither keeps a weight nor prunes it")
    return scores


def write_history(path: Path, history: list[dict[str, Any]]) -> None:
    """One line an epoch. Lists stand in one field, separated by spaces."""
    columns = list(dict.fromkeys(column for row in history for column in row))
    with written_whole(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({column: _field(value) for column, value in row.items()} for row in history)


def _field(value: Any) -> str:
    return " ".join(map(repr, value)) if isinstance(value, list) else repr(value)


def read_history(path: Path) -> list[dict[str, Any]]:
    """What ``write_history`` wrote. ``ValueError`` with the path where it is damaged."""
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path), newline="")))
        if any(text is None for row in rows for text in row.values()):
            raise ValueError("a line ends too early")
        return [{column: _value(column, text) for column, text in row.items() if text} for row in rows]
    except (ValueError, TypeError, AttributeError, csv.Error) as error:  # too long a row has the column None
        raise ValueError(f"{path} is damaged: {error}") from error


def _value(column: str, text: str) -> Any:
    if column.endswith("bias_accuracy"):
        return [float(part) for part in text.split()]
    return int(text) if column in ("epoch", "head_epochs") else float(text)
