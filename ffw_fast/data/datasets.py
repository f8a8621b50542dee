"""A user's Dataset or DataLoader: read once and kept where it fits and stays the same, streamed otherwise."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from operator import index, length_hint
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from ffw_fast.data.memory import describe_bytes, memory_budget
from ffw_fast.data.samples import Inputs, Samples
from ffw_fast.data.stream import Fingerprint, Stream, read_batches

READING_BATCH = 256
LAYOUTS = "(x, (y, b...)), (x, y, b) or (index, x, y, attributes)"
PROBES = 16  # samples read twice; one that is flipped at random half of the time gets past all of them once in 65536


def is_dataset(data: Any) -> bool:
    """Whether it can be read as a DataLoader or a Dataset, which need not be of that class."""
    if isinstance(data, DataLoader | IterableDataset):
        return True
    has_both = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    return has_both and not isinstance(data, Mapping | str | Tensor)


def read_dataset(data: Any, name: str) -> tuple[Inputs, Tensor, Tensor]:
    """Inputs x (n, ...), targets y (n,) and biases b (n, heads) of all samples, in the order in which it yields them.

    They are read once and kept, unless they do not fit into memory or change from one reading to the next: then a pass
    reads the labels, and the inputs are a ``Stream``. An IterableDataset cannot be read in another order, so it is kept
    as it comes, random or not. A DataLoader gives the same order each time and is then as it was before: its
    generators and its samplers' are put back, and workers that it keeps are left alone.

    Raises:
        TypeError, ValueError: what was given, what was expected and where.
    """
    loader = data if isinstance(data, DataLoader) else DataLoader(data, batch_size=READING_BATCH)
    if isinstance(loader.dataset, IterableDataset):
        return _keep(_read_anew(loader), name, least=loader.batch_size if loader.drop_last else 1)
    batched, yielded = loader.batch_sampler is not None, _yielded(loader, name)
    indices = list(chain.from_iterable(yielded)) if batched else yielded
    if not indices:
        raise ValueError(f"{name} is empty")
    probes = _read_probes(loader, indices, name)
    augments = not all(map(torch.equal, probes[::2], probes[1::2]))
    fits = probes[0].nbytes * len(indices) <= memory_budget()
    if fits and not augments:
        order = {"batch_sampler" if batched else "sampler": yielded}
        return _keep(_read_anew(loader, **order), name, count=len(indices) if batched else 0)
    if not batched:
        why = "augments at random" if augments else "does not fit into memory"
        raise ValueError(f"{name} {why} and is streamed, which needs a DataLoader with a batch_size")
    return _stream(loader, indices, name, augments)


def reading_note(given: Any, samples: Samples, name: str) -> str | None:
    """Which way a set was read, for the user; None for tensors and for samples that were read before."""
    if not is_dataset(given) or isinstance(given, tuple):
        return None
    size = describe_bytes(samples.x.shape.numel() * samples.x.dtype.itemsize)
    return stream_note(samples, name) or f"{name}: {len(samples.y)} samples read once and kept in memory ({size})"


def stream_note(samples: Samples, name: str) -> str | None:
    """Why a set is read anew in every pass, for the user; None where it is not."""
    if not isinstance(samples.x, Stream):
        return None
    count = f"{name}: {len(samples.y)} samples"
    if samples.augments:
        return f"{count} that are augmented at random, read anew in every pass"
    size = describe_bytes(samples.x.shape.numel() * samples.x.dtype.itemsize)
    return f"{count} that take {size}, more than there is room for, read anew in every pass"


def _yielded(loader: DataLoader, name: str) -> list[Any]:
    """All that the loader's sampler yields: batches of indices, or indices where the loader makes no batches."""
    sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    may_drop = isinstance(sampler, BatchSampler) and sampler.drop_last
    if may_drop:
        sampler = copy.copy(sampler)
        sampler.drop_last = False
    with _seeded(sampler):
        # A sampler may be endless, its loader is not.
        yielded = list(islice(sampler, length_hint(sampler) or length_hint(loader) or None))
    if may_drop and yielded and len(yielded[-1]) < sampler.batch_size:
        raise _drops(name)
    return yielded


def _drops(name: str) -> ValueError:
    return ValueError(
        f"{name} drops its last samples in an incomplete batch; give its DataLoader or BatchSampler drop_last=False"
    )


@contextmanager
def _seeded(sampler: Any) -> Iterator[None]:
    """A sampler's own generators start from seed 0, as the global ones do, and are then as they were before."""
    parts: tuple[Any, ...] = (sampler, getattr(sampler, "sampler", None))  # one of batches has another of samples
    own = [part.generator for part in parts if isinstance(getattr(part, "generator", None), torch.Generator)]
    before = [generator.get_state() for generator in own]
    for generator in own:
        generator.manual_seed(0)
    try:
        yield
    finally:
        for generator, state in zip(own, before, strict=True):
            generator.set_state(state)


def _read_anew(loader: DataLoader, **changes: Any) -> DataLoader:
    """A copy of a loader that is read in a given order, to the end, by no worker that has read before."""
    anew = copy.copy(loader)
    once = {"_iterator": None, "persistent_workers": False, "drop_last": False, "in_order": True}
    source = torch.Generator().manual_seed(0)
    vars(anew).update(once, generator=source, **changes)  # a DataLoader lets no one set them
    return anew


