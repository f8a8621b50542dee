"""One extraction on one process and on several, measured: the time of each part, and what was sent.

All cores are in use either way: one process has a thread on each, several share them out. So on one machine there is
nothing to gain, and what is measured is what it costs to work in a group. With ``--link`` half of the processes stand
on each of two simulated hosts (``ffw_fast.benchmarks.hosts``), and what the link between them carries is counted, too.
Images and weights are random; a fit of the heads takes a fixed number of epochs.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from ffw_fast.benchmarks.command import add_job, add_json, bench_parser, write_record
from ffw_fast.benchmarks.hosts import LINK, Hosts
from ffw_fast.benchmarks.jobs import Job, feature_width, one_job, random_samples
from ffw_fast.benchmarks.machine import describe, times
from ffw_fast.benchmarks.scaling import FEATURES, GATED, GRADIENT, JOINT, Network, bytes_sent, messages
from rich.table import Table
from torch import Tensor

from ffw_fast.distributed import Alone, Group, ShardedGroup
from ffw_fast.inputs import Problem
from ffw_fast.loop import Loop
from ffw_fast.settings import Settings
from ffw_fast.tables import print_table

HEAD_EPOCHS = 10  # of a fit
STEP, NETWORK, GATES, HEADS = "a step", "  network", "  gates", "  heads"
PASS, REFIT, EPOCH = "features of the set", "refit of the heads", "an epoch of the job, multiplied out"
MESSAGES = (f"  {JOINT}", f"  {GRADIENT}", f"  {FEATURES}")
PARTS = (STEP, NETWORK, *MESSAGES, HEADS, GATES, f"  {GATED}", PASS, REFIT, EPOCH)
MODULE = (sys.executable, "-m", "ffw_fast.benchmarks.processes")
OPTIONS = ("job", "tiny", "batch", "steps", "repeats", "rounds", "cores", "link", "shard", "late")  # of a record
PATIENCE = timedelta(minutes=30)  # with a process that others keep from its core


class Meter:
    """What parts of a step took, and what each message held."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.seconds: dict[str, float] = {}
        self.sent: dict[str, int] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    @contextmanager
    def message(self, name: str, size: int) -> Iterator[None]:
        """A message whose whole content is so many bytes."""
        self.sent[name] = size
        with self.part(f"  {name}"):
            yield

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with self.part(name):
                return call(*arguments)

        return run


class _Metered(Group):
    """A group with a count of what goes round in a step and how long that takes, waiting for the others included."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self._meter = meter

    def rows(self, own: Tensor, count: int) -> Tensor:
        with self._meter.message(FEATURES, count * own[0].nbytes):
            return super().rows(own, count)

    def _all_reduce(self, tensor: Tensor) -> None:
        with self._meter.message(JOINT, tensor.nbytes):
            super()._all_reduce(tensor)

    def _send(self, gradient: Tensor, piece: slice) -> list[Callable[[], object]]:
        self._meter.sent[GRADIENT] = self._meter.sent.get(GRADIENT, 0) + gradient[piece].nbytes
        return super()._send(gradient, piece)


class MeteredGroup(_Metered, Group):
    """All processes keep the state of all gates."""


class MeteredShardedGroup(_Metered, ShardedGroup):
    """Each keeps that of its own gates."""

    def spread_(self, buffer: Tensor) -> None:
        with self._meter.message(GATED, buffer.nbytes):
            super().spread_(buffer)


def measure(options: argparse.Namespace, group: Alone, meter: Meter) -> dict[str, Any]:
    """Seconds (medians) of a step, its parts, a pass over the set and a refit; bytes of a step's messages."""
    loop = _loop(options, group)
    loop.optimizer._step = meter.timed(GATES, loop.optimizer._step)  # type: ignore[method-assign]
    loop.heads.step = meter.timed(HEADS, loop.heads.step)  # type: ignore[method-assign]
    if (gradient_sum := loop.network.gradient_sum) is not None:
        gradient_sum.finish = meter.timed(f"  {GRADIENT}", gradient_sum.finish)  # type: ignore[method-assign]
        if options.late:
            gradient_sum._filled = lambda index: None  # type: ignore[method-assign]
    loop.heads.epochs_a_fit = HEAD_EPOCHS
    loop.counted_step(*next(loop.batches()))  # libraries choose kernels and take memory in it
    steps: list[dict[str, float]] = []
    carried: list[int] = []
    for batch in loop.batches():
        meter.clear()
        before, started = _carried(), time.perf_counter()
        loop.counted_step(*batch)
        whole = time.perf_counter() - started
        steps.append({STEP: whole, NETWORK: whole - sum(meter.seconds.values()), **meter.seconds})
        carried.append(_carried() - before)
    sent = dict(meter.sent)
    seconds = {name: median(step[name] for step in steps) for name in steps[0]}
    seconds[PASS] = median(times(lambda: loop.features(loop.train.x), options.repeats))
    seconds[REFIT] = median(times(lambda: loop.refit(loop.heads), options.repeats))
    job, count = _job(options), len(loop.train.y)
    once = (job.train * seconds[REFIT] + job.val * seconds[PASS]) / count
    seconds[EPOCH] = job.train / options.batch * seconds[STEP] + once
    return {"seconds": seconds, "sent": sent, "carried": median(carried), "gates": len(loop.gates.weight)}


