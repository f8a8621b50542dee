"""One run at a time in a run folder, by a lock that ends with the process that holds it, however that ends."""

import errno
import os
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: folders are not locked there
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of some network file systems

_holders: dict[Path, int] = {}  # folder -> the thread of this process that holds it


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within it no other run can use the folder. The thread that holds it may ask again.

    The file ``.lock`` stays when the lock is gone: whoever removed it could remove another one's. The system's record
    locks are used, because a worker process that outlives its parent does not inherit those.

    Raises:
        BlockingIOError: another run uses the folder, and which.
        OSError: the folder cannot be written.
    """
    folder = folder.resolve()
    me = threading.get_ident()
    if _holders.get(folder) == me or fcntl is None:
        yield
        return
    with _hold(folder, me):
        opened = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(opened, folder)
            os.ftruncate(opened, 0)
            os.write(opened, f"process {os.getpid()} on {socket.gethostname()}".encode())
            yield
        finally:
            os.close(opened)  # this gives the lock back


@contextmanager
def _hold(folder: Path, thread: int) -> Iterator[None]:
    """Keep other threads out, to whom the system would give the lock of their own process."""
    if _holders.setdefault(folder, thread) != thread:  # looks and takes at once
        raise BlockingIOError(f"the run folder {folder} is in use by another thread of this process")
    try:
        yield
    finally:
        del _holders[folder]


def _lock(opened: int, folder: Path) -> None:
    try:
        fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            warnings.warn(f"the file system of {folder} has no locks: see to it that one run uses it", stacklevel=5)
            return
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        holder = os.read(opened, 200).decode(errors="replace") or "another process"
        raise BlockingIOError(f"the run folder {folder} is in use by {holder}") from error
