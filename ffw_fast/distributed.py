"""One extraction on several processes of ``torch.distributed``, equal to that on one within float rounding.

The samples of every minibatch are shared out; all else is the same everywhere. In a step go round the group: the joint
of biases and predictions, so that the mutual information is that of the whole minibatch (the mean of the parts' is
another number: small batches bias it upward), the gradient of the gated weights, one flat buffer, and the bottleneck's
features, on which every process takes the same step of the heads. Gates that see the same gradient stay the same, the
random ones too, since their draws are counted, not drawn from a generator. Refits are done by the first process on
features from all.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ffw_fast import ops
from ffw_fast.data.samples import Inputs, Samples, part_of
from ffw_fast.objective import Objective, objective
from ffw_fast.run_state import Resumable, RunState

Result = TypeVar("Result")
PATIENCE = timedelta(days=1)  # with a process that lives: the first one may train a biased network for hours
GONE = 10.0  # seconds in which those that live find out who does not
POLL = 0.05  # seconds
ERRORS = (ValueError, TypeError, OSError, ImportError, FloatingPointError)


class ProcessLost(ConnectionError):
    """A process of the group has ended, so the others cannot go on."""


class Alone:
    """One process: there is nothing to share."""

    count, rank = 1, 0

    def together(self, work: Callable[[], Result]) -> Result:
        """Do what may fail on one process only; where it does, all raise its error."""
        return work()

    def check_same(self, facts: dict[str, Any]) -> None:
        """``ValueError`` where the processes differ in anything that the result depends on."""

    def batches(self, samples: Samples, order: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """This process's inputs of every minibatch, and the labels y, b of the whole minibatch."""
        return samples.batches(order, size)

    def objective(
        self, logits: Tensor, labels: Tensor, head_logits: Tensor, bias_labels: Tensor, alpha: float, gamma: float
    ) -> Objective:
        """J of the whole minibatch, from this process's logits and all labels.

        The gradient of J is this process's part, which the other's add up to the whole one.
        """
        return objective(logits, labels, head_logits, bias_labels, alpha, gamma)

    def sum_(self, gradient: Tensor) -> None:
        """Add up all processes' gradients, in place."""

    def rows(self, own: Tensor, count: int) -> Tensor:
        """All rows (count, ...) of a minibatch, or of a set, in their order, of which this process has its own."""
        return own

    def part(self, x: Inputs) -> Inputs:
        """This process's part of a set."""
        return x

    def first(self, work: Callable[[], Result]) -> Result | None:
        """What only the first process does; None elsewhere."""
        return work()

    def copy_(self, *tensors: Tensor) -> None:
        """Give every process the first one's tensors, in place."""

    def told(self, fact: Any) -> Any:
        """The first process's fact, anything that JSON can hold."""
        return fact

    def share(self, run: Resumable, state: RunState) -> None:
        """Bring every process's run into the state of the first one's, which has read a checkpoint."""


