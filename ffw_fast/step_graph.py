"""The training step as a CUDA graph: captured once, replayed for every full minibatch.

A step of a small network is some dozens of kernels of a few microseconds each, which a GPU finishes faster than Python
launches them; a graph launches them all at once. What makes it possible is that a step reads nothing back: temperature,
step count, learning rate, draws and losses live on the device, and all that it changes is changed in place.

That a step reads nothing back and copies nothing from the host is tested without a GPU, too
(``tests/test_step_graph.py``).
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

WARM_UP_STEPS = 3  # before a capture, on a stream of their own: libraries choose kernels and take memory in them
WAITS = "synchronizing CUDA operation"  # in PyTorch's warning


class StepGraph:
    """Runs ``step`` on the tensors of a minibatch: eagerly on a CPU, from a CUDA graph where they are on a GPU.

    The first full minibatches warm up, the next is captured; every later one is copied to where the captured one lies,
    and the graph is replayed. A short minibatch is run eagerly, on the same state. A step that cannot be captured (a
    model that reads something back, or the plain-PyTorch head) is run eagerly from then on, with a warning that says
    why.

    Args:
        step: tensors of a minibatch, (n, ...) on the device -> nothing; all its results are changes in place of tensors
            that stay.
        size: of a full minibatch.
        device: where it runs.
    """

    def __init__(self, step: Callable[..., None], size: int, device: torch.device) -> None:
        self._step = step
        self._size = size
        self._device = device
        self._is_capturable = device.type == "cuda"
        self._warm_up_left = WARM_UP_STEPS
        self._batch: tuple[Tensor, ...] = ()  # what a replay reads
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def is_captured(self) -> bool:
        """Whether full minibatches are replayed from a graph by now."""
        return self._graph is not None

    def __call__(self, *batch: Tensor) -> None:
        if not self._is_capturable or len(batch[0]) != self._size:
            self._step(*batch)
        elif self._warm_up_left > 0:
            self._warm_up(batch)
        else:
            self._replay(batch)

    def _warm_up(self, batch: tuple[Tensor, ...]) -> None:
        """A step like any other, on the kind of stream that a capture uses."""
        self._warm_up_left -= 1
        with torch.cuda.device(self._device):
            side, current = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side), self._watched() if self._warm_up_left == 0 else nullcontext():
                self._step(*batch)
            current.wait_stream(side)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """No capture is tried after a step that waits for the device: in a failed one PyTorch loses memory."""
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            caught.clear()  # of what it says of itself
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode(before)
        for warning in caught:
            if WAITS in str(warning.message):
                self._is_capturable = False
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        if not self._is_capturable:
            self._warn("it reads something back from the device")

    def _replay(self, batch: tuple[Tensor, ...]) -> None:
        with torch.cuda.device(self._device):
            if self._graph is None and not self._capture(batch):
                self._step(*batch)
                return
            assert self._graph is not None
            for kept, given in zip(self._batch, batch, strict=True):
                kept.copy_(given)
            self._graph.replay()

    def _capture(self, batch: tuple[Tensor, ...]) -> bool:
        """Record a step on copies of the tensors, which runs nothing; whether that succeeded."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self._batch = tuple(tensor.clone() for tensor in batch)
        try:
            with torch.cuda.graph(graph, stream=torch.cuda.Stream()):  # its default may be of another device
                self._step(*self._batch)
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # a capture whose end fails leaves its own
            self._is_capturable = False
            self._warn(str(_first(error)).split("\n", 1)[0])
            return False
        self._graph = graph
        return True

    def _warn(self, reason: str) -> None:
        warnings.warn(f"the training step is not run from a CUDA graph: {reason}", RuntimeWarning, stacklevel=2)


def _first(error: BaseException) -> BaseException:
    """What began it: the end of a capture that went wrong raises an error of its own, which does not say why."""
    while error.__context__ is not None:
        error = error.__context__
    return error
