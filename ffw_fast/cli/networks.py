"""``ffw-fast compact`` and ``export``: the network of a finished run, made smaller or handed on."""

import argparse
from pathlib import Path

from ffw_fast.cli.options import Commands
from ffw_fast.export import FORMATS, export
from ffw_fast.files import write_json, write_tensors
from ffw_fast.own import NAME as OWN
from ffw_fast.runs.loading import load_run
from ffw_fast.runs.reading import COMPACT
from ffw_fast.sizes import SIZES, compare_sizes, sizes_table
from ffw_fast.tables import print_table


def add_to(commands: Commands) -> None:
    _add_compact(commands)
    _add_export(commands)


def _add_compact(commands: Commands) -> None:
    compact = commands.add_parser(
        "compact",
        help="cut the channels out of a run's network that its zeros made useless",
        description="Writes the smaller network's weights, which ffw_fast.load_compacted reads, and sizes.json: "
        "parameters, MACs, latency and bytes before and after. Needs the extra compact.",
    )
    _add_folder(compact)
    compact.add_argument("--out", dest="file", metavar="FILE", help=f"where to (default: DIR/{COMPACT})")
    compact.set_defaults(command=_compact)


def _compact(options: argparse.Namespace) -> int:
    folder = Path(options.folder)
    found = load_run(folder, options.model)
    pruned, small = found.model(options.best), found.model(options.best, compact=True)
    file = Path(options.file or folder / COMPACT)
    write_tensors(file, {name: value.clone() for name, value in small.state_dict().items()})
    sizes = compare_sizes({"with zeros": pruned, "compact": small}, found.example(found.settings.batch_size))
    write_json(folder / SIZES, sizes)
    print_table(sizes_table(sizes))
    print(f"compact network: {file}")
    return 0


def _add_export(commands: Commands) -> None:
    export_parser = commands.add_parser(
        "export",
        help="write a run's network as a program that runs without this package",
        description="Writes the pruned network for batches of any size, and compares what the file computes.",
    )
    _add_folder(export_parser)
    choose = export_parser.add_argument
    choose("--format", choices=FORMATS, required=True, help="onnx (needs the extra onnx) or pt2, of torch.export")
    choose("--compact", action="store_true", help="the compact network; needs the extra compact")
    choose("--out", dest="file", metavar="FILE", help="where to (default: DIR/model.onnx or DIR/model.pt2)")
    export_parser.set_defaults(command=_export)


def _export(options: argparse.Namespace) -> int:
    found = load_run(options.folder, options.model)
    file = Path(options.file or Path(options.folder) / f"model.{options.format}")
    difference = export(found.model(options.best, compact=options.compact), found.example(), file, options.format)
    print(f"{file}: outputs differ by at most {difference:.2g}")
    return 0


def _add_folder(parser: argparse.ArgumentParser) -> None:
    """The arguments of commands that read a run's network."""
    parser.add_argument("folder", metavar="DIR", help="the run folder")
    parser.add_argument(
        "--model",
        metavar="MODULE:FUNCTION",
        help=f"of a run of {OWN}: gives the network, as for the run; the name in the folder is not called",
    )
    parser.add_argument(
        "--best", action="store_true", help="the network with the best scores (default: that with the final ones)"
    )