def _loop(options: argparse.Namespace, group: Alone) -> Loop:
    job = _job(options)
    torch.manual_seed(0)
    model = job.network()
    settings = Settings(job.bottleneck, job.classes, batch_size=options.batch)
    train = random_samples(job, options.batch * options.steps)
    return Loop(Problem(settings, model, train, train, feature_width(job, model)), group)


def _job(options: argparse.Namespace) -> Job:
    return one_job(options.job, options.tiny)


def _carried() -> int:
    """Bytes that this host has sent over its link so far; 0 where it has none."""
    lines = (line.partition(":") for line in Path("/proc/self/net/dev").read_text().splitlines())
    return next((int(counters.split()[8]) for name, _, counters in lines if name.strip() == LINK), 0)


def measure_on(count: int, arguments: Sequence[str], cores: int, hosts: Hosts | None) -> list[dict[str, Any]]:
    """What every one of so many processes measured."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores // count))}
    if hosts is not None:
        environment["GLOO_SOCKET_IFNAME"] = LINK
    with TemporaryDirectory() as folder, ExitStack() as running:
        members = []
        for rank in range(count):
            command = [*MODULE, *arguments, "--member", str(rank), str(count), folder]
            on_host = command if hosts is None else hosts.on(2 * rank // count, command)
            members.append(running.enter_context(subprocess.Popen(on_host, env=environment)))
            running.callback(members[-1].kill)
        codes = [member.wait() for member in members]
        if any(codes):
            raise RuntimeError(f"the measurement on {count} processes ended with exit codes {codes}")
        return [json.loads((Path(folder) / str(rank)).read_text()) for rank in range(count)]


def _be_member(options: argparse.Namespace) -> None:
    """One process of a measurement; leaves what it measured in the folder."""
    rank, count, folder = int(options.member[0]), int(options.member[1]), Path(options.member[2])
    meter, group = Meter(), Alone()
    if count > 1:
        store = dist.FileStore(str(folder / "store"), count)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=PATIENCE)
        group = MeteredShardedGroup(meter) if options.shard else MeteredGroup(meter)
    (folder / str(rank)).write_text(json.dumps(measure(options, group, meter)))
    if count > 1:
        dist.destroy_process_group()


def time_table(results: dict[int, list[dict[str, Any]]], options: argparse.Namespace) -> Table:
    """The mean over processes of every part, and the ratio to the first number of processes."""
    first, *others = results
    table = Table(title=f"{_job(options).name}, batch {options.batch}: milliseconds", title_justify="left")
    table.add_column("part")
    for count in results:
        threads = max(1, options.cores // count)
        processes = "1 process" if count == 1 else f"{count} processes"
        table.add_column(f"{processes} of {threads} thread{'s' * (threads > 1)}", justify="right")
    for count in others:
        table.add_column(f"{count} to {first}", justify="right")
    seconds = {count: _mean_seconds(members) for count, members in results.items()}
    for name in (part for part in PARTS if any(part in parts for parts in seconds.values())):
        shown = [f"{1e3 * parts[name]:.1f}" if name in parts else "" for parts in seconds.values()]
        known = name in seconds[first]
        ratios = [f"{seconds[count][name] / seconds[first][name]:.2f}" if known else "" for count in others]
        table.add_row(name, *shown, *ratios)
    return table


def _least(rounds: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of all rounds that of the shortest step: a disturbance only ever lengthens it."""
    return min(rounds, key=lambda members: members[0]["seconds"][STEP])


