"""Inputs that are read from their Dataset whenever a minibatch of them is wanted, because they do not fit or change."""

import hashlib
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info


class Fingerprint:
    """Of the bytes of inputs in their order, however they are split."""

    def __init__(self, *inputs: Tensor) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        for x in inputs:
            self.add(x)

    def add(self, x: Tensor) -> None:
        self._hash.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)

    def value(self) -> Tensor:
        """uint8 (16,)"""
        return torch.tensor(list(self._hash.digest()), dtype=torch.uint8, device="cpu")


@dataclass(frozen=True)
class Stream:
    """Inputs of a Dataset that stand where a float tensor (n, ...) would: indexed by rows, split, moved.

    Where the Dataset augments at random by the global generators of PyTorch, numpy or Python, every pass over it draws
    from a seed of its own, made of the order in which the pass visits the samples: another order gives other draws, the
    same order the same ones, whatever the minibatches and the number of workers, and the generators stay as they were.
    What the collate function draws is the same for the same minibatches.

    Attributes:
        loader: whose Dataset, workers and collate function are used; its order is not.
        indices: int64 (n,), the index of every sample in the Dataset.
        parse: what the loader collates -> inputs (n, ...).
        sample_shape: of one sample; others are refused.
        dtype, device: of what is read.
        augments: whether a sample may change from one reading to the next.
        fingerprint: uint8 (k,), of all inputs where they do not change, empty where they do.
        name: of the set, for messages.
    """

    loader: DataLoader
    indices: Tensor
    parse: Callable[[Any], Tensor]
    sample_shape: tuple[int, ...]
    dtype: torch.dtype
    augments: bool
    fingerprint: Tensor
    name: str
    device: torch.device

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.indices), *self.sample_shape))

    def __len__(self) -> int:
        return len(self.indices)

    def in_order(self, rows: Tensor) -> "Stream":
        """The samples of these rows, in their order."""
        return replace(self, indices=self.indices[rows.cpu()])

    def split(self, size: int) -> Iterator[Tensor]:
        """All inputs in their order, ``size`` at a time, read anew."""
        batches = read_batches(self.loader, self.indices, size, seeded=self.augments)
        while (x := self._next(batches)) is not None:
            yield x.to(self.device, self.dtype)

    def _next(self, batches: Iterator[Any]) -> Tensor | None:
        """The next minibatch of inputs, on the CPU whatever PyTorch's default device is; None after the last one."""
        with torch.device("cpu"):
            batch = next(batches, None)
            if batch is None:
                return None
            x = self.parse(batch)
        if x.shape[1:] != self.sample_shape or not x.isfinite().all():
            raise ValueError(
                f"{self.name} gives samples of shape {tuple(x.shape[1:])} where it gave {self.sample_shape}, "
                "or NaN or inf, when it is read again"
            )
        return x

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        chosen = torch.arange(len(self), device="cpu")[rows] if isinstance(rows, slice) else rows
        return next(self.in_order(chosen).split(max(1, len(chosen))))

    def to(self, where: torch.device | torch.dtype | str) -> "Stream":
        if isinstance(where, torch.dtype):
            return replace(self, dtype=where)
        return replace(self, device=torch.device(where))


def read_batches(loader: DataLoader, indices: Tensor, size: int, *, seeded: bool = False) -> Iterator[Any]:
    """What the loader collates of its Dataset's samples ``indices``, ``size`` at a time, by its workers.

    Args:
        seeded: let every sample, and every minibatch as it is collated, draw from a seed of its own, made of
            ``indices`` and its place among them.
    """
    dataset, collate, start_worker = loader.dataset, loader.collate_fn, loader.worker_init_fn
    if seeded:
        dataset = seeds = _Seeded(loader, indices)
        collate, start_worker = seeds.collate, seeds.start_worker
        indices = torch.arange(len(indices), device="cpu")
    batches = DataLoader(
        dataset,
        batch_sampler=[part.tolist() for part in indices.split(size)],
        num_workers=loader.num_workers,
        collate_fn=collate,
        worker_init_fn=start_worker,
        multiprocessing_context=loader.multiprocessing_context if loader.num_workers else None,
        prefetch_factor=loader.prefetch_factor,
        timeout=loader.timeout,
        generator=torch.Generator().manual_seed(0),  # else it would draw from the global one
    )
    yield from batches


class _Seeded(Dataset):
    """A loader's samples by their places in a pass; each, and each minibatch of them, draws from a seed of its own."""

    def __init__(self, loader: DataLoader, indices: Tensor) -> None:
        self.dataset, self.collate_fn, self.worker_init_fn = loader.dataset, loader.collate_fn, loader.worker_init_fn
        self.indices = indices.tolist()
        self.key = hashlib.blake2b(indices.numpy().tobytes(), digest_size=8).hexdigest()

    def __getitem__(self, place: int) -> tuple[int, Any]:
        with self._drawing(f"{place}"):
            return place, self.dataset[self.indices[place]]

    def collate(self, items: list[tuple[int, Any]]) -> Any:
        with self._drawing(f"from {items[0][0]}"):
            return self.collate_fn([item for _, item in items])

    def start_worker(self, number: int) -> None:
        """The user's ``worker_init_fn``, which finds the user's Dataset in ``get_worker_info``."""
        object.__setattr__(get_worker_info(), "dataset", self.dataset)  # it lets no one set it
        if self.worker_init_fn is not None:
            self.worker_init_fn(number)

    def _drawing(self, what: str) -> AbstractContextManager[None]:
        digest = hashlib.blake2b(f"{self.key} {what}".encode(), digest_size=8).digest()
        return drawing_from(int.from_bytes(digest, "little") >> 1)


_generators = threading.RLock()
if hasattr(os, "register_at_fork"):  # else a worker might find them taken by a thread that it does not have
    os.register_at_fork(
        before=_generators.acquire, after_in_parent=_generators.release, after_in_child=_generators.release
    )


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """The global CPU generators of PyTorch, numpy and Python start from a seed, and are then as they were before.

    They are of the whole process: another thread that is to draw from a seed waits.
    """
    with _generators:
        before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU as well
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            torch.set_rng_state(before[0])
            np.random.set_state(before[1])  # noqa: NPY002
            random.setstate(before[2])
