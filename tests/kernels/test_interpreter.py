"""The kernels' own tests, ``cases/``, under Triton's interpreter."""

import pytest

from tests.kernels.interpreter import CASES, output, run_cases

pytest.importorskip("triton", reason="the Triton kernels need the package triton")


@pytest.mark.parametrize("name", CASES)
def test_in_the_interpreter(name):
    result = run_cases(name, "not slow")
    assert result.returncode == 0, output(result)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, path in CASES.items() if "pytest.mark.slow" in path.read_text()])
def test_longer_ones_in_the_interpreter(name):
    result = run_cases(name, "slow")
    assert result.returncode == 0, output(result)
