"""Every operator on the shapes of Table 8's networks, against eager PyTorch, ``torch.compile`` and the floor, float32.

One setup function for each operator gives what speed, memory and correctness are measured on. The measuring is
pytest-benchmark's (``test_operators.py``: ``pytest benchmarks --benchmark-only``), which refuses a speed where the
result differs from eager PyTorch's; ``ffw-fast bench operators`` runs it, prints one table, and writes CSV and a plot.

Providers: ``ffw_fast``, the operator as the package calls it; ``eager``, the same in plain PyTorch; ``compile``, that
through ``torch.compile``. Modes: ``forward`` and ``backward`` are one operator; ``both`` is an output
and all gradients that the network needs, by autograd; ``step`` and ``epoch`` train.

The floor is what FLOPs and bytes take that no way of computing the operator can do without, at the matrix rate and at
the rate of copying as many bytes, both measured in the same run: the longer of the two. Of an FFT convolution the FLOPs
are those of the products in the frequency domain; transforms count as free. Peak memory is what one call holds of
PyTorch's allocator at a time, beside its arguments.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from ffw_fast.benchmarks.command import bench_parser
from ffw_fast.benchmarks.jobs import JOBS, TINY_JOBS, Job, Layer, calls_of, feature_width, layers_of
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ffw_fast import heads, ops, optim, philox
from ffw_fast.autograd import MutualInformation
from ffw_fast.convolutions import fft
from ffw_fast.gates import GateKind, gate, gate_slope
from ffw_fast.masking import maskable_layers
from ffw_fast.modules import MASKED_CLASSES
from ffw_fast.reference import StraightThroughGate
from ffw_fast.tables import print_table

PROVIDERS = ("ffw_fast", "eager", "compile")
KIND = GateKind.FFW
TOLERANCE = 1e-4  # of the largest number of a result, between two ways of computing it in float32
SUITE = Path(__file__).with_name("test_operators.py")
Run = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Work:
    """What is measured of one operator on one shape.

    Attributes:
        run: provider -> computes the results once; each provider has tensors of its own, so that one that trains in
            place gives the same as the others in its first call.
        flops, bytes: that cannot be done without.
    """

    run: dict[str, Run]
    flops: float
    bytes: float


@dataclass(frozen=True)
class Case:
    """One operator, mode and shape; ``setup`` makes the tensors."""

    operator: str
    mode: str
    shape: str
    setup: Callable[[], Work]

    def __str__(self) -> str:
        return f"{self.operator} {self.mode} {self.shape}"


def check_same(results: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """``AssertionError`` where a result is not what eager PyTorch gives."""
    assert len(results) == len(expected)
    for number, (ours, theirs) in enumerate(zip(results, expected, strict=True)):
        assert ours.shape == theirs.shape, f"result {number} has shape {tuple(ours.shape)}, not {tuple(theirs.shape)}"
        error = (ours - theirs).abs().max().item() / max(theirs.abs().max().item(), torch.finfo(torch.float32).tiny)
        # NaN is not below anything
        assert error < TOLERANCE, f"result {number} differs from eager PyTorch by {error:.1e} of its largest number"


def providers(ours: Run, eager: Run, compiled: Callable[..., Any] | None = None, *arguments: Any) -> dict[str, Run]:
    """The three of them; ``compiled`` with its arguments where what is compiled is not ``eager`` itself."""
    return {"ffw_fast": ours, "eager": eager, "compile": partial(torch.compile(compiled or eager), *arguments)}


def size_of(*tensors: Tensor) -> int:
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# The gate ------------------------------------------------------------------------------------------------------------


def gate_inputs(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradient, weight, scores, temperature and draw of so many gates."""
    grad, weight, scores = torch.randn(3, count).unbind()
    return grad.contiguous(), weight.contiguous(), 0.1 * scores, torch.ones(()), philox.make_draw(0)


def gate_weight(count: int) -> Work:
    _, weight, scores, temperature, draw = gate_inputs(count)

    def eager() -> list[Tensor]:
        return [weight * gate(KIND, scores, temperature, None)]

    run = providers(lambda: [ops.gate_weight(weight, scores, temperature, draw, int(KIND))], eager)
    return Work(run, 0, 3 * size_of(weight))


