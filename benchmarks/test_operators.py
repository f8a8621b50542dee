"""The suite behind ``ffw-fast bench operators``: ``pytest benchmarks --benchmark-only``. See ``operators.py``."""

import shutil
import time

import pytest
import torch
from ffw_fast.benchmarks.machine import copy_rate
from ffw_fast.benchmarks.memory import allocated_peak
from ffw_fast.benchmarks.operators import all_cases, check_same

SECONDS = 0.5  # that a case is measured for, if its rounds allow it
FEWEST, MOST = 5, 200  # rounds


def pytest_generate_tests(metafunc):
    """Cases by provider: the providers of a case run one after the other."""
    chosen = metafunc.config.getoption("--providers").split(",")
    pairs = [(case, provider) for case in all_cases(metafunc.config.getoption("--tiny")) for provider in chosen]
    metafunc.parametrize(("case", "provider"), pairs, ids=[f"{case} {provider}" for case, provider in pairs])


def test_operator(case, provider, benchmark, pytestconfig):
    if provider == "compile" and shutil.which("c++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    torch.manual_seed(0)
    torch.compiler.reset()
    work = case.setup()
    run = work.run[provider]
    check_same(run(), work.run["eager"]())
    started = time.perf_counter()
    run()
    enough = 0 if pytestconfig.getoption("--tiny") else int(SECONDS / (time.perf_counter() - started))
    benchmark.extra_info.update(
        operator=case.operator,
        provider=provider,
        mode=case.mode,
        shape=case.shape,
        flops=work.flops,
        bytes=work.bytes,
        copy_rate=copy_rate(work.bytes // 2),
        peak_bytes=allocated_peak(run),
    )
    benchmark.pedantic(run, rounds=min(max(enough, FEWEST), MOST), warmup_rounds=1)
