"""Checkpoints of a run: one file an epoch, written whole or not at all."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

CHECKPOINT = "checkpoint.safetensors"
FORMAT = 1


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
        try:
            with safe_open(self._path, framework="pt") as file:
                record = json.loads((file.metadata() or {})["record"])
                identity = json.loads((file.metadata() or {})["identity"])
                self._check(identity)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{self._path} is no checkpoint of this package, or is damaged: {error}") from error
        run.load_state(tensors, record)
        return True

    def save(self, run: Resumable) -> None:
        """Write the run's state: to a temporary file first, so that a kill leaves the old one whole."""
        if self._path is None:
            return
        tensors, record = run.state()
        temporary = self._path.with_suffix(".tmp")
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
            temporary,
            {"record": json.dumps(record), "identity": json.dumps(self._identity)},
        )
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(self._path)

    def _check(self, found: dict[str, Any]) -> None:
        names = sorted({*found, *self._identity})
        differences = [
            f"{name} was {found.get(name)!r} and is now {self._identity.get(name)!r}"
            for name in names
            if found.get(name) != self._identity.get(name)
        ]
        if differences:
            raise ValueError(f"{self._path} belongs to another run: {'; '.join(differences)}")


def digest(tensor: Tensor) -> str:
    """A short fingerprint of a tensor's bits."""
    flat = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(flat.tobytes(), digest_size=8).hexdigest()