def gate_weight_backward(count: int) -> Work:
    grad, *inputs = gate_inputs(count)
    weight, scores, temperature, _ = inputs

    def eager() -> list[Tensor]:
        return [grad * weight * gate_slope(KIND, scores, temperature, None)]

    run = providers(lambda: [ops.gate_weight_backward(grad, *inputs, int(KIND))], eager)
    return Work(run, 0, 4 * size_of(weight))


def gated_adam_step(count: int) -> Work:
    """Against the straight-through gradient, ``torch.optim.Adam`` and the new gated weight."""
    grad, weight, scores, temperature, draw = gate_inputs(count)

    def ours() -> Run:
        state = [torch.zeros_like(scores), scores.clone(), torch.zeros_like(scores), torch.zeros_like(scores)]
        movement, step, lr = torch.zeros((), dtype=torch.float64), torch.zeros(()), torch.tensor(optim.LR)
        settings = (*optim.BETAS, optim.EPS, optim.WEIGHT_DECAY, int(KIND), False)

        def run() -> list[Tensor]:
            step.add_(1)
            temperatures, draws = (temperature, temperature), (draw, draw)
            ops.gated_adam_step_(*state, movement, weight, grad, *temperatures, step, lr, *draws, *settings)
            return state

        return run

    def plain() -> Run:
        trained, gated = nn.Parameter(scores.clone()), torch.zeros_like(scores)
        trained.grad = torch.zeros_like(scores)
        adam = torch.optim.Adam([trained], optim.LR, optim.BETAS, optim.EPS, optim.WEIGHT_DECAY)

        @torch.no_grad()
        def run() -> list[Tensor]:
            trained.grad = grad * weight * gate_slope(KIND, trained, temperature, None)
            adam.step()
            torch.mul(weight, gate(KIND, trained, temperature, None), out=gated)
            return [gated, trained, adam.state[trained]["exp_avg"], adam.state[trained]["exp_avg_sq"]]

        return run

    run = providers(ours(), plain(), _adam_formula, grad, weight, temperature, _adam_state(scores))
    return Work(run, 0, 9 * size_of(weight))


def _adam_state(scores: Tensor) -> list[Tensor]:
    return [*(torch.zeros_like(scores) for _ in range(3)), scores.clone(), torch.zeros((), dtype=torch.float64)]


def _adam_formula(grad: Tensor, weight: Tensor, temperature: Tensor, state: list[Tensor]) -> list[Tensor]:
    """The same step as formulas, which ``torch.compile`` can fuse into one loop."""
    gated, exp_avg, exp_avg_sq, scores, step = state
    step += 1
    beta1, beta2 = optim.BETAS
    gradient = grad * weight * gate_slope(KIND, scores, temperature, None) + optim.WEIGHT_DECAY * scores
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    size = (optim.LR / (1 - beta1**step)).float()
    scale = (1 - beta2**step).sqrt().float()
    scores.sub_(size * exp_avg / (exp_avg_sq.sqrt() / scale + optim.EPS))
    gated.copy_(weight * gate(KIND, scores, temperature, None))
    return [gated, scores, exp_avg, exp_avg_sq]


# Mutual information and the private heads ----------------------------------------------------------------------------


def mutual_information(samples: int, biases: int, classes: int, mode: str) -> Work:
    logits = torch.randn(samples, biases, classes, requires_grad=mode == "both")
    labels = torch.randint(classes, (samples, biases))

    def with_gradient(information: Tensor) -> list[Tensor]:
        if mode == "forward":
            return [information]
        return [information.detach(), *torch.autograd.grad(information.sum(), logits)]

    def formula() -> Tensor:
        return ops.joint_information(ops.joint_distribution(logits, labels))

    compiled = torch.compile(formula)
    run: dict[str, Run] = {
        "ffw_fast": lambda: with_gradient(MutualInformation.apply(logits, labels)[0]),
        "eager": lambda: with_gradient(formula()),
        "compile": lambda: with_gradient(compiled()),
    }
    passes = 1 if mode == "forward" else 3  # the gradient reads the logits again
    return Work(run, 0, passes * size_of(logits) + size_of(labels))


