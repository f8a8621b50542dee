"""Files of a run: written whole or not at all, and checked before anything in them is believed.

Tensors are kept as safetensors with a checksum of all that the file holds, everything else as JSON: reading either can
run no code. Names and shapes are compared with what is expected before the memory for them is taken.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_IMODE
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

CHECKSUM = "checksum"
ShapesCheck: TypeAlias = Callable[[dict[str, tuple[int, ...]]], None]
TEMPORARY = ".tmp"  # ends the name of a file that is being written
LARGEST_TEXT = 1 << 28  # bytes of a JSON or CSV file; a history of a million epochs is smaller


class DamagedFileError(ValueError):
    """A file that is not what was written, or not of this package."""


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place at the end; after a failure or a kill the old file stands.

    What was written is on the disk, its name included, before the old file is let go.

    Raises:
        OSError: it cannot be written, with its path; the temporary file is removed.
    """
    temporary = path.with_name(f"{path.name}{TEMPORARY}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None and error.errno is not None:
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Let the names in the folder reach the disk, where the system can."""
    if os.name != "posix":
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str] | None = None) -> None:
    """Write tensors by name, and texts, with a checksum of all of them.

    Raises:
        OSError: with the path, where it cannot be written.
    """
    contents = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    texts = dict(texts or {})
    with written_whole(path) as temporary:
        mode = _mode_of_new(temporary)
        try:
            save_file(contents, temporary, {**texts, CHECKSUM: _checksum(contents, texts)})
            temporary.chmod(mode)  # save_file lets the owner alone read what it writes
        except SafetensorError as error:  # it has its own class for a full disk and the like
            raise OSError(f"{path} cannot be written: {error}") from error


def _mode_of_new(path: Path) -> int:
    """What the umask lets others do with a new file, which then is at ``path``, empty."""
    path.unlink(missing_ok=True)
    path.touch()
    return S_IMODE(path.stat().st_mode)


def read_tensors(path: Path, check: ShapesCheck | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and texts that ``write_tensors`` wrote. Memory is taken for what the file holds, whatever it claims.

    Args:
        check: is handed the shapes by name before any tensor is read, and raises ``ValueError`` where they do not fit.

    Raises:
        OSError: it cannot be read.
        DamagedFileError: not a file of ``write_tensors``, or changed since.
        ValueError: of the check.
    """
    try:
        with safe_open(path, framework="pt") as file:
            texts = dict(file.metadata() or {})
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if check is not None:
                check(shapes)
            tensors = {name: file.get_tensor(name).clone() for name in shapes}  # what the file does later is its own
    except (OSError, ValueError):
        raise
    except Exception as error:  # a file may hold anything, and safetensors raises many classes
        raise DamagedFileError(f"{path} is damaged, or was not written by ffw_fast: {error}") from error
    checksum = texts.pop(CHECKSUM, None)
    if checksum is None:
        raise DamagedFileError(f"{path} was not written by ffw_fast, or is damaged: it has no checksum")
    if checksum != _checksum(tensors, texts):
        raise DamagedFileError(f"{path} is damaged: its contents do not have the checksum that was written")
    return tensors, texts


def digest(*tensors: Tensor) -> str:
    """A short fingerprint of tensors: their dtypes, shapes and bits."""
    fingerprint = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        fingerprint.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        fingerprint.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return fingerprint.hexdigest()


def _checksum(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> str:
    """Of all that a file holds, names included."""
    names = sorted(tensors)
    contents = digest(*(tensors[name] for name in names))
    return hashlib.blake2b(json.dumps([names, contents, texts], sort_keys=True).encode(), digest_size=8).hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON that a person can read."""
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. ``FileNotFoundError`` or ``DamagedFileError`` with the path."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise DamagedFileError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def read_text(path: Path) -> str:
    """A text file as it is. ``DamagedFileError`` where no file of this package is so large or it is no text."""
    if (size := path.stat().st_size) > LARGEST_TEXT:
        raise DamagedFileError(f"{path} has {size} bytes; no such file of this package has more than {LARGEST_TEXT}")
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from error
