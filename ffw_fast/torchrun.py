"""What torchrun, or what sets the same variables, started this process as."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ffw_fast.distributed import PATIENCE


def is_first() -> bool:
    """Whether this process speaks and writes for its group, also before there is one and after it."""
    return not _is_launched() or os.environ["RANK"] == "0"


def _is_launched() -> bool:
    """Whether torchrun, or what sets the same variables, started this process beside others."""
    return {"RANK", "MASTER_ADDR"} <= os.environ.keys() and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def started_by_torchrun(device: str | None) -> Iterator[str | None]:
    """Within it there is the process group that torchrun's environment asks for; gives this process's device."""
    if not _is_launched() or dist.is_initialized():
        yield device
        return
    on_gpu = (device or "cpu").startswith("cuda")
    if on_gpu:
        if device != "cuda":
            raise ValueError(f"on several processes each has a GPU of its own: give --device cuda, not {device}")
        torch.cuda.set_device(device := f"cuda:{os.environ['LOCAL_RANK']}")
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    try:
        yield device
    finally:
        dist.destroy_process_group()