def objective(samples: int, biases: int, classes: int) -> Work:
    """Losses of a minibatch and the gradient of J by both kinds of logits, as FFW weighs them."""
    alpha, gamma = 1.0, 10.0
    logits = torch.randn(samples, classes, requires_grad=True)
    head_logits = torch.randn(samples, biases, classes, requires_grad=True)
    labels, bias_labels = torch.randint(classes, (samples,)), torch.randint(classes, (samples, biases))

    def losses() -> tuple[Tensor, Tensor, Tensor]:
        task = cross_entropy(logits, labels)
        information = ops.joint_information(ops.joint_distribution(head_logits, bias_labels)).mean()
        return alpha * task + gamma * information, task, information

    def with_gradient(found: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
        return [torch.stack(found).detach(), *torch.autograd.grad(found[0], (logits, head_logits))]

    def ours() -> list[Tensor]:
        given = (logits.detach(), labels, head_logits.detach(), bias_labels)
        return list(ops.objective(*given, None, None, alpha, gamma, 1 / biases))

    compiled = torch.compile(losses)
    run: dict[str, Run] = {
        "ffw_fast": ours,
        "eager": lambda: with_gradient(losses()),
        "compile": lambda: with_gradient(compiled()),
    }
    return Work(run, 0, 3 * (size_of(logits) + size_of(head_logits)) + size_of(labels) + size_of(bias_labels))


def fit_linear_head(samples: int, width: int, biases: int, classes: int, batch_size: int) -> Work:
    """One epoch of all heads, against a loop over minibatches with autograd and ``torch.optim.SGD``."""
    features, labels = torch.randn(samples, width), torch.randint(classes, (samples, biases))
    order, start = torch.randperm(samples), heads.initial_parameters(biases, classes, width, 0)

    def ours() -> Run:
        weight, bias = (value.clone() for value in start)
        momenta = torch.zeros_like(weight), torch.zeros_like(bias)
        plateau = torch.tensor([torch.inf, 0, 0], dtype=torch.float64)
        settings = (heads.LR, heads.MOMENTUM, heads.WEIGHT_DECAY, heads.PLATEAU_THRESHOLD, heads.PLATEAU_PATIENCE)

        def run() -> list[Tensor]:
            plateau[2] = 0  # the epochs that are measured go on where training would end
            ops.fit_linear_head_(
                weight, bias, *momenta, plateau, features, labels, order.unsqueeze(0), batch_size, *settings
            )
            return [weight, bias]

        return run

    def plain() -> Run:
        weight, bias = (value.clone().requires_grad_() for value in start)
        sgd = torch.optim.SGD([weight, bias], heads.LR, heads.MOMENTUM, weight_decay=heads.WEIGHT_DECAY)

        def run() -> list[Tensor]:
            for rows in order.split(batch_size):
                logits = torch.einsum("nd,hkd->nkh", features[rows], weight) + bias.T
                sgd.zero_grad()
                (biases * cross_entropy(logits, labels[rows])).backward()
                sgd.step()
            return [weight.detach(), bias.detach()]

        return run

    def through_compile() -> Run:
        step = torch.compile(_head_formula)
        values = [value.clone() for value in start]
        buffers = [torch.zeros_like(value) for value in start]

        def run() -> list[Tensor]:
            for rows in order.split(batch_size):
                step(features, labels, rows, values, buffers)
            return values

        return run

    flops = 3 * 2 * samples * width * classes * biases
    run = {"ffw_fast": ours(), "eager": plain(), "compile": through_compile()}
    return Work(run, flops, size_of(features, labels))


def _head_formula(features: Tensor, labels: Tensor, rows: Tensor, values: list[Tensor], buffers: list[Tensor]) -> None:
    """One step as formulas, gradient included, which ``torch.compile`` takes as one graph."""
    (weight, bias), x, y = values, features[rows], labels[rows]
    error = torch.softmax(torch.einsum("nd,hkd->nhk", x, weight) + bias, dim=-1)
    error = (error - nn.functional.one_hot(y, bias.shape[1])) / len(rows)
    for value, buffer, gradient in zip(
        values, buffers, (torch.einsum("nhk,nd->hkd", error, x), error.sum(0)), strict=True
    ):
        buffer.mul_(heads.MOMENTUM).add_(gradient).add_(value, alpha=heads.WEIGHT_DECAY)
        value.sub_(buffer, alpha=heads.LR)


# Layers --------------------------------------------------------------------------------------------------------------


def layer_tensors(layer: Layer, batch: int, mode: str) -> tuple[Tensor, Tensor]:
    """Input, which wants a gradient where the network needs it, and the gradient of the output."""
    x = torch.randn(batch, *layer.inputs, requires_grad=mode == "both" and not layer.is_first)
    return x, torch.randn(batch, *layer.outputs)


def forward_or_both(compute: Callable[[], Tensor], leaves: Iterable[Tensor], grad: Tensor, mode: str) -> Run:
    """Runs a layer, and in the mode ``both`` takes the gradients of those leaves that want one."""
    wanted = [leaf for leaf in leaves if leaf.requires_grad]

    def run() -> list[Tensor]:
        if mode == "forward":
            with torch.no_grad():
                return [compute()]
        y = compute()
        return [y.detach(), *torch.autograd.grad(y, wanted, grad)]

    return run


def layer_floor(layer: Layer, batch: int, mode: str) -> tuple[float, float]:
    """FLOPs and bytes: the gate reads weight and scores; gradients read their operands again."""
    passes = 1 if mode == "forward" else 2 if layer.is_first else 3
    images = 4 * batch * (torch.Size(layer.inputs).numel() + torch.Size(layer.outputs).numel())
    weights = 2 * size_of(layer.dense.weight)
    return passes * batch * layer.flops, images * passes + weights * passes


def masked_layer(layer: Layer, batch: int, mode: str) -> Work:
    """A masked layer against the dense one on a weight that is gated in plain PyTorch."""
    masked: Any = MASKED_CLASSES[type(layer.dense)].from_dense(layer.dense)
    nn.init.normal_(masked.scores, std=0.1)
    x, grad = layer_tensors(layer, batch, mode)
    scores = masked.scores.detach().clone().requires_grad_()
    dense, temperature = layer.dense, torch.ones(())

    def plain() -> Tensor:
        weight = masked.weight * StraightThroughGate.apply(scores, KIND, temperature, None)
        if isinstance(dense, nn.Linear):
            return nn.functional.linear(x, weight, masked.bias)
        return dense._conv_forward(x, weight, masked.bias)

    run = {
        "ffw_fast": forward_or_both(lambda: masked(x), (masked.scores, x), grad, mode),
        "eager": forward_or_both(plain, (scores, x), grad, mode),
        "compile": forward_or_both(torch.compile(plain), (scores, x), grad, mode),
    }
    return Work(run, *layer_floor(layer, batch, mode))


def fft_layer(layer: Layer, batch: int, mode: str) -> Work:
    """A convolution by FFT against the direct one, both with a gradient of the weight."""
    dense = layer.dense
    x, grad = layer_tensors(layer, batch, mode)
    weight = dense.weight.detach().clone().requires_grad_(mode == "both")
    bias = None if dense.bias is None else dense.bias.detach()

    def plain() -> Tensor:
        return dense._conv_forward(x, weight, bias)  # type: ignore[operator]

    run = {
        "ffw_fast": forward_or_both(lambda: fft.fft_conv2d(x, weight, bias), (weight, x), grad, mode),
        "eager": forward_or_both(plain, (weight, x), grad, mode),
        "compile": forward_or_both(torch.compile(plain), (weight, x), grad, mode),
    }
    flops, moved = layer_floor(layer, batch, mode)
    lengths = (fft.transform_length(size, taps) for size, taps in zip(x.shape[2:], weight.shape[2:], strict=True))
    products = 6 * fft.kept_frequencies(*lengths) * weight.shape[0] * weight.shape[1] * batch
    return Work(run, products * flops / (batch * layer.flops), moved)


def tanh(shape: tuple[int, ...]) -> Work:
    """In place; what is measured after the first call are tangents of tangents, which take as long."""
    x = torch.randn(shape)

    def of(tanh_: Callable[[Tensor], Any]) -> Run:
        own = x.clone()

        def run() -> list[Tensor]:
            tanh_(own)
            return [own]

        return run

    run = {
        "ffw_fast": of(torch.ops.ffw_fast.tanh_),
        "eager": of(torch.tanh_),
        "compile": of(torch.compile(lambda own: own.tanh_())),
    }
    return Work(run, 0, 2 * size_of(x))


# All of them ---------------------------------------------------------------------------------------------------------


def cases(jobs: Iterable[Job]) -> list[Case]:
    """Every operator on the shapes of the jobs, each shape once."""
    found: dict[str, Case] = {}

    def add(operator: str, mode: str, shape: str, setup: Callable[..., Work], *arguments: Any) -> None:
        case = Case(operator, mode, shape, partial(setup, *arguments))
        found.setdefault(str(case), case)

    for job in jobs:
        model = job.network()
        gates = sum(layer.weight.numel() for layer in maskable_layers(model).values())
        add("gate_weight", "forward", f"{gates}", gate_weight, gates)
        add("gate_weight", "backward", f"{gates}", gate_weight_backward, gates)
        add("gated_adam_step_", "step", f"{gates}", gated_adam_step, gates)
        head = f"{job.biases} of {job.classes} classes"
        for mode in ("forward", "both"):
            logits = (job.batch_size, job.biases, job.classes)
            add("mutual_information", mode, f"{job.batch_size} samples, {head}", mutual_information, *logits, mode)
        add("objective", "both", f"{job.batch_size} samples, {head}", objective, *logits)
        sizes = (job.train, feature_width(job, model), job.biases, job.classes, job.batch_size)
        add("fit_linear_head_", "epoch", f"{sizes[0]}x{sizes[1]}, {head}", fit_linear_head, *sizes)
        for shape in tanh_shapes(job, model):
            add("tanh_", "forward", "x".join(map(str, shape)), tanh, shape)
        for layer in layers_of(job):
            name = "masked_linear" if isinstance(layer.dense, nn.Linear) else "masked_conv2d"
            for mode in ("forward", "both"):
                add(name, mode, layer.shape, masked_layer, layer, job.batch_size, mode)
                if _by_fft(layer):
                    add("fft_conv2d", mode, layer.shape, fft_layer, layer, job.batch_size, mode)
    return sorted(found.values(), key=lambda case: (case.operator, case.mode))


def tanh_shapes(job: Job, model: nn.Module) -> list[tuple[int, ...]]:
    """Of what each tanh of the job's network gets of a minibatch."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Tanh)]
    return [(job.batch_size, *shape) for _layer, shape, _outputs in calls_of(job, model, layers)]


def _by_fft(layer: Layer) -> bool:
    """Whether ``fft_conv2d`` takes the layer: 'same' convolutions with large kernels, stride 1."""
    dense = layer.dense
    return isinstance(dense, nn.Conv2d) and dense.kernel_size[0] > 3 and dense.stride == (1, 1)


def all_cases(tiny: bool) -> list[Case]:
    return cases(TINY_JOBS if tiny else JOBS)


# Results -------------------------------------------------------------------------------------------------------------


def rows_of(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each operator, mode, shape and provider, of pytest-benchmark's JSON: seconds, bytes, and where."""
    machine, rows = measured["ffw_fast"], []
    where = {name: value for name, value in machine.items() if name not in ("rates", "gpu")}
    for benchmark in measured["benchmarks"]:
        info, stats = benchmark["extra_info"], benchmark["stats"]
        floor = max(info["flops"] / machine["rates"]["fp32"], info["bytes"] / info["copy_rate"])
        rows.append(
            {
                **{name: info[name] for name in ("operator", "provider", "mode", "shape")},
                "device": "cpu",
                "dtype": "float32",
                "seconds": stats["median"],
                "best_seconds": stats["min"],
                "rounds": stats["rounds"],
                "floor_seconds": floor,
                "times_floor": stats["median"] / floor,
                "peak_bytes": info["peak_bytes"],
                **where,
            }
        )
    return rows


def grouped(rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, dict[str, Any]]]:
    """(operator, mode, shape) -> provider -> row."""
    groups: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["operator"], row["mode"], row["shape"]), {})[row["provider"]] = row
    return groups


