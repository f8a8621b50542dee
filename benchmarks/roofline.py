"""The roofline on paper: what every layer and kernel of Table 8's networks costs an A100 at least, and a projection.

The floor of a kernel is the larger of its FLOPs over the arithmetic rate and its bytes over the memory's bandwidth
(A100, 40 GB: 19.5 TFLOP/s fp32, 156 tf32, 312 bf16, 1.555 TB/s). Nothing here was measured on a GPU: the projected
times are floors divided by assumed fractions, which stand in ``ASSUMPTIONS`` and are printed with them. The job is that
of ``ffw-fast bench table8``: so many epochs of the gates, so many head epochs in each refit.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from ffw_fast.benchmarks.a100 import BYTES_PER_SECOND, MATRIX_RATES, MULTIPROCESSORS, SINGLE_RATE
from ffw_fast.benchmarks.command import add_json, bench_parser, write_record
from ffw_fast.benchmarks.jobs import Job, Layer, all_layers, chosen_jobs
from ffw_fast.benchmarks.table8 import ADAM_BYTES, EPOCHS, HEAD_EPOCHS
from rich.table import Table

from ffw_fast.data.samples import EVALUATION_BATCH
from ffw_fast.tables import print_table

# All that the projection assumes beyond the floors. None of it was measured.
MATRIX_FRACTION = 0.5  # of the matrix rate, by cuDNN and cuBLAS on layers of this size
BYTES_FRACTION = 0.8  # of the bandwidth, by kernels with 16-byte accesses
LEAST_COLUMNS = 32  # of a tile: a product with fewer wastes the rest
GRAPH_SECONDS = 3e-6  # least time from one kernel to the next inside a CUDA graph
EAGER_SECONDS = 10e-6  # for PyTorch to launch one operator from Python
OTHER_KERNELS = 40  # of a step: losses, head, optimizer and what lies between; each takes its least time
HEAD_FRACTION = 0.3  # of one multiprocessor's fp32 rate: a head learns on one, its weights in shared memory
HEAD_STEP_SECONDS = 3e-6  # barriers of one minibatch of a head

ASSUMPTIONS = (
    f"matrix products reach {MATRIX_FRACTION:.0%} of the peak (less below {LEAST_COLUMNS} columns), other kernels "
    f"{BYTES_FRACTION:.0%} of the bandwidth",
    f"a kernel takes at least {1e6 * GRAPH_SECONDS:g} us in a CUDA graph and {1e6 * EAGER_SECONDS:g} us eagerly; a "
    f"step has {OTHER_KERNELS} small ones beside those of the layers",
    f"a head learns on one of {MULTIPROCESSORS} multiprocessors at {HEAD_FRACTION:.0%} of its fp32 rate, and "
    f"{1e6 * HEAD_STEP_SECONDS:g} us a minibatch",
    f"{EPOCHS} epochs of the gates and {HEAD_EPOCHS} head epochs in each refit; residual additions, pools, judging the "
    "pruned networks and reading data are left out",
)


@dataclass(frozen=True)
class Kernel:
    """One kernel's work.

    Attributes:
        network, layer, name: where it runs.
        flops: of matrix products, 0 where memory alone counts.
        bytes: read and written.
        rate: FLOP/s that its products can reach at most.
        columns: of its output's matrix.
    """

    network: str
    layer: str
    name: str
    flops: float
    bytes: float
    rate: float
    columns: int = LEAST_COLUMNS

    @property
    def floor(self) -> float:
        """Seconds that it takes at least."""
        return max(self.flops / self.rate, self.bytes / BYTES_PER_SECOND)

    @property
    def projected(self) -> float:
        """Seconds in a CUDA graph, by the assumptions."""
        fraction = MATRIX_FRACTION * min(1.0, self.columns / LEAST_COLUMNS)
        work = max(self.flops / (self.rate * fraction), self.bytes / (BYTES_PER_SECOND * BYTES_FRACTION))
        return max(work, GRAPH_SECONDS)


def layer_kernels(layer: Layer, batch: int, precision: str, training: bool) -> Iterator[Kernel]:
    """The kernels of one layer in a forward pass of a minibatch and, in training, in the backward pass."""
    size = 2 if precision == "bf16" else 4
    x, y, v = (size * batch * prod(layer.inputs), size * batch * prod(layer.outputs), size * _weights(layer))
    outs, ins = layer.dense.weight.shape[:2]
    flops, rate = batch * layer.flops, MATRIX_RATES[precision]
    is_last = layer.outputs == (outs,) and outs <= 10  # the classifier has no non-linearity

    def kernel(name: str, flops: float, moved: float, columns: int = LEAST_COLUMNS) -> Kernel:
        return Kernel(layer.network, layer.shape, name, flops, moved, rate, columns)

    yield kernel("forward", flops, x + v + y, outs)
    if not is_last:
        yield kernel("non-linearity", 0, 2 * y)
    if not training:
        return
    if not is_last:
        yield kernel("non-linearity's gradient", 0, 3 * y)
    if not layer.is_first:
        yield kernel("gradient of the input", flops, x + v + y, ins)
    yield kernel("gradient of the weight", flops, x + v + y, outs)
    yield kernel("its sum", 0, (size + 2 * 4) * _weights(layer))  # added to the flat buffer, which is float32


def _weights(layer: Layer) -> int:
    return layer.dense.weight.numel()


def optimizer_kernels(job: Job, precision: str) -> Iterator[Kernel]:
    """What passes over the flat buffers in every step."""
    gates = sum(_weights(layer) for layer in all_layers(job))
    for name, moved in (("gated_adam_step_", ADAM_BYTES), ("zero_grad", 4)):
        yield Kernel(job.name, f"{gates} gates", name, 0, moved * gates, SINGLE_RATE)
    if precision == "bf16":
        yield Kernel(job.name, f"{gates} gates", "gated weights to bf16", 0, 6 * gates, SINGLE_RATE)


def step_kernels(job: Job, precision: str) -> list[Kernel]:
    """The kernels of one training step, but for the small ones."""
    layers = [
        kernel for layer in all_layers(job) for kernel in layer_kernels(layer, job.batch_size, precision, training=True)
    ]
    return [*layers, *optimizer_kernels(job, precision)]


def feature_kernels(job: Job, precision: str) -> list[Kernel]:
    """The kernels of a pass without gradients over one batch of ``EVALUATION_BATCH`` samples."""
    return [
        kernel
        for layer in all_layers(job)
        for kernel in layer_kernels(layer, EVALUATION_BATCH, precision, training=False)
    ]


@dataclass(frozen=True)
class Projection:
    """Seconds of one row of Table 8, projected. Steps are of a minibatch, all else of the whole job.

    Attributes:
        floor: of all kernels of the networks, heads not counted.
        step_eager, step_graph: one training step.
        eager, graph: the whole job without and with CUDA graphs.
    """

    workload: str
    precision: str
    floor: float
    step_eager: float
    step_graph: float
    gates: float
    features: float
    heads: float
    eager: float
    graph: float
    paper: float


def project(job: Job, precision: str) -> Projection:
    """Sum up a row."""
    step, batch = step_kernels(job, precision), feature_kernels(job, precision)
    batches = (job.train + job.val) / EVALUATION_BATCH
    graph = sum(kernel.projected for kernel in step) + OTHER_KERNELS * GRAPH_SECONDS
    eager = max(graph, (len(step) + OTHER_KERNELS) * EAGER_SECONDS)
    features = EPOCHS * batches * max(sum(k.projected for k in batch), len(batch) * EAGER_SECONDS)
    heads = EPOCHS * HEAD_EPOCHS * head_epoch(job)
    floor = EPOCHS * (job.steps * sum(k.floor for k in step) + batches * sum(k.floor for k in batch))
    gates = {"eager": EPOCHS * job.steps * eager, "graph": EPOCHS * job.steps * graph}
    return Projection(
        job.name, precision, floor, eager, graph, gates["graph"], features, heads,
        gates["eager"] + features + heads, gates["graph"] + features + heads, job.paper_seconds,
    )  # fmt: skip


def head_epoch(job: Job) -> float:
    """Seconds of one epoch of the heads, which learn beside each other."""
    width = all_layers(job)[-1].inputs[0]
    rate = HEAD_FRACTION * SINGLE_RATE / MULTIPROCESSORS
    return 6 * job.train * width * job.classes / rate + job.steps * HEAD_STEP_SECONDS


def kernel_table(kernels: list[Kernel], precision: str) -> Table:
    """One line a kernel of a training step."""
    table = Table(title=f"Kernels of one training step on an A100, {precision}: floors and projections on paper")
    for title in ("network", "layer", "kernel"):
        table.add_column(title)
    for title in ("GFLOP", "MB", "floor, us", "bound by", "projected, us"):
        table.add_column(title, justify="right")
    for kernel in kernels:
        bound = "FLOPs" if kernel.flops / kernel.rate > kernel.bytes / BYTES_PER_SECOND else "bytes"
        table.add_row(
            kernel.network, kernel.layer, kernel.name, f"{kernel.flops / 1e9:.3g}", f"{kernel.bytes / 1e6:.3g}",
            f"{1e6 * kernel.floor:.1f}", bound, f"{1e6 * kernel.projected:.1f}",
        )  # fmt: skip
    return table


def projection_table(rows: list[Projection]) -> Table:
    """Table 8 on an A100, projected, beside the paper's times."""
    table = Table(title="Table 8 on an A100: a PROJECTION, not a measurement")
    for title in ("workload", "precision"):
        table.add_column(title)
    heads = ("step eager, us", "step in a graph, us", "networks' floor, s", "gates, s", "features, s", "heads, s")
    for title in (*heads, "eager, s", "with graphs, s", "paper, s", "paper / projected"):
        table.add_column(title, justify="right")
    for row in rows:
        seconds = (row.floor, row.gates, row.features, row.heads, row.eager, row.graph)
        table.add_row(
            row.workload, row.precision, f"{1e6 * row.step_eager:.0f}", f"{1e6 * row.step_graph:.0f}",
            *(f"{value:.3g}" for value in seconds), f"{row.paper:.0f}", f"{row.paper / row.graph:.0f}x",
        )  # fmt: skip
    return table


def record(rows: list[Projection]) -> dict[str, Any]:
    """What is written as JSON."""
    return {"what": "projection, not measured", "assumptions": ASSUMPTIONS, "rows": [asdict(row) for row in rows]}


def main(arguments: list[str] | None = None) -> None:
    """Print both tables."""
    parser = bench_parser("roofline", __doc__)
    parser.add_argument("--only", nargs="*", default=[], help="names of workloads, or parts of them (default: all)")
    parser.add_argument("--precision", nargs="*", default=["tf32", "bf16"], choices=sorted(MATRIX_RATES))
    parser.add_argument("--kernels", action="store_true", help="also every kernel of a training step")
    add_json(parser, "the projections")
    options = parser.parse_args(arguments)
    jobs = chosen_jobs(options.only)
    if options.kernels:
        for precision in options.precision:
            print_table(kernel_table([kernel for job in jobs for kernel in step_kernels(job, precision)], precision))
    rows = [project(job, precision) for job in jobs for precision in options.precision]
    print_table(projection_table(rows))
    print("Assumed: " + "; ".join(ASSUMPTIONS) + ".")
    write_record(options.json, record(rows))


if __name__ == "__main__":
    main()
