"""One extraction on several processes of ``torch.distributed``, equal to that on one within float rounding.

The samples of every minibatch are shared out; all else is the same everywhere. In a step go round the group: the joint
of biases and predictions, so that the mutual information is that of the whole minibatch (the mean of the parts' is
another number: small batches bias it upward), the gradient of the gated weights, one flat buffer, and the bottleneck's
features, on which every process takes the same step of the heads. Gates that see the same gradient stay the same, the
random ones too, since their draws are counted, not drawn from a generator. For a refit the features of all go round
once.

Where the gates are sharded, each process keeps the state of its own slice of them alone: it gets their gradient, takes
their step, and sends their gated weights to the others.
"""

import atexit
import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available():
    # Its functions keep the group that there is when it is imported, for good (see _freed_before_exit), and
    # torch._dynamo imports it in the middle of a run. So it is imported before there is one.
    import torch.distributed.nn.functional

from ffw_fast import ops
from ffw_fast.data.samples import Inputs, Samples, part_of
from ffw_fast.flat_layout import FLAT_ALIGNMENT
from ffw_fast.gradient_sum import GradientSum
from ffw_fast.objective import Objective, objective
from ffw_fast.run_state import Resumable, RunState, Snapshot

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

    def own(self, gates: int) -> slice:
        """Which of so many gates this process keeps the state of: all, unless they are sharded."""
        return slice(0, gates)

    def total_(self, part: Tensor) -> Tensor:
        """Add up what the processes have counted over their own gates, in place."""
        return part

    def spread_(self, buffer: Tensor) -> None:
        """Give every process what the others have in a buffer over all gates at their own, in place."""

    def whole(self, part: Tensor, gates: int) -> Tensor:
        """A buffer over all of so many gates, of which every process has the part of its own."""
        return part

    def to_first(self, part: Tensor, gates: int) -> Tensor:
        """The same on the first process, there in the CPU's memory; the others keep their part."""
        return part

    def gradient_sum(self, gradient: Tensor, weights: Sequence[Tensor]) -> GradientSum | None:
        """What sums up the flat gradient of these weights over all processes; nothing where there is one."""
        return None

    def facts(self, fact: Any) -> list[Any]:
        """Every process's fact, anything that JSON can hold."""
        return [fact]

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
        _freed_before_exit()
        self.count, self.rank = dist.get_world_size(), dist.get_rank()
        self._store = dist.distributed_c10d._get_default_store()  # there is no public way to it
        on_gpu = dist.get_backend() == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        gloo = dist.new_group(backend="gloo", timeout=PATIENCE) if on_gpu else dist.group.WORLD
        self._gloo = cast("dist.ProcessGroup | None", gloo)  # every process is in it

    def together(self, work: Callable[[], Result]) -> Result:
        error: BaseException | None = None
        try:
            result = work()
        except ERRORS as raised:
            error = raised
        texts = self.facts(str(error) if error is not None else None)
        failed = [rank for rank, text in enumerate(texts) if text is not None]
        if not failed:
            return result
        if error is not None and self.rank == failed[0] == 0:
            raise error
        raise ValueError(texts[failed[0]] if failed[0] == 0 else f"on rank {failed[0]}: {texts[failed[0]]}")

    def check_same(self, facts: dict[str, Any]) -> None:
        ours = json.loads(json.dumps(facts))
        everywhere = self.facts(ours)
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
        count, own = len(labels), self._share(len(labels))
        weight = float(self._size(count, self.rank) > 0)  # 0: it computes a sample that is another's
        logits, head_logits, labels, bias_labels = logits.detach(), head_logits.detach(), labels[own], bias_labels[own]
        _information, joint = ops.mutual_information(head_logits, bias_labels)
        cross_entropy = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        message = torch.cat([(joint * len(labels)).flatten(), cross_entropy.reshape(1)]) * weight
        self._all_reduce(message)
        joint = message[:-1].view_as(joint).clamp_min(ops.JOINT_FLOOR) / count
        information, cross_entropy = ops.joint_information(joint).mean(), message[-1] / count
        losses = torch.stack([alpha * cross_entropy + gamma * information, cross_entropy, information])
        by_logits = torch.softmax(logits, 1)
        by_logits[torch.arange(len(labels), device=labels.device), labels] -= 1
        # the operator takes the mean over its own rows, and J is the mean over all
        slope = joint.new_full(joint.shape[:1], gamma / len(joint) * weight * len(labels) / count)
        by_head_logits = ops.mutual_information_backward(slope, head_logits, bias_labels, joint)
        return Objective(losses, by_logits * (alpha * weight / count), by_head_logits)

    def total_(self, part: Tensor) -> Tensor:
        self.copy_(part)  # each has counted all
        return part

    def gradient_sum(self, gradient: Tensor, weights: Sequence[Tensor]) -> GradientSum | None:
        return GradientSum(gradient, weights, lambda piece: self._send(gradient, piece))

    def _send(self, gradient: Tensor, piece: slice) -> list[Callable[[], object]]:
        return [self._started(dist.all_reduce, gradient[piece])]

    def _started(
        self, collective: Callable[..., dist.Work | None], tensor: Tensor, *arguments: int
    ) -> Callable[[], object]:
        """A message on its way; what waits for its end."""
        with self._naming_the_lost():
            work = cast(dist.Work, collective(tensor, *arguments, async_op=True))
        return lambda: self._ended(work)

    def _ended(self, work: dist.Work) -> None:
        with self._naming_the_lost():
            work.wait()

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
        found = state.last if self.rank == 0 else None
        record = self.told(found and found.record)
        tensors = {}
        for name, (dtype, shape) in run.forms().items():  # a file has them in another order
            tensors[name] = self._from_first(found.tensors[name] if found else torch.empty(shape, dtype=dtype))
        if self.rank > 0:
            state.last = Snapshot(tensors, record)
            state.last.load_into(run)

    def _from_first(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, from the CPU's memory into it."""
        with self._naming_the_lost():
            dist.broadcast(tensor, 0, group=self._gloo)
        return tensor

    def _size(self, count: int, rank: int) -> int:
        """How many of so many rows are that process's: of fewer rows, no process has more of them."""
        return count // self.count + (rank < count % self.count)

    def _share(self, count: int) -> slice:
        """The rows that this process computes: its own, or where it has none, one that counts nothing."""
        start = sum(self._size(count, rank) for rank in range(self.rank))
        return slice(min(start, count - 1), min(start, count - 1) + max(1, self._size(count, self.rank)))

    def _all_reduce(self, tensor: Tensor) -> None:
        with self._naming_the_lost():
            dist.all_reduce(tensor)

    def facts(self, fact: Any) -> list[Any]:
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


class ShardedGroup(Group):
    """The group where each process keeps the scores, moments and best scores of its own gates alone."""

    def own(self, gates: int) -> slice:
        return self._slices(gates)[self.rank]

    def total_(self, part: Tensor) -> Tensor:
        self._all_reduce(part)
        return part

    def spread_(self, buffer: Tensor) -> None:
        parts = [buffer[own] for own in self._slices(len(buffer))]  # from each to each: gloo's own gather is slower
        own = [dist.P2POp(dist.isend, parts[self.rank], other) for other in self._others() if len(parts[self.rank])]
        theirs = [dist.P2POp(dist.irecv, parts[other], other) for other in self._others() if len(parts[other])]
        with self._naming_the_lost():
            for work in dist.batch_isend_irecv([*own, *theirs]):
                work.wait()

    def whole(self, part: Tensor, gates: int) -> Tensor:
        buffer = part.new_empty(gates)
        buffer[self.own(gates)] = part
        self.spread_(buffer)
        return buffer

    def to_first(self, part: Tensor, gates: int) -> Tensor:
        with self._naming_the_lost():
            if self.rank > 0:
                dist.send(part.contiguous(), 0)
                return part
            buffer = torch.empty(gates, dtype=part.dtype)
            buffer[self.own(gates)] = part.cpu()
            for owner, own in enumerate(self._slices(gates)[1:], 1):
                arriving = part.new_empty(own.stop - own.start)
                dist.recv(arriving, owner)
                buffer[own] = arriving.cpu()
            return buffer

    def _send(self, gradient: Tensor, piece: slice) -> list[Callable[[], object]]:
        """Each owner gets the sum at its own gates; what the others have there afterwards means nothing."""
        ends = []
        for owner, own in enumerate(self._slices(len(gradient))):
            part = gradient[max(own.start, piece.start) : max(own.start, min(own.stop, piece.stop))]
            if len(part):
                ends.append(self._started(dist.reduce, part, owner))
        return ends

    def _others(self) -> list[int]:
        return [rank for rank in range(self.count) if rank != self.rank]

    def _slices(self, gates: int) -> list[slice]:
        """Every process's own of so many gates."""
        units = -(-gates // FLAT_ALIGNMENT)  # where layers begin, slices may
        bounds = [min(gates, rank * units // self.count * FLAT_ALIGNMENT) for rank in range(self.count + 1)]
        return [slice(start, stop) for start, stop in pairwise(bounds)]


@cache
def _freed_before_exit() -> None:
    """See to it that no group outlives the interpreter.

    A thread of gloo keeps its last message until the group is freed, and needs the interpreter's lock to let go of the
    tensors in it. While the interpreter ends nobody gets that lock: the thread is ended instead, in the middle of C++,
    and the process with it ("terminate called without an active exception", exit code -6), after all its work was done.
    ``destroy_process_group`` alone does not free a group: a loop holds one, and is part of a cycle of references.
    """
    atexit.register(gc.collect)


def processes(shard: bool = False) -> Alone:
    """The processes that work on one extraction: those of the default process group, where there is one."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return Alone()
    return ShardedGroup() if shard else Group()
