"""What an extraction on several processes sends, keeps and should take: counted on paper, memory also measured.

Times are projections: no A100 has run this. Assumptions, each an option or a constant below: the network's passes run
at a fixed share of the A100's bf16 rate however few samples a process has, nothing overlaps, an all-reduce is a ring
within a host over NVLink and a ring of hosts over the network, and a message costs a fixed latency for each doubling of
the processes. The minibatch stays as large as it is on one process, since the mutual information depends on its size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from ffw_fast.benchmarks.a100 import BYTES_PER_SECOND, MATRIX_RATES
from ffw_fast.benchmarks.command import bench_parser
from rich.table import Table

from ffw_fast.distributed import ShardedGroup
from ffw_fast.flat_gates import FlatGates
from ffw_fast.gates import GateKind
from ffw_fast.optim import GatedAdam
from ffw_fast.tables import print_table

FLOAT = 4  # bytes
WHOLE = ("weight", "gated weight", "gradient")  # floats a gate that every process keeps ...
OWN = ("score", "first moment", "second moment", "best score")  # ... and those that may be sharded
PASS = 9  # floats a gate that the fused step reads or writes: 5 read, 4 written
NVLINK, NETWORK = 300e9, 12.5e9  # bytes/s each way of a GPU, and of a host with 100 Gbit/s
GPUS_A_HOST = 8
PROCESSES = (1, 2, 4, 8, 16, 32, 64)
JOINT, GRADIENT, FEATURES = "joint and cross-entropy", "gradient of the gated weights", "features of the minibatch"
GATED = "gated weights"  # goes round where the state is sharded


@dataclass(frozen=True)
class Network:
    """What the costs depend on; MACs are those of one sample's forward pass."""

    gates: float
    macs: float
    features: int
    classes: int
    heads: int


NETWORKS = {  # ResNet18: as published for 1000 classes; ten million gates more or less are what matters here
    "ResNet18, 32x32": Network(11.2e6, 37e6, 512, 10, 1),
    "ResNet18, 224x224": Network(11.2e6, 1.81e9, 512, 2, 1),
    "100 million gates, 224x224": Network(1e8, 16e9, 2048, 2, 1),
}


@dataclass(frozen=True)
class Message:
    """What goes round the group in a step, in bytes of its whole content."""

    name: str
    bytes: float
    rounds: int  # 2 where the parts are first added up and the sum is then given to all


def messages(network: Network, batch: int, shard: bool = False) -> list[Message]:
    """The messages of a step. An adaptive schedule sends 8 bytes more."""
    gates = FLOAT * network.gates
    joint = Message(JOINT, FLOAT * (network.heads * network.classes**2 + 1), 2)
    gradient = [Message(GRADIENT, gates, 1), Message(GATED, gates, 1)] if shard else [Message(GRADIENT, gates, 2)]
    return [joint, *gradient, Message(FEATURES, FLOAT * batch * network.features, 1)]


def bytes_sent(message: Message, processes: int) -> float:
    """By each process of a ring: all but its own part, in every round."""
    return message.bytes * (processes - 1) / processes * message.rounds


def message_seconds(message: Message, processes: int, latency: float) -> float:
    """In a host's ring, and in a ring of hosts where there are several."""
    if processes == 1:
        return 0.0
    local = min(processes, GPUS_A_HOST)
    hosts = processes // local
    wires = bytes_sent(message, local) / NVLINK + bytes_sent(message, hosts) / NETWORK
    return wires + latency * (processes - 1).bit_length()


def step_seconds(network: Network, batch: int, processes: int, share: float, latency: float) -> dict[str, float]:
    """The parts of a step: passes of the network, the fused pass over the gates, messages."""
    return {
        "network": 6 * network.macs * batch / processes / (MATRIX_RATES["bf16"] * share),
        "gates": PASS * FLOAT * network.gates / BYTES_PER_SECOND,
        "messages": sum(message_seconds(message, processes, latency) for message in messages(network, batch)),
    }


