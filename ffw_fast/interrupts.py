"""Signals that end a run: Ctrl-C raises ``KeyboardInterrupt`` already, and these make the others alike."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """The process was asked to end, and soon: by SIGTERM, as batch systems do, or because its terminal is gone."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def ending_signals_raise() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP raise ``Terminated``, except where the caller ignores or handles them (nohup)."""
    ours = []
    if threading.current_thread() is threading.main_thread():
        ours = [number for number in ENDING if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _raise)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _raise(number: int, _frame: FrameType | None) -> None:
    raise Terminated(number)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """The customary one: 128 and the signal's number, so 130 after Ctrl-C and 143 after SIGTERM."""
    return 128 + (interrupt.number if isinstance(interrupt, Terminated) else signal.SIGINT)