class Group(Alone):
    """The default process group of ``torch.distributed``. Messages are tensors; nothing is pickled."""

    def __init__(self) -> None:
        self.count, self.rank = dist.get_world_size(), dist.get_rank()
        self._store = dist.distributed_c10d._get_default_store()  # there is no public way to it
        on_gpu = dist.get_backend() == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        self._gloo = dist.new_group(backend="gloo", timeout=PATIENCE) if on_gpu else dist.group.WORLD

    def together(self, work: Callable[[], Result]) -> Result:
        error: BaseException | None = None
        try:
            result = work()
        except ERRORS as raised:
            error = raised
        texts = self._gather_json(str(error) if error is not None else None)
        failed = [rank for rank, text in enumerate(texts) if text is not None]
        if not failed:
            return result
        if error is not None and self.rank == failed[0] == 0:
            raise error
        raise ValueError(texts[failed[0]] if failed[0] == 0 else f"on rank {failed[0]}: {texts[failed[0]]}")

    def check_same(self, facts: dict[str, Any]) -> None:
        ours = json.loads(json.dumps(facts))
        everywhere = self._gather_json(ours)
        differences = [
            f"{name} is {everywhere[0].get(name)!r} on rank 0 and {other.get(name)!r} on rank {rank}"
            for rank, other in enumerate(everywhere)
            for name in facts
            if other.get(name) != everywhere[0].get(name)
        ]
        if differences:
            raise ValueError(f"the processes of the group differ: {'; '.join(differences)}")

    def batches(self, samples: Samples, order: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        parts = order.split(size)
        own = torch.cat([part[self._share(len(part))] for part in parts])
        inputs = samples.batches(own, len(parts[0][self._share(len(parts[0]))]))
        for (x, _y, _b), part in zip(inputs, parts, strict=True):
            rows = part.to(samples.y.device)
            yield x, samples.y[rows], samples.b[rows]

    def objective(
        self, logits: Tensor, labels: Tensor, head_logits: Tensor, bias_labels: Tensor, alpha: float, gamma: float
    ) -> Objective:
        rows = self._share(len(labels))
        logits, head_logits = logits.detach().requires_grad_(), head_logits.detach().requires_grad_()
        own = torch.nn.functional.cross_entropy(logits, labels[rows], reduction="sum")
        weight = float(self._size(len(labels), self.rank) > 0)  # 0: it computes a sample that is another's
        information, cross_entropy = _WholeMinibatch.apply(
            head_logits, bias_labels[rows], own, weight, len(labels), self._all_reduce
        )
        information = information.mean()
        total = alpha * cross_entropy + gamma * information
        losses = torch.stack([total, cross_entropy, information]).detach()
        return Objective(losses, *torch.autograd.grad(total, (logits, head_logits)))

    def sum_(self, gradient: Tensor) -> None:
        self._all_reduce(gradient)

    def rows(self, own: Tensor, count: int) -> Tensor:
        sizes = [self._size(count, rank) for rank in range(self.count)]
        padded = own.new_zeros(max(sizes), *own.shape[1:])
        padded[: sizes[self.rank]] = own[: sizes[self.rank]]
        everything = [torch.empty_like(padded) for _ in sizes]
        with self._naming_the_lost():
            dist.all_gather(everything, padded)
        return torch.cat([part[:size] for part, size in zip(everything, sizes, strict=True)])

    def part(self, x: Inputs) -> Inputs:
        return part_of(x, self._share(len(x)))

    def first(self, work: Callable[[], Result]) -> Result | None:
        return work() if self.rank == 0 else None

    def copy_(self, *tensors: Tensor) -> None:
        with self._naming_the_lost():
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def told(self, fact: Any) -> Any:
        text = torch.frombuffer(bytearray(json.dumps(fact).encode()), dtype=torch.uint8)
        length = torch.tensor([len(text)])
        with self._naming_the_lost():
            dist.broadcast(length, 0, group=self._gloo)
            if self.rank > 0:
                text = torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(text, 0, group=self._gloo)
        return json.loads(text.numpy().tobytes())

    def share(self, run: Resumable, state: RunState) -> None:
        tensors, record = run.state()
        record = self.told(record)
        shapes = self.told({name: list(tensor.shape) for name, tensor in tensors.items()})
        if self.rank > 0:  # memory of their own: before a run has begun, some of its tensors are the same
            tensors = {name: tensors[name].new_empty(shape) for name, shape in shapes.items()}
        self.copy_(*tensors.values())
        if self.rank > 0:
            run.load_state(tensors, record)
            state.keep(run)

    def _size(self, count: int, rank: int) -> int:
        """How many of so many rows are that process's."""
        return (rank + 1) * count // self.count - rank * count // self.count

    def _share(self, count: int) -> slice:
        """The rows that this process computes: its own, or where it has none, one that counts nothing."""
        start = self.rank * count // self.count
        return slice(min(start, count - 1), min(start, count - 1) + max(1, self._size(count, self.rank)))

    def _all_reduce(self, tensor: Tensor) -> None:
        with self._naming_the_lost():
            dist.all_reduce(tensor)

    def _gather_json(self, fact: Any) -> list[Any]:
        """Every process's fact."""
        text = torch.frombuffer(bytearray(json.dumps(fact).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        with self._naming_the_lost():
            dist.all_gather(lengths, torch.tensor([len(text)]), group=self._gloo)
            longest = max(map(int, lengths))
            texts = [torch.zeros(longest, dtype=torch.uint8) for _ in lengths]
            padded = torch.nn.functional.pad(text, (0, longest - len(text)))
            dist.all_gather(texts, padded, group=self._gloo)
        return [json.loads(bytes(row[: int(size)].tolist())) for row, size in zip(texts, lengths, strict=True)]

    @contextmanager
    def _naming_the_lost(self) -> Iterator[None]:
        """Let a message that cannot be delivered end in an error that names the process that is gone."""
        try:
            yield
        except RuntimeError as error:
            raise ProcessLost(f"{self._who_is_gone()}; the checkpoint is kept, continue with --resume") from error

    def _who_is_gone(self) -> str:
        """All that live sign in the group's store; who has not in time is gone, or the store with its keeper."""
        signs = {rank: f"ffw_fast alive {rank}" for rank in range(self.count)}
        try:
            self._store.set(signs[self.rank], "yes")
            missing, deadline = list(signs), time.monotonic() + GONE
            while missing and time.monotonic() < deadline:
                missing = [rank for rank in missing if not self._store.check([signs[rank]])]
                time.sleep(POLL)
        except RuntimeError:
            return "the process that keeps the group's store is gone, with torchrun or rank 0"
        if not missing:
            return f"a message between the {self.count} processes was lost, though all live"
        named = f"rank {missing[0]} is" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))} are"
        return f"{named} gone, says rank {self.rank}"


class _WholeMinibatch(torch.autograd.Function):
    """MI of each head and mean cross-entropy of a minibatch of which this process has some rows."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        cross_entropy: Tensor,
        weight: float,
        count: int,
        all_reduce: Callable[[Tensor], None],
    ) -> tuple[Tensor, Tensor]:
        _information, joint = ops.mutual_information(logits, labels)
        message = torch.cat([(joint * len(logits)).flatten(), cross_entropy.reshape(1).to(joint.dtype)]) * weight
        all_reduce(message)
        joint = message[:-1].view_as(joint).clamp_min(ops.JOINT_FLOOR) / count
        ctx.save_for_backward(logits, labels, joint)
        ctx.weight, ctx.count = weight, count
        return ops.joint_information(joint), message[-1] / count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels, joint = ctx.saved_tensors
        information, cross_entropy = gradients
        share = information * (ctx.weight * len(logits) / ctx.count)  # the operator takes the mean over its rows
        by_logits = ops.mutual_information_backward(share, logits, labels, joint)
        return by_logits, None, cross_entropy * (ctx.weight / ctx.count), None, None, None


def processes() -> Alone:
    """The processes that work on one extraction: those of the default process group, where there is one."""
    return Group() if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else Alone()


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
