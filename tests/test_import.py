"""What importing the package does to the process."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("given", [None, "0"])
def test_huge_pages_are_asked_for_unless_the_user_has_decided(given):
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    if given is not None:
        environment["THP_MEM_ALLOC_ENABLE"] = given
    code = "import ffw_fast, os; print(os.environ['THP_MEM_ALLOC_ENABLE'])"
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == (given or "1")


def test_a_system_without_posix_locks():
    code = "import sys; sys.modules['fcntl'] = None; import ffw_fast.cli; print(ffw_fast.__version__)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