def table(rows: list[dict[str, Any]]) -> Table:
    """Medians; ratios are those of the others' time to that of ``ffw_fast``."""
    shown = Table(title="operators, float32, medians")
    for column in ("operator", "mode", "shape"):
        shown.add_column(column)
    columns = ("ffw_fast, ms", "eager, ms", "ratio", "compile, ms", "ratio", "floor, ms", "times floor", "peak, MiB")
    for column in (*columns, "eager's"):
        shown.add_column(column, justify="right")
    for key, group in grouped(rows).items():
        ours, eager, compiled = (group.get(provider) for provider in PROVIDERS)
        floor = f"{1e3 * next(iter(group.values()))['floor_seconds']:.3f}"
        times = f"{ours['times_floor']:.2f}" if ours else "-"
        cells = [_milliseconds(ours)]
        for other in (eager, compiled):
            cells += [_milliseconds(other), f"{other['seconds'] / ours['seconds']:.2f}" if other and ours else "-"]
        peaks = (f"{row['peak_bytes'] / 2**20:.1f}" if row else "-" for row in (ours, eager))
        shown.add_row(*key, *cells, floor, times, *peaks)
    return shown


def _milliseconds(row: dict[str, Any] | None) -> str:
    return f"{1e3 * row['seconds']:.3f}" if row else "-"


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Every provider's time over the floor, one line a case."""
    from ffw_fast.benchmarks.figures import new_figure

    groups = grouped(rows)
    figure, (axes,) = new_figure(8, 1 + 0.2 * len(groups))
    for provider, marker in zip(PROVIDERS, "o|x", strict=True):
        points = [(group[provider]["times_floor"], at) for at, group in enumerate(groups.values()) if provider in group]
        if points:
            axes.scatter(*zip(*points, strict=True), marker=marker, label=provider)
    axes.set_yticks(range(len(groups)), [" ".join(key) for key in groups], fontsize=6)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("time over the floor")
    axes.axvline(1, color="black", linewidth=0.5)
    axes.legend()
    figure.savefig(path)


