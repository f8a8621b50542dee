"""``ffw-fast bench`` and ``info``: what this machine does, and with which kernels."""

import argparse
import importlib
import json

from ffw_fast.backend import backend_info
from ffw_fast.benchmarks import BENCHES
from ffw_fast.cli.options import Commands
from ffw_fast.version import __version__


def add_to(commands: Commands) -> None:
    _add_bench(commands)
    _add_info(commands)


def _add_bench(commands: Commands) -> None:
    width = max(map(len, BENCHES))
    bench = commands.add_parser(
        "bench",
        help="measure this package against its reference and the machine",
        description="Measures this package against its reference and the machine.\n\nbenchmarks:\n"
        + "\n".join(f"  {name:{width}}  {text}" for name, text in BENCHES.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_argument("benchmark", choices=BENCHES, metavar="NAME", help="which one; it takes --help, too")
    bench.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="the benchmark's own options")
    bench.set_defaults(command=_bench)


def _bench(options: argparse.Namespace) -> int:
    importlib.import_module(f"ffw_fast.benchmarks.{options.benchmark}").main(options.rest)
    return 0


def _add_info(commands: Commands) -> None:
    text = "which kernels are compiled, loaded and used, and why not where not"
    info = commands.add_parser("info", help=text, description=f"Tells {text}.")
    info.add_argument("--json", action="store_true", help="print it as JSON")
    info.set_defaults(command=_info)


def _info(options: argparse.Namespace) -> int:
    info = backend_info()
    if options.json:
        print(json.dumps(info, indent=2))
        return 0
    print(f"ffw-fast {__version__}")
    for name, value in info.items():
        if not isinstance(value, dict):
            print(f"{name}: {value if value is not None else 'not found'}")
            continue
        print(f"{name}:")
        for key, entry in value.items():
            for title, shown in _shown(key, entry):
                print(f"  {title}: {shown if shown not in (None, '') else '-'}")
    return 0


def _shown(key: str, entry: object) -> list[tuple[str, object]]:
    """What is printed of one entry: operators line by line, by what serves them."""
    if isinstance(entry, dict):
        servers = dict.fromkeys(entry.values())
        return [(f"{key} by {server}", ", ".join(k for k, v in entry.items() if v == server)) for server in servers]
    return [(key, ", ".join(map(str, entry)) if isinstance(entry, list) else entry)]
