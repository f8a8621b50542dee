"""Groups of processes on this machine, for tests of extractions that are shared out."""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOADED = ["torch._dynamo", "ffw_fast"]  # imported once for all processes
MINUTES = 300  # seconds that a group of processes may take on a busy machine


def on_processes(count: int, work: Callable[..., Any], folder: Path, *given: Any) -> list[Any]:
    """What ``work(rank, folder, *given)`` leaves in ``folder / result-RANK``, on so many processes."""
    (folder / "store").unlink(missing_ok=True)
    multiprocessing.set_forkserver_preload(PRELOADED)
    context = mp.start_processes(
        _member, (count, str(folder), work, given), nprocs=count, join=False, start_method="forkserver"
    )
    assert context is not None
    deadline = time.monotonic() + MINUTES
    while not context.join(timeout=5):
        assert time.monotonic() < deadline, "the processes hang"
    return [torch.load(folder / f"result-{rank}", weights_only=True) for rank in range(count)]


def _member(rank: int, count: int, folder: str, work: Callable[..., Any], given: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    torch.save(work(rank, Path(folder), *given), f"{folder}/result-{rank}")
    dist.destroy_process_group()
