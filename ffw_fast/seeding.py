"""Random numbers that no one else draws from: every purpose has a stream of its own, the global ones are left alone."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# The streams of orders in which samples are visited: by the gates, by the heads, by fine-tuning.
GATE_ORDERS, HEAD_ORDERS, FINETUNE_ORDERS = "gate epoch", "head epoch", "finetune epoch"

_setting_threads = threading.Lock()


def seeded_generator(seed: int, purpose: str) -> torch.Generator:
    """A generator on the CPU for one purpose, so that, say, a smaller training set changes nothing in the test set."""
    digest = hashlib.sha256(f"{seed}:{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def random_order(count: int, seed: int, purpose: str) -> Tensor:
    """Rows in random order, int64 (count,), on the CPU whatever PyTorch's default device is."""
    return torch.randperm(count, generator=seeded_generator(seed, purpose), device="cpu")


def epoch_order(count: int, seed: int, stream: str, epoch: int) -> Tensor:
    """The order, int64 (count,), in which an epoch visits the samples; it depends on nothing that came before."""
    with _one_thread():
        return random_order(count, seed, f"{stream} {epoch}")


@contextmanager
def _one_thread() -> Iterator[None]:
    """PyTorch numbers more than 32768 samples on all threads, and waking those takes longer than all the rest."""
    with _setting_threads:  # else another thread could take this 1 for the number to go back to
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
