"""Everything that a GPU has to say, in one command: build, kernel tests, operators and the workloads of Table 8.

``ffw-fast bench gpu`` needs a CUDA device and a checkout of the repository. Every section of
``ffw_fast.benchmarks.gpu_sections`` runs in a process of its own with a time limit, so that a failure in one (an
illegal access ruins a whole process, a kernel may hang) leaves the others; together they stay under ten minutes.
Figures are written to ``benchmarks/results/gpu-DEVICE.json`` after every section, and of a section that is cut off
those that it had. ``--dry`` runs the same code on the CPU at small sizes, and writes nothing but what ``--json`` names.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ffw_fast.benchmarks.command import bench_parser, write_record
from ffw_fast.benchmarks.gpu_sections import ROOT, SECTIONS, missing
from ffw_fast.benchmarks.step_profile import profile_table
from rich.table import Table

from ffw_fast.tables import print_table

TOTAL = 560  # seconds for all sections together
LOG = 20_000  # characters that are kept of the end of what a section prints


def run_section(name: str, dry: bool, limit: float) -> dict[str, Any]:
    """The section's figures, what it printed, and why there is no more; it runs in a process of its own."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        target, log = Path(folder, "figures.json"), Path(folder, "log.txt")
        command = [sys.executable, "-m", "ffw_fast.benchmarks.gpu", "--section", name, "--json", str(target)]
        with log.open("w") as file:
            code = _run_within(limit, [*command, *(["--dry"] if dry else [])], file)
        figures = json.loads(target.read_text()) if target.exists() else []
        printed = log.read_text(errors="replace")
    problem = None
    if code == 0 and all(row.get("passed", True) for row in figures):
        printed = ""  # it is kept for whoever looks for a fault
    if code is None:
        problem = f"not done after {limit:.0f} s"
    elif code != 0:
        problem = (printed.strip().splitlines() or [f"it ended with code {code} and without a word"])[-1]
    return {"seconds": time.perf_counter() - started, "problem": problem, "figures": figures, "output": printed[-LOG:]}


def _run_within(limit: float, command: list[str], log: Any) -> int | None:
    """Exit code of the command; None where it had to be ended, and with it all that it has started."""
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def show(results: dict[str, dict[str, Any]]) -> None:
    """Tables of what there is, and a line for each section."""
    for name, result in results.items():
        print(f"{name}: {result['problem'] or 'done'} ({result['seconds']:.0f} s)")
        rows = result["figures"]
        for row in rows:
            if row.get("passed") is not None:
                print(f"  {'passed' if row['passed'] else 'FAILED'}: {row.get('summary', row['command'])}")
            for line in row.get("failed", []):
                print(f"  {line}")
        if name == "step kernels":
            for row in rows:
                if "kernels" in row:
                    print_table(profile_table(row))
                else:
                    print_facts([row])
        elif rows and rows[0].keys() & {"operator", "workload", "layer"}:
            print_table(_table(name, rows))
        elif name == "here":
            print_facts(rows)


def print_facts(rows: list[dict[str, Any]]) -> None:
    """One line for each fact that is no table of its own."""
    for key, value in (pair for row in rows for pair in row.items()):
        if not isinstance(value, dict | list):
            print(f"  {key}: {f'{value:.3g}' if isinstance(value, float) else value}")


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=f"{title} (times in s)")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(_shown(row.get(column, "-")) for column in columns))
    return table


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def default_target() -> Path:
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower()
    return ROOT / "benchmarks" / "results" / f"gpu-{name}.json"


def main(arguments: list[str] | None = None) -> None:
    """Run all sections, or one; ``SystemExit`` where there is no CUDA device and this is no dry run."""
    parser = bench_parser("gpu", __doc__)
    parser.add_argument("--dry", action="store_true", help="the same on the CPU at small sizes; no figure counts")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--section", choices=SECTIONS, help="one of them, in this process")
    parser.add_argument("--json", type=Path, help="where the figures go (default: benchmarks/results/gpu-DEVICE.json)")
    options = parser.parse_args(arguments)
    if not options.dry and not torch.cuda.is_available():
        raise SystemExit("ffw-fast bench gpu needs a CUDA device (this PyTorch sees none); --dry runs it on the CPU")
    if not (ROOT / "setup.py").exists():
        raise SystemExit(f"ffw-fast bench gpu needs a checkout, installed from there by pip install -e; this is {ROOT}")
    target = options.json or (None if options.dry else default_target())
    if options.section:
        _write_rows(options.section, options.dry, target)
        return
    for what in missing():
        print(f"missing: {what}", flush=True)
    show(run_all(options.dry, target, options.only or list(SECTIONS)))
    if target:
        print(f"written to {target}")


def run_all(dry: bool, target: Path | None, names: list[str]) -> dict[str, dict[str, Any]]:
    """The sections of these names, each with what is left of the time; written down after each."""
    results: dict[str, dict[str, Any]] = {}
    ends = time.perf_counter() + TOTAL
    for name in names:
        print(f"{name} ...", flush=True)
        left = ends - time.perf_counter()
        if left > 0:
            results[name] = run_section(name, dry, min(SECTIONS[name].limit, left))
        else:
            results[name] = {"seconds": 0.0, "problem": "no time was left", "figures": [], "output": ""}
        write_record(target, {"dry": dry, "sections": results})
    return results


def _write_rows(name: str, dry: bool, target: Path | None) -> None:
    """A section in this process; its rows are written down as they come, or printed."""
    rows: list[dict[str, Any]] = []
    for row in SECTIONS[name].run(dry):
        rows.append(row)
        if target is None:
            print(json.dumps(row), flush=True)
        write_record(target, rows)


if __name__ == "__main__":
    main()
