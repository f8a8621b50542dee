"""Test files of ``cases/`` under Triton's interpreter, each in a process of its own.

The variable that turns the interpreter on must be set before Triton is imported and holds for a whole process.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CASES = {path.name: path for path in sorted((Path(__file__).parent / "cases").glob("test_*.py"))}


def run_cases(name: str, marked: str, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run those tests of a file that are ``marked`` so, until one fails."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", marked]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment = inherited | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(
        [*command, *options, str(CASES[name])], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )


def output(result: subprocess.CompletedProcess[str]) -> str:
    """The end of what it printed, for a message."""
    return result.stdout[-6000:] + result.stderr[-3000:]