def best_count(network: Network, batch: int, share: float, latency: float) -> int:
    """The number of processes from which on more of them make a step longer."""
    return min(PROCESSES, key=lambda count: sum(step_seconds(network, batch, count, share, latency).values()))


def message_table(batch: int) -> Table:
    table = Table(title=f"bytes that each of 8 processes sends in a step, batch {batch}", title_justify="left")
    table.add_column("network")
    for message in messages(next(iter(NETWORKS.values())), batch):
        table.add_column(message.name, justify="right")
    for name, network in NETWORKS.items():
        table.add_row(name, *(f"{bytes_sent(message, 8):,.0f}" for message in messages(network, batch)))
    return table


def scaling_table(batch: int, share: float, latency: float) -> Table:
    table = Table(title=f"projected milliseconds a step on A100s, batch {batch}", title_justify="left")
    for column in ("network", "processes", "passes", "gates", "messages", "step", "speed-up", "fastest at"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for name, network in NETWORKS.items():
        alone = sum(step_seconds(network, batch, 1, share, latency).values())
        fastest = best_count(network, batch, share, latency)
        for count in (1, 8, 64):
            parts = step_seconds(network, batch, count, share, latency)
            whole = sum(parts.values())
            figures = [f"{1e3 * value:.3f}" for value in (*parts.values(), whole)]
            table.add_row(name, str(count), *figures, f"{alone / whole:.2f}", str(fastest))
    return table


class _FirstOf(ShardedGroup):
    """The first of so many processes that share the gates out, without the others."""

    def __init__(self, count: int) -> None:
        self.count, self.rank = count, 0

    def spread_(self, buffer: torch.Tensor) -> None:
        """There is nobody."""


def counted_state(gates: int, processes: int) -> float:
    """Bytes of the loop's buffers of so many gates on each process."""
    return FLOAT * gates * (len(WHOLE) + len(OWN) / processes)


def measured_state(gates: int, processes: int) -> int:
    """Bytes that the loop's buffers of so many gates take on a process after a step."""
    flat = FlatGates({"layer": torch.randn(gates)}, GateKind.FFW, seed=0, group=_FirstOf(processes))
    optimizer = GatedAdam(flat)
    optimizer.step()
    best = flat.scores.clone()
    kept = (flat.weight, flat.gated, flat.grad, flat.scores, best)
    moments = (value for value in optimizer.state[flat.gated].values() if value.numel() > 1)
    return sum(tensor.numel() * tensor.element_size() for tensor in (*kept, *moments))


def memory_table(sizes: Sequence[int]) -> Table:
    table = Table(title="state of each process, sharded: MB", title_justify="left")
    for column in ("gates", "processes", "counted", "measured"):
        table.add_column(column, justify="right")
    for gates in sorted(sizes):
        for count in (1, 2, GPUS_A_HOST):
            counted, measured = counted_state(gates, count), measured_state(gates, count)
            table.add_row(f"{gates:,}", str(count), f"{counted / 1e6:,.0f}", f"{measured / 1e6:,.0f}")
    return table


def main(arguments: Sequence[str]) -> None:
    parser = bench_parser("scaling", __doc__)
    parser.add_argument("--batch", type=int, default=100, help="samples of a minibatch (default: 100)")
    parser.add_argument("--share", type=float, default=0.3, help="of the bf16 rate that passes reach (default: 0.3)")
    parser.add_argument("--latency", type=float, default=1e-5, help="seconds a message and doubling (default: 1e-5)")
    parser.add_argument("--memory", type=int, nargs="*", default=[], metavar="GATES", help="measure the state's memory")
    options = parser.parse_args(arguments)
    if options.memory:
        print_table(memory_table(options.memory))
        return
    print_table(message_table(options.batch))
    print_table(scaling_table(options.batch, options.share, options.latency))
