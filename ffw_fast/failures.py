"""What is said where a run fails in its numbers or its memory: at which step, in which layer, at which batch size.

The loop reads nothing back from the device within an epoch, so that a number that is not finite is seen at the end of
the epoch in which it arose. The epoch is then run again from the state before it, which gives the same numbers, and
looked into after every step.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ffw_fast.distributed import Alone
from ffw_fast.flat_gates import FlatGates
from ffw_fast.heads import PrivateHeads

LOSSES = ("loss", "cross-entropy", "mutual information")  # as a step gives them
MEMORY_SIGNS = ("can't allocate memory", "not enough memory", "out of memory")  # in a RuntimeError of the CPU


def first_bad_step(
    steps: Iterable[Tensor], network: nn.Module, gates: FlatGates, heads: PrivateHeads, group: Alone
) -> str:
    """Where the first number that is not finite stands, as the end of a sentence; runs the steps until it comes.

    Args:
        steps: yields after each step its losses (3,).
        network, gates, heads: what the steps train.
        group: the processes that do so, of which each may see another part of it.
    """
    outputs: list[str] = []
    with ExitStack() as hooks:
        for name, part in network.named_modules():
            if not any(part.children()):
                hooks.enter_context(
                    part.register_forward_hook(lambda _part, _x, output, name=name: outputs.extend(_bad(output, name)))
                )
        for number, losses in enumerate(steps, 1):
            if found := next(filter(None, group.facts(_first_bad(losses, outputs, gates, heads))), None):
                return f"first at step {number} of the epoch, in {found}"
            outputs.clear()
    return "not in a step, but when the heads were refitted after the last one"


def _bad(output: object, name: str) -> list[str]:
    is_bad = isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all()
    return [name] if is_bad else []


def _first_bad(losses: Tensor, outputs: list[str], gates: FlatGates, heads: PrivateHeads) -> str | None:
    """The first place of a step, in the order in which things are computed."""
    gradients = [name for name, part in gates.parts(gates.grad[gates.own]).items() if not part.isfinite().all()]
    scores = [name for name, part in gates.parts(gates.scores).items() if not part.isfinite().all()]
    if losses.isfinite().all() and not gradients and not scores and heads.weight.isfinite().all():
        return None
    if outputs:
        return f"the output of layer {outputs[0]!r}"
    if not losses.isfinite().all():
        bad = [name for name, loss in zip(LOSSES, losses, strict=True) if not loss.isfinite()]
        return f"the {bad[-1]}"  # the loss is the sum of the others
    if gradients:
        return f"the gradient of layer {gradients[-1]!r}"
    return f"the scores of layer {scores[0]!r}" if scores else "the weights of a private head"


@contextmanager
def memory_errors_explained(what: str, batch_size: int, device: torch.device) -> Iterator[None]:
    """Within it running out of memory is a ``MemoryError`` that names the batch size."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not is_memory and not any(sign in str(error) for sign in MEMORY_SIGNS):
            raise
        first_line = str(error).partition("\n")[0]
        raise MemoryError(
            f"{what} ran out of memory on {device} at batch_size={batch_size}; a smaller one needs less ({first_line})"
        ) from error
