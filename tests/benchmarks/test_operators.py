"""The operators' suite: it covers every operator, times nothing that is wrong, and leaves table, CSV and plot."""

import csv

import pytest
import torch
from ffw_fast.benchmarks import operators
from ffw_fast.benchmarks import test_operators as suite
from ffw_fast.benchmarks.memory import allocated_peak
from torch.utils._python_dispatch import TorchDispatchMode

CASES = operators.all_cases(tiny=True)
ELSEWHERE = "masked_"  # the fused layers' operators: in the benchmark of masked layers, where a GPU is


class SeenOperators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_every_operator_is_run_and_right():
    with SeenOperators() as seen:
        for case in CASES:
            torch.manual_seed(0)
            work = case.setup()
            operators.check_same(work.run["ffw_fast"](), work.run["eager"]())
            assert work.flops >= 0
            assert work.bytes > 0
    known = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("ffw_fast::")}
    expected = {name for name in known if ELSEWHERE not in name}
    assert len(expected) >= 8
    assert expected <= {name.split(".")[0] for name in seen.names}


def test_the_suite_leaves_a_table_a_csv_and_a_plot(tmp_path, capsys):
    pytest.importorskip("pytest_benchmark")
    pytest.importorskip("matplotlib")
    chosen = ["--only", "gate", "mutual", "--providers", "ffw_fast", "eager"]
    operators.main(["--tiny", *chosen, "--csv", str(tmp_path / "o.csv"), "--plot", str(tmp_path / "o.png")])
    printed = capsys.readouterr().out
    with (tmp_path / "o.csv").open() as file:
        rows = list(csv.DictReader(file))
    keys = {(row["operator"], row["mode"], row["shape"], row["provider"]) for row in rows}
    assert len(keys) == len(rows) == 2 * len([case for case in CASES if "gate" in str(case) or "mutual" in str(case)])
    for row in rows:
        assert row["operator"] in printed
        assert row["torch"] == torch.__version__
        assert float(row["best_seconds"]) <= float(row["seconds"])
        assert float(row["times_floor"]) == pytest.approx(float(row["seconds"]) / float(row["floor_seconds"]))
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_torch_compile_is_one_of_the_sides():
    for row in operators.measure(["step", "epoch"], ["compile"], tiny=True):
        assert row["provider"] == "compile"


@pytest.mark.parametrize("wrong", [1.001, float("nan"), float("inf")])
def test_no_speed_for_a_wrong_result(wrong, pytestconfig):
    right = torch.ones(3)
    work = operators.Work({"ffw_fast": lambda: [right * wrong], "eager": lambda: [right]}, 1, 1)
    case = operators.Case("wrong", "forward", "3", lambda: work)
    with pytest.raises(AssertionError, match="result 0 differs"):
        suite.test_operator(case, "ffw_fast", benchmark=None, pytestconfig=pytestconfig)


def test_a_result_of_another_shape_or_number_is_wrong():
    with pytest.raises(AssertionError, match="shape"):
        operators.check_same([torch.ones(1)], [torch.ones(2)])
    with pytest.raises(AssertionError):
        operators.check_same([torch.ones(2)], [])


def test_peak_memory_is_what_is_held_at_a_time():
    def run():
        for _ in range(3):
            torch.empty(1000)  # freed before the next
        first, second = torch.empty(500), torch.empty(500)
        return first, second

    assert allocated_peak(run) == 4000