def _read_probes(loader: DataLoader, indices: Sequence[Any], name: str) -> list[Tensor]:
    """Inputs of some samples, each read twice, as minibatches of their own where the loader makes minibatches.

    Where the loader has workers, one reads them: workers that are forked from a process in which the Dataset has opened
    its files would share its places in them.
    """
    twice = [indices[probe * len(indices) // PROBES] for probe in range(PROBES) for _ in range(2)]
    batched = loader.batch_sampler is not None
    order = {"batch_sampler": [[one] for one in twice]} if batched else {"sampler": twice}
    probes = _read_anew(loader, num_workers=min(1, loader.num_workers), **order)
    return [_parse(item, name, batched)[0] for item in _items(probes, name)]


def _keep(loader: DataLoader, name: str, *, count: int = 0, least: int | None = 1) -> tuple[Tensor, Tensor, Tensor]:
    """All that a loader yields, in batches of at least ``least`` samples.

    Args:
        count: of all samples, where it is known: their inputs are then copied to their place as they come, since to
            join them in the end takes their memory twice.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    size, budget = 0, memory_budget()
    room, placed = torch.empty(0), 0
    for item in _items(loader, name):
        x, y, b = _parse(item, name)
        if len(y) < (least or 1):
            raise _drops(name)
        if not parts:
            room = x.new_empty((count, *x.shape[1:]))
        parts.append((x, y, b))
        for label, given, first in (("x", x, parts[0][0]), ("b", b, parts[0][2])):
            _check_shape(tuple(given.shape[1:]), tuple(first.shape[1:]), label, name)
        size += x.numel() * x.element_size()
        if size > budget:
            raise ValueError(
                f"{name} takes more than the {describe_bytes(budget)} that there is room for, and cannot be streamed: "
                "give it as a Dataset with __len__ and __getitem__, or in fewer samples"
            )
        if placed + len(x) <= count and x.dtype == room.dtype and x.is_contiguous():
            parts[-1] = room[placed : placed + len(x)].copy_(x), y, b
            placed += len(x)
    if not parts:
        raise ValueError(f"{name} is empty")
    inputs, targets, biases = zip(*parts, strict=True)
    x = room if placed == count == sum(map(len, inputs)) else torch.cat(inputs)
    return x, torch.cat(targets), torch.cat(biases)


def _stream(loader: DataLoader, chosen: Sequence[Any], name: str, augments: bool) -> tuple[Stream, Tensor, Tensor]:
    """One pass for labels and checks; the inputs are read again whenever they are wanted."""
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise ValueError(f"{name} is streamed, which leaves out what {type(loader).__name__} does in its __iter__")
    try:
        indices = torch.tensor(list(map(index, chosen)))
    except TypeError as error:
        raise TypeError(f"{name} is streamed, which needs samples that are numbered by integers") from error
    fingerprint = Fingerprint()
    shapes, labels, dtype = [], [], torch.float32
    for item in _items(read_batches(loader, indices, READING_BATCH, seeded=augments), name):
        x, y, b = _parse(item, name)
        labels.append((y, b))
        shapes.append((tuple(x.shape[1:]), tuple(b.shape[1:])))
        for label, given, first in zip("xb", shapes[-1], shapes[0], strict=True):
            _check_shape(given, first, label, name)
        if not x.isfinite().all():
            raise ValueError(f"{name}: x holds NaN or inf")
        dtype = x.dtype
        if not augments:
            fingerprint.add(x)
    stream = Stream(
        loader,
        indices,
        lambda item: _parse(item, name)[0],
        shapes[0][0],
        dtype,
        augments,
        torch.empty(0, dtype=torch.uint8, device="cpu") if augments else fingerprint.value(),
        name,
        torch.device("cpu"),
    )
    y, b = (torch.cat(column) for column in zip(*labels, strict=True))
    return stream, y, b


def _items(batches: Iterable[Any], name: str) -> Iterator[Any]:
    """The batches; where reading or collating them fails, the error says of which set."""
    try:
        yield from batches
    except Exception as error:  # whatever the user's own code raises
        error.add_note(f"while {name} was read")
        if isinstance(error, RuntimeError) and "stack expects each tensor" in str(error):
            raise ValueError(f"{name}: samples differ in shape: {error}") from error
        raise


def _check_shape(given: tuple[int, ...], first: tuple[int, ...], label: str, name: str) -> None:
    if given != first:
        raise ValueError(f"{name}: samples differ in the shape of {label}: {first} and {given}")


def _parse(item: Any, name: str, batched: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(item, Sequence):
        raise TypeError(f"{name} must yield {LAYOUTS}, got {type(item).__name__}")
    if not 2 <= len(item) <= 4:
        raise TypeError(f"{name} must yield {LAYOUTS}, got {type(item).__name__} of length {len(item)}")
    if len(item) == 2:
        x, labels = item
        if not isinstance(labels, Sequence):
            raise ValueError(f"{name} yields (x, y) without a bias label: expected {LAYOUTS}")
        y, *biases = labels
    elif len(item) == 3:
        x, y, *biases = item
    else:
        _index, x, y, *biases = item
    if not biases:
        raise ValueError(f"{name} yields no bias label: expected {LAYOUTS}")
    x, y = _as_tensor(x, "x", name), _as_tensor(y, "y", name)
    columns = [_as_tensor(bias, "b", name) for bias in biases]
    width = 1 if batched else 0
    if batched and (y.dim() == 0 or any(column.dim() == 0 for column in columns)):
        raise ValueError(f"{name} yields single samples instead of batches; give its DataLoader a batch_size")
    columns = [column.unsqueeze(-1) if column.dim() == width else column for column in columns]
    return x, y, torch.cat(columns, dim=-1)


def _as_tensor(value: Any, label: str, name: str) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: {label} must be a tensor or numbers, got {type(value).__name__}") from error
