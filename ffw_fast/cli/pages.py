"""``ffw-fast report`` and ``figure``: pages and pictures of what runs left in their folders."""

import argparse
import sys
from pathlib import Path

from ffw_fast.cli.options import Commands, adder
from ffw_fast.figures import FIGURES, make_figure
from ffw_fast.report import write_report


def add_to(commands: Commands) -> None:
    _add_report(commands)
    _add_figure(commands)


def _add_report(commands: Commands) -> None:
    report = commands.add_parser(
        "report",
        help="write a page about a run, comparison or sweep: one HTML file that needs no network",
        description="Writes report.html into a folder of results. Needs the extra report.",
    )
    report.add_argument("folder", metavar="DIR", help="of ffw-fast run, compare or sweep, or of Extraction.save")
    report.set_defaults(command=_report)


def _report(options: argparse.Namespace) -> int:
    print(write_report(options.folder))
    return 0


def _add_figure(commands: Commands) -> None:
    lines = [f"  {name:16} {figure.shows}; from {figure.reads}" for name, figure in FIGURES.items()]
    figure = commands.add_parser(
        "figure",
        help="draw a figure of runs or comparisons, with the numbers behind it",
        description="Writes NAME.png, NAME.svg and NAME.csv, the numbers behind them. Needs the extra figures.",
        epilog="\n".join(["figures:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    figure.add_argument("name", metavar="NAME", choices=FIGURES, help="which one, see below")
    figure.add_argument("paths", metavar="DIR", nargs="+", help="run folders, folders of runs, or of comparisons")
    adder(figure)("--out", str, "figures", "DIR", "the folder to write to")
    figure.set_defaults(command=_figure)


def _figure(options: argparse.Namespace) -> int:
    for path in make_figure(options.name, options.paths, options.out):
        print(path)
    return 0


def tell_report(out: str | Path) -> None:
    """Write the report of what has just ended, or say what it needs."""
    try:
        print(f"report: {write_report(out)}")
    except ImportError as error:
        print(f"no report yet: {error}; then: ffw-fast report {out}")
    except OSError as error:  # the results are there
        print(f"ffw-fast: warning: no report: {error}; once that is mended: ffw-fast report {out}", file=sys.stderr)