def _mean_seconds(members: list[dict[str, Any]]) -> dict[str, float]:
    return {name: mean(member["seconds"][name] for member in members) for name in members[0]["seconds"]}


def sent_table(count: int, members: list[dict[str, Any]], options: argparse.Namespace) -> Table:
    """What a step's messages held beside the count on paper, and what the link carried."""
    job = _job(options)
    network = Network(members[0]["gates"], 0, feature_width(job, job.network()), job.classes, job.biases)
    table = Table(title=f"{count} processes: bytes of a step's messages", title_justify="left")
    for column in ("message", "on paper", "sent", "each sends, on paper", "first host's link carried"):
        table.add_column(column, justify="left" if column == "message" else "right")
    total = 0.0
    for message in messages(network, options.batch, options.shard):
        each = bytes_sent(message, count)
        total += each
        table.add_row(message.name, f"{message.bytes:,.0f}", f"{members[0]['sent'][message.name]:,}", f"{each:,.0f}")
    carried = f"{members[0]['carried']:,.0f}" if options.link else ""
    table.add_row("a step", "", "", f"{total:,.0f}", carried)
    return table


def record(
    machine: dict[str, Any], results: dict[int, list[dict[str, Any]]], options: argparse.Namespace
) -> dict[str, Any]:
    """All figures: seconds are means over processes, bytes those of a step, of each message and over the first link."""
    rows = [
        {
            "processes": count,
            "threads": max(1, options.cores // count),
            "gates": members[0]["gates"],
            "seconds": _mean_seconds(members),
            "bytes": {"messages": members[0]["sent"], "link": members[0]["carried"] if options.link else None},
        }
        for count, members in results.items()
    ]
    chosen = {name: getattr(options, name) for name in OPTIONS} | {"job": _job(options).name}
    return {"machine": machine, "options": chosen, "rows": rows}


def main(arguments: Sequence[str]) -> None:
    parser = bench_parser("processes", __doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="how many (default: 1 2)")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="in use (default: all)")
    add_job(parser)
    parser.add_argument("--batch", type=int, default=100, help="samples of a minibatch (default: 100)")
    parser.add_argument("--steps", type=int, default=10, help="of one epoch over the random set (default: 10)")
    parser.add_argument("--repeats", type=int, default=3, help="of what is done once an epoch (default: 3)")
    parser.add_argument("--rounds", type=int, default=1, help="of all, in turn (default: 1); the best counts")
    parser.add_argument("--link", metavar="RATE", help="between two simulated hosts, as in tc: 1gbit")
    parser.add_argument("--shard", action="store_true", help="each process keeps the state of its own gates alone")
    parser.add_argument("--late", action="store_true", help="send the gradient after the backward pass, to compare")
    add_json(parser)
    parser.add_argument("--member", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.member:
        _be_member(options)
        return
    with ExitStack() as stack:
        hosts = stack.enter_context(Hosts(options.link)) if options.link else None
        rounds = [
            {count: measure_on(count, arguments, options.cores, hosts) for count in options.processes}
            for _ in range(options.rounds)
        ]
    results = {count: _least([members[count] for members in rounds]) for count in options.processes}
    machine = describe()
    print(f"{machine['processor']}, {machine['instruction_set']}, torch {machine['torch']}, {options.cores} cores")
    print_table(time_table(results, options))
    for count, members in results.items():
        if count > 1:
            print_table(sent_table(count, members, options))
    write_record(options.json, record(machine, results, options))


if __name__ == "__main__":
    main(sys.argv[1:])
