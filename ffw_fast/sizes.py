"""How large and how fast a network is: parameters, multiplications, measured latency, bytes on disk."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import safetensors.torch
import torch
from rich.table import Table
from torch import Tensor, nn

SIZES = "sizes.json"  # in a run folder, where they were compared
LATENCY_SECONDS = 2.0  # that measuring may take for all networks together
LATENCY_PASSES = 50  # of each network at most


@dataclass(frozen=True)
class Size:
    """The size of one network.

    Attributes:
        parameters: how many numbers it holds, buffers not counted.
        nonzero: how many of them are not 0.
        macs: multiply-accumulate operations of its convolutions and matrix products, for one sample.
        latency_seconds: of one batch, the median of several passes.
        file_bytes: of its state dict as a safetensors file.
    """

    parameters: int
    nonzero: int
    macs: int
    latency_seconds: float
    file_bytes: int


def compare_sizes(networks: dict[str, nn.Module], x: Tensor) -> dict[str, Any]:
    """The size of every network, as JSON can hold it; their passes are timed by turns, as the machine's speed changes.

    Args:
        networks: name -> network in eval mode, on the device of x.
        x: the batch that they are timed on, (n, ...).

    Returns:
        ``batch_size``, ``threads``, ``device`` and, under ``networks``, by name the fields of ``Size``.
    """
    latencies = _latencies(list(networks.values()), x)
    sizes = {
        name: asdict(_size(network, x, latency))
        for (name, network), latency in zip(networks.items(), latencies, strict=True)
    }
    return {"batch_size": len(x), "threads": torch.get_num_threads(), "device": str(x.device), "networks": sizes}


@torch.no_grad()
def macs(network: nn.Module, x: Tensor) -> int:
    """Multiply-accumulate operations for one sample of x (n, ...)."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, which takes a while

    with FlopCounterMode(display=False) as counter:
        network(x[:1])
    return counter.get_total_flops() // 2


@torch.no_grad()
def _size(network: nn.Module, x: Tensor, latency: float) -> Size:
    parameters = list(network.parameters())
    return Size(
        parameters=sum(parameter.numel() for parameter in parameters),
        nonzero=sum(int(parameter.count_nonzero()) for parameter in parameters),
        macs=macs(network, x),
        latency_seconds=latency,
        file_bytes=len(safetensors.torch.save({name: value.clone() for name, value in network.state_dict().items()})),
    )


@torch.no_grad()
def _latencies(networks: list[nn.Module], x: Tensor) -> list[float]:
    """Median seconds of a pass of each network."""
    for network in networks:
        _pass_seconds(network, x)  # the first pass chooses algorithms
    times: list[list[float]] = [[] for _ in networks]
    started = time.perf_counter()
    while len(times[0]) < LATENCY_PASSES and (not times[0] or time.perf_counter() - started < LATENCY_SECONDS):
        for seconds, network in zip(times, networks, strict=True):
            seconds.append(_pass_seconds(network, x))
    return [float(torch.tensor(seconds, dtype=torch.float64, device="cpu").median()) for seconds in times]


def _pass_seconds(network: nn.Module, x: Tensor) -> float:
    started = time.perf_counter()
    network(x)
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - started


def sizes_table(sizes: dict[str, Any]) -> Table:
    """What ``compare_sizes`` gave, a column for each network, and how many times smaller the last is than the first."""
    networks = sizes["networks"]
    table = Table()
    table.add_column("")
    for name in networks:
        table.add_column(name, justify="right")
    table.add_column("first / last", justify="right")
    rows = (
        ("parameters", "parameters", "{:,}"),
        ("of them not 0", "nonzero", "{:,}"),
        ("MACs of one sample", "macs", "{:,}"),
        (f"latency of {sizes['batch_size']} samples, ms", "latency_seconds", "{:.2f}"),
        ("file, bytes", "file_bytes", "{:,}"),
    )
    for title, field, form in rows:
        values = [size[field] * (1000 if field == "latency_seconds" else 1) for size in networks.values()]
        ratio = f"{values[0] / values[-1]:.2f}" if values[-1] else "-"
        table.add_row(title, *(form.format(value) for value in values), ratio)
    return table
