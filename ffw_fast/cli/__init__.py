"""The command line, ``ffw-fast``. It alone knows the workloads, the loop and the run folder together."""

import argparse
import os
import select
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ffw_fast.cli import compare, machine, networks, pages, run, sweep
from ffw_fast.distributed import ProcessLost
from ffw_fast.interrupts import Terminated, ending_signals_raise, exit_code
from ffw_fast.run_state import CHECKPOINT
from ffw_fast.runs.writing import VANILLA_CHECKPOINTS
from ffw_fast.torchrun import is_first
from ffw_fast.version import __version__

ERRORS = (ValueError, TypeError, OSError, ImportError, FloatingPointError, MemoryError)
READER_GONE = 128 + 13  # the code of a process that SIGPIPE ends


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code: 0, 2 for an error, 130 after Ctrl-C, 143 after SIGTERM.

    141 where whoever read the output has gone, as ``head`` does.
    """
    if sys.stdout is None:  # closed by whoever called
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        given = run.with_workload(list(sys.argv[1:] if arguments is None else arguments))
    except (OSError, ValueError) as error:
        print(f"ffw-fast: error: {error}", file=sys.stderr)
        return 2
    options = build_parser().parse_args(given)
    try:
        with ending_signals_raise(), _plain_warnings():
            code = options.command(options)
            sys.stdout.flush()  # where nobody reads any more it fails here, and not at exit
            return code
    except KeyboardInterrupt as interrupt:
        if not is_first():
            return exit_code(interrupt)
        what = "terminated" if isinstance(interrupt, Terminated) else "interrupted"
        print(f"ffw-fast: {what}{_what_is_left(options)}", file=sys.stderr)
        return exit_code(interrupt)
    except ERRORS as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return READER_GONE
        if options.traceback:
            raise
        if is_first() or isinstance(error, ProcessLost):
            print(f"ffw-fast: error: {error}", file=sys.stderr)
        return 2


def _nobody_reads() -> bool:
    """Whether the reader of standard output has gone; what is still to be written then goes nowhere."""
    if not hasattr(select, "poll"):  # Windows
        return False
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, select.POLLOUT)
    if not any(event & (select.POLLERR | select.POLLHUP) for _output, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Within it warnings to users are single lines, without the place in the code that they come from."""
    before = warnings.showwarning

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        if category is UserWarning:
            print(f"ffw-fast: warning: {message}", file=file or sys.stderr)
        else:
            before(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def _what_is_left(options: argparse.Namespace) -> str:
    """What an interrupted command left in its folder, and how to go on."""
    if "out" not in options or not (out := Path(options.out)).exists():
        return ""
    if options.command is run.run and (out / CHECKPOINT).exists() and not (out / VANILLA_CHECKPOINTS.newest).exists():
        return f"; {out} keeps what was reached, continue with --resume"
    if any(not path.name.startswith(".") for path in out.iterdir()):
        return f"; {out} keeps what was finished, the same command goes on from there"
    return ""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="ffw-fast",
        description="Finds the unbiased sub-network inside a biased neural network.",
        epilog="ffw-fast COMMAND --help shows what a command takes.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ffw-fast {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error comes from")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in (run, compare, sweep, networks, pages, machine):
        module.add_to(commands)
    return parser
