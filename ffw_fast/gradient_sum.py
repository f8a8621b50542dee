"""The sum of several processes' gradients, sent while the backward pass still runs."""

from collections.abc import Callable, Sequence

from torch import Tensor

PIECE = 2**20  # gates whose gradient is a message of its own, sent while the backward pass still runs


class GradientSum:
    """The sum of all processes' gradients, of a flat buffer that the backward pass fills from its end on.

    It goes round in pieces, each as soon as it is whole and those before it are on their way, so in the same order on
    all processes.

    Args:
        gradient: (n,), of which the weights' gradients are views, one behind the other.
        weights: leaves of autograd in the order of the buffer.
        send: starts a message of a slice of the buffer; gives what waits for its end.
    """

    def __init__(
        self, gradient: Tensor, weights: Sequence[Tensor], send: Callable[[slice], list[Callable[[], object]]]
    ) -> None:
        self._send = send
        self._pieces: list[slice] = []
        self._sizes: list[int] = []  # how many weights each piece holds
        members: list[Tensor] = []
        for weight in reversed(weights):
            members.append(weight)
            start = 0 if weight is weights[0] else _place(weight, gradient)
            end = self._pieces[-1].start if self._pieces else len(gradient)
            if end - start >= PIECE or start == 0:
                self._add_piece(slice(start, end), members)
                members = []
        self._begin()

    def _add_piece(self, piece: slice, members: list[Tensor]) -> None:
        index = len(self._pieces)
        self._pieces.append(piece)
        self._sizes.append(len(members))
        for weight in members:
            weight.register_post_accumulate_grad_hook(lambda _weight: self._filled(index))

    def _begin(self) -> None:
        self._missing = list(self._sizes)
        self._sent = 0
        self._ends: list[Callable[[], object]] = []

    def _filled(self, index: int) -> None:
        self._missing[index] -= 1
        while self._sent < len(self._pieces) and self._missing[self._sent] == 0:
            self._send_next()

    def _send_next(self) -> None:
        self._ends += self._send(self._pieces[self._sent])
        self._sent += 1

    def finish(self) -> None:
        """Wait until the sum is there; to be called after every backward pass."""
        while self._sent < len(self._pieces):  # those whose weights got no gradient
            self._send_next()
        for end in self._ends:
            end()
        self._begin()


def _place(weight: Tensor, gradient: Tensor) -> int:
    """Where the weight's gradient begins in the buffer."""
    assert weight.grad is not None
    return int(weight.grad.storage_offset() - gradient.storage_offset())
