"""Two hosts on one machine: network namespaces of Linux, joined by nothing but a link of a given rate.

What runs on a host sees no network but that link and its own loopback, so what the link carries is what was sent. Needs
the programs ``unshare``, ``nsenter``, ``ip`` and ``tc``, and a kernel that lets this user make namespaces.
"""

import shutil
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Self

LINK = "wire"  # the name of a host's end
ADDRESSES = ("10.0.0.1/30", "10.0.0.2/30")
QUEUE = ("burst", "256kb", "latency", "50ms")  # of the token bucket that limits the rate
PROGRAMS = ("unshare", "nsenter", "ip", "tc")


class Hosts:
    """The two hosts, from ``with`` to the end of it.

    Args:
        rate: of the link in each direction, as ``tc`` takes it: ``1gbit``.

    Raises:
        OSError, by ``with``: this machine cannot make them; which command failed, and with what words.
    """

    def __init__(self, rate: str) -> None:
        self._rate = rate
        self._open = ExitStack()
        self._namespaces: list[int] = []  # processes that hold them

    def __enter__(self) -> Self:
        if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
            raise OSError(f"two simulated hosts need the programs {', '.join(missing)}")
        with self._open as undo:
            first = self._hold("unshare", "--user", "--map-root-user", "--net")
            self._namespaces = [first, self._hold(*_within(first), "unshare", "--net")]
            peer = ("type", "veth", "peer", "name", LINK, "netns", str(self._namespaces[1]))
            self._do(0, "ip", "link", "add", LINK, *peer)
            for host, address in enumerate(ADDRESSES):
                self._do(host, "ip", "address", "add", address, "dev", LINK)
                self._do(host, "tc", "qdisc", "add", "dev", LINK, "root", "tbf", "rate", self._rate, *QUEUE)
                for device in ("lo", LINK):
                    self._do(host, "ip", "link", "set", device, "up")
            self._open = undo.pop_all()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._open.close()

    def on(self, host: int, command: Sequence[str]) -> list[str]:
        """The command that runs a command on a host, 0 or 1."""
        return [*_within(self._namespaces[host]), *command]

    def _hold(self, *command: str) -> int:
        """A process that holds the namespace it runs in until its standard input is closed."""
        ready = ("sh", "-c", "echo ready && exec cat")
        process = self._open.enter_context(
            subprocess.Popen([*command, *ready], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
        assert process.stdout is not None and process.stderr is not None
        if not process.stdout.readline():
            raise OSError(f"this machine makes no network namespaces: {process.stderr.read().decode().strip()}")
        return process.pid

    def _do(self, host: int, *command: str) -> None:
        done = subprocess.run(self.on(host, command), capture_output=True, text=True)
        if done.returncode != 0:
            raise OSError(f"two simulated hosts: {' '.join(command)}: {done.stderr.strip()}")


def _within(holder: int) -> tuple[str, ...]:
    return ("nsenter", "--target", str(holder), "--user", "--preserve-credentials", "--net")
