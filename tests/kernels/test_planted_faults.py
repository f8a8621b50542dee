"""Faults of the usual kinds, planted one at a time: the tests of ``cases/`` must notice each."""

import json

import pytest

from tests.kernels.interpreter import output, run_cases

pytest.importorskip("triton", reason="the Triton kernels need the package triton")

FAULTS = {  # test file, module, text, what stands there instead
    "mask one short at the ragged edge": (
        "test_gate.py", "gate_weight", "lane < count - start", "lane < count - start - 1",
    ),
    "wrong stride": (
        "test_masked_linear.py", "masked_linear", "row[:, None] * x_stride", "row[:, None] * ins",
    ),
    "swapped factors in the gradient": (
        "test_masked_linear.py", "matmul", "weight_grad * w * gate_slope(m,",
        "weight_grad * m * gate_slope(w,",
    ),
    "missing mask at the ragged edge": (
        "test_linear_head.py", "linear_head", "tl.where((row < size)[:, None], error, 0.0)", "error",
    ),
    "parts of a split sum overlap": (
        "test_masked_linear.py", "masked_linear", "tl.minimum(first + rows_a_split, rows)", "rows",
    ),
    "phases of a stride without its padding": (
        "test_masked_conv2d.py", "masked_conv2d", "(phase_h + pad_h) % PHASES_H", "phase_h % PHASES_H",
    ),
    "ReLU's mask from the wrong side": (
        "test_masked_conv2d.py", "matmul", "tl.where(output > 0, grad, 0.0)",
        "tl.where(output >= 0, grad, 0.0)",
    ),
    "TF32 cut off instead of rounded": (
        "test_masked_linear.py", "matmul", "(bits + 0x1000) & -0x2000", "bits & -0x2000",
    ),
    "one operand not rounded to TF32": (
        "test_masked_conv2d.py", "matmul", "b = round_to_tf32(b)", "b = b",
    ),
    "lanes of the random numbers swapped": (
        "test_gate.py", "gate", "tl.join(tl.join(first, third), tl.join(second, fourth))",
        "tl.join(tl.join(first, second), tl.join(third, fourth))",
    ),
    "old gate after the step": (
        "test_gated_adam.py", "gated_adam", "gate_value(m, next_inverse, u, KIND)",
        "gate_value(m, inverse, u, KIND)",
    ),
    "momentum forgotten": (
        "test_linear_head.py", "linear_head", "buffer * momentum + gradient", "gradient",
    ),
    "marginals swapped": (
        "test_mutual_information.py", "mutual_information", "free / rows", "free / columns",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(name):
    file, *fault = FAULTS[name]
    result = run_cases(file, "not slow", "-p", "tests.kernels.plant", FFW_FAST_PLANT=json.dumps(fault))
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, output(result)
