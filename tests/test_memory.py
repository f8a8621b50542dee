"""What becomes of freed memory, in processes of its own."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from ffw_fast.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
import torch
faults = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(50_000_000)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(max(faults[2:]))
"""
BY_USERS = "from ffw_fast.memory import keep_freed_memory; print(keep_freed_memory())"

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")


def printed(*command: str, **more: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment["THP_MEM_ALLOC_ENABLE"] = "0"  # so that pages are counted one by one
    done = subprocess.run(
        [sys.executable, "-c", *command], env=environment | more, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_large_tensor_takes_the_memory_of_the_last_one():
    pages = 200_000_000 // os.sysconf("SC_PAGE_SIZE")
    assert int(printed(FAULTS, "keep")) < pages // 100
    assert int(printed(FAULTS, "as usual")) > pages // 2


def test_what_users_have_set_stands():
    assert printed(BY_USERS) == "True"
    assert printed(BY_USERS, MALLOC_TRIM_THRESHOLD_="1000000") == "False"
