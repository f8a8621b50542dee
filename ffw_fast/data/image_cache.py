"""Decoded images in a file that is built once, verified by its checksum and mapped into every process that reads it."""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ffw_fast.data.memory import describe_bytes

CACHE = "ffw_fast-cache"
PIECE = 1 << 24  # bytes read at a time for the checksum


def cache_folder(cache_dir: str | None, data: Path) -> Path:
    """The folder named, by default one beside the images."""
    return data / CACHE if cache_dir is None else Path(cache_dir)


def mapped_images(
    paths: Sequence[Path],
    shape: torch.Size,
    cache_dir: Path,
    decode_into: Callable[[Tensor, Sequence[Path]], None],
) -> Tensor:
    """uint8 images of that shape, mapped from a file in the cache; decoded into it where it is not there, or damaged.

    The file is named after the paths, sizes and dates of the image files, so that other images get a file of their own.
    Processes that want the same file at the same time wait for the first one. A whole one is used even in a folder that
    one may only read.

    Raises:
        OSError: the folder cannot be written, or its disk has no room.
    """
    size = shape.numel()
    name = _name(paths, shape)
    file, record = cache_dir / f"{name}.uint8", cache_dir / f"{name}.json"
    if not _is_whole(file, record, size):
        with _locked(cache_dir, name):
            if not _is_whole(file, record, size):  # still, now that no other process makes it
                temporary = file.with_suffix(".tmp")
                for leftover in (file, temporary):
                    leftover.unlink(missing_ok=True)
                _reserve(temporary, size)
                images = torch.from_file(str(temporary), shared=True, size=size, dtype=torch.uint8).view(shape)
                decode_into(images, paths)
                del images
                checksum = _checksum(temporary)
                temporary.replace(file)
                record.write_text(json.dumps({"shape": list(shape), "blake2b": checksum}) + "\n")
    return torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8).view(shape)


def _name(paths: Sequence[Path], shape: tuple[int, ...]) -> str:
    identity = hashlib.blake2b(repr(shape).encode(), digest_size=16)
    for path in paths:
        status = path.stat()
        identity.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    return f"images-{identity.hexdigest()}"


@contextmanager
def _locked(cache_dir: Path, name: str) -> Iterator[None]:
    import fcntl  # of POSIX systems alone, as a file mapped by several processes is

    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with (cache_dir / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # let go of when the process ends, however it does
            yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise PermissionError(
            f"the images do not fit into memory and the cache of decoded images {cache_dir} cannot be written: "
            "name another folder as cache_dir (--cache-dir), or load fewer (--train-size)"
        ) from error


def _reserve(file: Path, size: int) -> None:
    """A file of that size that has its room on the disk: to write to a mapped one that has none kills the process."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        file.unlink()
        raise OSError(
            f"the images take {describe_bytes(size)} decoded, more than fits into memory, and {file.parent} has no "
            f"room for them ({error.strerror}): name another folder as cache_dir (--cache-dir), or load fewer "
            "(--train-size)"
        ) from error
    finally:
        os.close(descriptor)


def _is_whole(file: Path, record: Path, size: int) -> bool:
    try:
        expected = json.loads(record.read_text())["blake2b"]
        return os.path.getsize(file) == size and _checksum(file) == expected
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _checksum(file: Path) -> str:
    found = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while piece := stream.read(PIECE):
            found.update(piece)
    return found.hexdigest()
