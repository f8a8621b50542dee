"""What the commands ``ffw-fast bench NAME`` have in common: how they begin, and where their figures go."""

import argparse
from pathlib import Path
from typing import Any

from ffw_fast.benchmarks.jobs import JOB, TINY_JOB

from ffw_fast.files import write_json


def bench_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """The parser of one benchmark, which the first line of its module's docstring describes."""
    return argparse.ArgumentParser(prog=f"ffw-fast bench {name}", description=(doc or "").partition("\n")[0])


def add_json(parser: argparse.ArgumentParser, what: str = "the figures, with machine and versions,") -> None:
    parser.add_argument("--json", type=Path, help=f"write {what} to this file")


def add_job(parser: argparse.ArgumentParser) -> None:
    """``--job`` and ``--tiny``, which ``jobs.one_job`` takes."""
    parser.add_argument("--job", help=f"a row of Table 8 (default: {JOB}; with --tiny: {TINY_JOB})")
    parser.add_argument("--tiny", action="store_true", help="a dry run on a tiny network, whose times say nothing")


def write_record(path: Path | None, content: Any) -> None:
    """Write figures as JSON, whole or not at all, with the folder that they go to; nothing where no file is named."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
