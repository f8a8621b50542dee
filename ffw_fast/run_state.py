"""Checkpoints of a run: one file an epoch, written whole or not at all, and checked whole before any of it is used."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

CHECKPOINT = "checkpoint.safetensors"
FORMAT = 1
MAY_DIFFER = ("max_epochs",)  # nothing before the last epoch depends on it, so a run may be extended


class Resumable(Protocol):
    """What can be checkpointed: its state is tensors and a JSON record."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]: ...

    def load_state(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None: ...


class RunState:
    """The checkpoint of one run folder; does nothing without one.

    Args:
        run_dir: the folder, made if it is not there; None for no checkpoints.
        identity: what a checkpoint must agree with to be continued: settings and a digest of the model's weights.
        resume: whether to continue from a checkpoint that is there.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, run_dir: str | os.PathLike[str] | None, identity: dict[str, Any], resume: bool) -> None:
        if resume and run_dir is None:
            raise ValueError("resume needs run_dir, the folder that holds the checkpoint")
        self._path = Path(run_dir) / CHECKPOINT if run_dir is not None else None
        self._identity = {"format": FORMAT, **identity}
        self._resume = resume
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            probe = self._path.with_suffix(".probe")
            probe.touch()
            probe.unlink()

    def restore(self, run: Resumable) -> bool:
        """Load the checkpoint into the run if there is one to be continued; whether there was.

        Raises:
            ValueError: the checkpoint is damaged or belongs to another run; the differences are listed.
        """
        if not self._resume or self._path is None or not self._path.exists():
            return False
        tensors, record, identity = self._read(self._path)
        self._check(identity)
        try:
            run.load_state(tensors, record)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self._path} does not fit this run: {error}") from error
        return True

    @staticmethod
    def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
        """Tensors, record and identity of a checkpoint whose checksum holds."""
        try:
            with safe_open(path, framework="pt") as file:
                texts = file.metadata()
                checksum = texts.pop("checksum")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if checksum != _checksum(tensors, texts):
                raise ValueError("its checksum is another one")
            return tensors, json.loads(texts["record"]), json.loads(texts["identity"])
        except OSError:
            raise
        except Exception as error:  # a file may hold anything, and safetensors raises many classes
            raise ValueError(f"{path} is no checkpoint of this package, or is damaged: {error}") from error

    def save(self, run: Resumable) -> None:
        """Write the run's state: to a temporary file first, so that a kill leaves the old one whole."""
        if self._path is None:
            return
        tensors, record = run.state()
        temporary = self._path.with_suffix(".tmp")
        tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        texts = {"record": json.dumps(record), "identity": json.dumps(self._identity)}
        save_file(tensors, temporary, {**texts, "checksum": _checksum(tensors, texts)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(self._path)

    def _check(self, found: dict[str, Any]) -> None:
        names = sorted({*found, *self._identity})
        differences = [
            f"{name} was {found.get(name)!r} and is now {self._identity.get(name)!r}"
            for name in names
            if name not in MAY_DIFFER and found.get(name) != self._identity.get(name)
        ]
        if differences:
            raise ValueError(f"{self._path} belongs to another run: {'; '.join(differences)}")


def digest(*tensors: Tensor) -> str:
    """A short fingerprint of tensors: their dtypes, shapes and bits."""
    fingerprint = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        fingerprint.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        fingerprint.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return fingerprint.hexdigest()


def _checksum(tensors: dict[str, Tensor], texts: dict[str, str]) -> str:
    """Of all that a checkpoint holds, names included."""
    names = sorted(tensors)
    contents = digest(*(tensors[name] for name in names))
    return hashlib.blake2b(json.dumps([names, contents, texts], sort_keys=True).encode(), digest_size=8).hexdigest()
