"""The four rows of the paper's Table 8: networks, sizes and times; and the layers that they are made of."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ffw_fast.bottleneck import outputs_of
from ffw_fast.data.samples import Samples
from ffw_fast.masking import maskable_layers
from ffw_fast.models import MLP
from ffw_fast.workloads import WORKLOADS

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """One row of the paper's Table 8."""

    name: str
    network: Callable[[], nn.Module]
    bottleneck: str
    image: tuple[int, int, int]
    classes: int
    biases: int
    train: int
    val: int
    paper_seconds: int
    batch_size: int = 100

    @property
    def steps(self) -> int:
        """Minibatches of an epoch."""
        return -(-self.train // self.batch_size)


def _of(name: str, title: str, image: tuple[int, int, int], train: int, val: int) -> Job:
    """A workload with images and unbiased sets of the paper's size."""
    known = WORKLOADS[name]
    assert known.paper_seconds is not None
    network = (known.network, known.bottleneck, image, known.num_classes, len(known.bias_names))
    return Job(title, *network, train, val, known.paper_seconds, known.batch_size)


JOBS = (
    _of("biased-mnist", "Biased-MNIST", (3, 28, 28), 36000, 12000),
    _of("celeba", "CelebA", (3, 224, 224), 437, 291),
    _of("corrupted-cifar10", "Corrupted CIFAR-10", (3, 32, 32), 6000, 2000),
    _of("multi-color-mnist", "Multi-Color MNIST", (3, 28, 28), 6000, 2000),
)


def _tiny_convolutions() -> nn.Module:
    layers = {"conv1": nn.Conv2d(3, 8, 7, padding=3), "relu": nn.ReLU(), "conv2": nn.Conv2d(8, 16, 3, stride=2)}
    behind = {"tanh": nn.Tanh(), "pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(16, 10)}
    return nn.Sequential(OrderedDict(layers | behind))


TINY_JOBS = (  # for dry runs
    Job("Tiny convolutions", _tiny_convolutions, "flatten", (3, 8, 8), 10, 1, 40, 20, 60, batch_size=4),
    Job("Tiny perceptron", lambda: MLP(3 * 6 * 6, hidden=16), "relu3", (3, 6, 6), 10, 2, 400, 200, 60, batch_size=50),
)


def chosen_jobs(parts: list[str], jobs: Sequence[Job] = JOBS) -> list[Job]:
    """The jobs whose name holds one of the parts, or all. ``ValueError`` with the known names where none does."""
    chosen = [job for job in jobs if not parts or any(part.lower() in job.name.lower() for part in parts)]
    if not chosen:
        raise ValueError(f"no workload is called {' or '.join(parts)}; there are {', '.join(job.name for job in jobs)}")
    return chosen


JOB, TINY_JOB = "Corrupted CIFAR-10", "Tiny convolutions"  # of a benchmark that takes one


def one_job(part: str | None, tiny: bool) -> Job:
    """The first job whose name holds the part; where none is named, ``JOB`` or ``TINY_JOB``."""
    jobs, default = (TINY_JOBS, TINY_JOB) if tiny else (JOBS, JOB)
    return chosen_jobs([part or default], jobs)[0]


def random_samples(job: Job, count: int) -> Samples:
    """As many samples as asked for, of the job's shapes."""
    source = torch.Generator().manual_seed(0)
    x = torch.randn(count, *job.image, generator=source)
    y = torch.randint(job.classes, (count,), generator=source)
    return Samples(x, y, torch.randint(job.classes, (count, job.biases), generator=source))


def feature_width(job: Job, model: nn.Module) -> int:
    """Features at the bottleneck of the job's network."""
    _logits, features = outputs_of(model.eval(), job.bottleneck, torch.zeros(1, *job.image))
    return features.numel()


@dataclass(frozen=True)
class Layer:
    """A Conv or Linear layer and the shape of what it reads.

    Attributes:
        network: name of the job.
        dense: the layer.
        inputs: shape of one sample at its input.
        outputs: shape of one sample at its output.
        is_first: it reads the images, so nobody needs the gradient of its input.
    """

    network: str
    dense: nn.Conv2d | nn.Linear
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    is_first: bool

    @property
    def shape(self) -> str:
        """Weight and input, and the stride where there is one, as text."""
        weight = "x".join(map(str, self.dense.weight.shape))
        stride = getattr(self.dense, "stride", (1,))[0]
        steps = f" /{stride}" if stride > 1 else ""
        return f"{weight} on {'x'.join(map(str, self.inputs))}{steps}"

    @property
    def flops(self) -> int:
        """Of one forward pass of one sample; a gradient takes as many again."""
        positions = 1 if isinstance(self.dense, nn.Linear) else self.outputs[1] * self.outputs[2]
        return 2 * self.dense.weight.numel() * positions


def layers_of(job: Job) -> list[Layer]:
    """The job's Conv and Linear layers, in the order of a forward pass; of several that are equal, one."""
    return list({layer.shape: layer for layer in reversed(all_layers(job))}.values())[::-1]


def all_layers(job: Job) -> list[Layer]:
    """The job's Conv and Linear layers, in the order of a forward pass."""
    model = job.network()
    calls = calls_of(job, model, maskable_layers(model).values())
    layers = []
    for index, (module, inputs, outputs) in enumerate(calls):
        assert isinstance(module, nn.Conv2d | nn.Linear)
        layers.append(Layer(job.name, module, inputs, outputs, index == 0))
    return layers


@torch.no_grad()
def calls_of(job: Job, model: nn.Module, modules: Iterable[nn.Module]) -> list[tuple[nn.Module, Shape, Shape]]:
    """The modules in the order in which a forward pass calls them, with the shapes of a sample's input and output."""
    calls: list[tuple[nn.Module, Shape, Shape]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((module, tuple(inputs[0].shape[1:]), tuple(output.shape[1:])))

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(note))
        model.eval()(torch.zeros(1, *job.image))
    return calls
