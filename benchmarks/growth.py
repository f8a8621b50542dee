"""How the cost of an extraction grows with samples, parameters, batch size and threads.

Each point is a process of its own, which trains the gates of Multi-Color MNIST's perceptron on random images and tells
its seconds and its peak of resident memory (``docs/growth.md``). One of the four sizes is varied at a time; exponents
are fitted by least squares on logarithms.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ffw_fast.benchmarks.command import add_json, bench_parser, write_record
from ffw_fast.benchmarks.machine import describe
from ffw_fast.benchmarks.memory import peak_resident, resident
from rich.table import Table

from ffw_fast.data.samples import Samples
from ffw_fast.inputs import Problem
from ffw_fast.loop import Loop
from ffw_fast.models import MLP
from ffw_fast.settings import Settings
from ffw_fast.tables import print_table

IMAGE = (3, 28, 28)
CLASSES = 10


@dataclass(frozen=True)
class Point:
    """What one process runs: training samples, width of the hidden layers, samples a step, threads."""

    samples: int = 1000
    hidden: int = 256
    batch_size: int = 100
    threads: int = 1
    schedule: str = "published"


@dataclass(frozen=True)
class Cost:
    """Of one point.

    Attributes:
        gates: number of gated parameters.
        seconds: of an epoch: the gates trained, and the features of the training set; the better of two.
        training: bytes of resident memory, at their peak until the pruned network is first judged, beyond what the
            process had before there was a network or data.
        peak: likewise, until there was an epoch beside the best scores, which are kept from the first judgement on.
        own: bytes of the network and the data that were handed in, which are part of both.
    """

    gates: int
    seconds: float
    training: int
    peak: int
    own: int


def sweeps(tiny: bool) -> dict[str, list[Point]]:
    """What is varied -> the points; all else stays at its default."""
    threads = [count for count in (1, 2, 4, 8, 16, 32, 64) if count <= (os.cpu_count() or 1)]
    default = Point(threads=threads[-1])
    sizes: tuple[int, ...] = (1, 2, 4, 8)
    if tiny:
        default, sizes, threads = Point(100, 16, 20, 1), (1, 2), threads[:1]
    return {
        "samples": [replace(default, samples=default.samples * size) for size in sizes],
        "parameters": [replace(default, hidden=default.hidden * size) for size in sizes],
        "batch size": [replace(default, batch_size=default.batch_size // 2 * size) for size in sizes],
        "threads": [replace(default, threads=count) for count in threads],
    }


# One point -----------------------------------------------------------------------------------------------------------


def make_loop(point: Point) -> tuple[Loop, MLP, int]:
    """A loop on random images, the network that it was handed, and the bytes of that and the data."""
    source = torch.Generator().manual_seed(0)

    def samples(count: int) -> Samples:
        x = torch.rand(count, *IMAGE, generator=source)
        return Samples(x, *(torch.randint(CLASSES, shape, generator=source) for shape in ((count,), (count, 1))))

    train, val, model = samples(point.samples), samples(CLASSES), MLP(hidden=point.hidden)
    settings = Settings("relu3", CLASSES, batch_size=point.batch_size, schedule=point.schedule)
    handed_in = (part for part in (*train, *val, *model.parameters()) if isinstance(part, torch.Tensor))
    return Loop(Problem(settings, model, train, val, point.hidden)), model, sum(tensor.nbytes for tensor in handed_in)


def run_point(point: Point) -> Cost:
    """Everything that a run does: the start, epochs, and the judgement of the pruned network."""
    torch.set_num_threads(point.threads)
    _run(make_loop(replace(point, samples=point.batch_size, hidden=16))[0])  # what PyTorch takes once
    before = resident()
    loop, _model, own = make_loop(point)  # a user keeps the network, too
    seconds, training = _run(loop)
    return Cost(loop.gates.count, seconds, training - before, peak_resident() - before, own)


def _run(loop: Loop) -> tuple[float, int]:
    """Seconds of an epoch, and the peak of resident memory before the first judgement."""
    loop.start()
    seconds = min(_epoch(loop) for _ in range(2))
    training = peak_resident()
    loop.judge()
    _epoch(loop)
    return seconds, training


def _epoch(loop: Loop) -> float:
    started = time.perf_counter()
    loop.train_gates()
    loop.network.features(loop.train.x)
    return time.perf_counter() - started


def in_own_process(point: Point) -> Cost:
    """The point's cost, of a fresh process, whose peak is its own. ``RuntimeError`` with its last words if it fails."""
    command = [sys.executable, "-m", "ffw_fast.benchmarks.growth", "--point", json.dumps(asdict(point))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the process of {point} failed:\n{done.stderr}")
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


# Growth --------------------------------------------------------------------------------------------------------------


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """``e`` of the power law ``cost ~ size^e``, least squares on logarithms; NaN for a single size."""
    if len(sizes) < 2:
        return float("nan")
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def size_of(swept: str, point: Point, cost: Cost) -> int:
    """The size that is varied."""
    return {"parameters": cost.gates, "batch size": point.batch_size}.get(swept) or getattr(point, swept)


def bytes_per_gate(costs: Iterable[Cost]) -> tuple[float, float]:
    """By how many bytes the extraction's own peak grows with each gated parameter: slopes of the fitted lines.

    Network and data are subtracted. The first is until the pruned network is first judged, the second from then on.
    """
    sizes = [(cost.gates, cost.training - cost.own, cost.peak - cost.own) for cost in costs]
    gates, *peaks = zip(*sizes, strict=True)
    training, judged = (float(np.polyfit(gates, values, 1)[0]) for values in peaks)
    return training, judged


Measured = dict[str, list[tuple[Point, Cost]]]


def table(measured: Measured) -> Table:
    shown = Table(title="what an epoch costs; exponents of fitted power laws")
    for column in ("varied", "size"):
        shown.add_column(column)
    for column in ("gated parameters", "s an epoch", "exponent", "peak memory, MiB", "exponent"):
        shown.add_column(column, justify="right")
    for swept, points in measured.items():
        sizes = [size_of(swept, *pair) for pair in points]
        costs = [cost for _, cost in points]
        for number, (size, cost) in enumerate(zip(sizes, costs, strict=True)):
            last = number == len(costs) - 1
            shown.add_row(
                swept if number == 0 else "",
                str(size),
                str(cost.gates),
                f"{cost.seconds:.3f}",
                f"{exponent(sizes, [cost.seconds for cost in costs]):.2f}" if last else "",
                f"{cost.peak / 2**20:.0f}",
                f"{exponent(sizes, [cost.peak for cost in costs]):.2f}" if last else "",
                end_section=last,
            )
    return shown


def plot(measured: Measured, path: Path) -> None:
    """Time and peak memory over each size, on logarithmic axes."""
    from ffw_fast.benchmarks.figures import new_figure

    figure, panels = new_figure(3.2 * len(measured), 3.2, len(measured))
    for (swept, points), axes in zip(measured.items(), panels, strict=True):
        sizes = [size_of(swept, *pair) for pair in points]
        for values, label in (
            ([cost.seconds for _, cost in points], "seconds an epoch"),
            ([cost.peak / 2**30 for _, cost in points], "peak memory, GiB"),
        ):
            axes.loglog(sizes, values, "o-", label=f"{label}, exponent {exponent(sizes, values):.2f}")
        axes.set_xlabel(swept)
        axes.legend(fontsize=6)
    figure.savefig(path)


def record(measured: Measured) -> dict[str, Any]:
    """The points and their costs, with machine and versions."""
    rows = [
        {"varied": swept, **asdict(point), **asdict(cost)} for swept, pairs in measured.items() for point, cost in pairs
    ]
    return {"machine": describe(), "rows": rows}


def main(arguments: list[str] | None = None) -> None:
    parser = bench_parser("growth", __doc__)
    add_json(parser)
    parser.add_argument("--plot", type=Path, help="draw time and memory over each size (needs the extra `figures`)")
    parser.add_argument("--memory", action="store_true", help="vary parameters alone: peak memory per gated parameter")
    parser.add_argument("--schedule", default="published", help="of the temperature (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a dry run on tiny sizes, whose figures say nothing")
    parser.add_argument("--point", help=argparse.SUPPRESS)  # the sizes of the one point that this process measures
    options = parser.parse_args(arguments)
    if options.point:
        print(json.dumps(asdict(run_point(Point(**json.loads(options.point))))))
        return
    if options.plot:
        from ffw_fast.benchmarks.figures import need_matplotlib

        need_matplotlib()
    chosen = sweeps(options.tiny)
    if options.memory:  # two steps will do
        chosen = {"parameters": [replace(point, samples=2 * point.batch_size) for point in chosen["parameters"]]}
    measured: Measured = {}
    for swept, points in chosen.items():
        print(f"{swept} ...", flush=True)
        points = [replace(point, schedule=options.schedule) for point in points]
        measured[swept] = [(point, in_own_process(point)) for point in points]
    print_table(table(measured))
    training, judged = bytes_per_gate(cost for _, cost in measured["parameters"])
    print("peak memory per gated parameter, beyond the network and the data handed in:")
    print(f"{training:.1f} bytes, and {judged:.1f} once the pruned network was judged and its scores are kept")
    write_record(options.json, record(measured) | {"bytes_per_gate": [training, judged]})
    if options.plot:
        plot(measured, options.plot)


if __name__ == "__main__":
    main()