def measure(only: Sequence[str], chosen: Sequence[str], tiny: bool) -> list[dict[str, Any]]:
    """Run the suite. ``SystemExit`` where a result was wrong, of which pytest has then told."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "measured.json"
        words = ["-q", "-p", "no:cacheprovider", "--benchmark-only", "--benchmark-quiet", f"--benchmark-json={target}"]
        words += ["--providers", ",".join(chosen)]
        words += ["--tiny"] if tiny else []
        words += ["-k", " or ".join(only)] if only else []
        # Beside others of pytest-xdist nothing would be timed, and its workers hand their names on.
        alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        code = subprocess.run([sys.executable, "-m", "pytest", str(SUITE), *words], env=alone).returncode
        if code != 0:
            raise SystemExit("no table: a result is wrong or the suite failed, see above")
        return rows_of(json.loads(target.read_text()))


def main(arguments: list[str] | None = None) -> None:
    parser = bench_parser("operators", __doc__)
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="cases whose name holds one of the words")
    parser.add_argument("--providers", nargs="*", default=PROVIDERS, choices=PROVIDERS, help="default: all")
    parser.add_argument("--csv", type=Path, help="write one line for each case and provider, with machine and versions")
    parser.add_argument("--plot", type=Path, help="draw the times over the floor (needs the extra `figures`)")
    parser.add_argument("--tiny", action="store_true", help="a dry run on tiny shapes, whose times say nothing")
    options = parser.parse_args(arguments)
    for package in ("pytest", "pytest_benchmark"):
        if find_spec(package) is None:
            raise ImportError(f"{package} is missing: pip install 'ffw_fast[test]'")
    if options.plot:
        from ffw_fast.benchmarks.figures import need_matplotlib

        need_matplotlib()
    rows = measure(options.only, options.providers, options.tiny)
    print_table(table(rows))
    if options.csv:
        write_csv(rows, options.csv)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
