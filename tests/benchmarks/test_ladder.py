"""The one table of all GPU kernels: its rows, and what it says of what cannot be looked at."""

import pytest
from ffw_fast.benchmarks import ladder

ROW = ladder.Row("kernel", 80, 40, 1024, 0, 128, "HMMA.1688.F32.TF32", 0.5, 0.25, [])


def columns(table):
    return {str(column.header): list(column.cells) for column in table.columns}


def test_a_row_of_the_table():
    broken = ladder.Row("other", 90, 255, 0, 2, 32, "", 0.1, 0.25, ["2 spills"])
    shown = columns(ladder.table_of([ROW, broken]))
    assert shown["budget"] == ["kept", "2 spills"]
    assert shown["tensor core"] == ["HMMA.1688.F32.TF32", "-"]
    assert shown["widest load"] == ["128 bits", "32 bits"]
    assert shown["occupancy"] == ["50%", "10%"]
    assert shown["planned"] == [">= 25%"] * 2


@pytest.mark.parametrize(("row", "code"), [(ROW, 0), (None, 2)])
def test_the_command(monkeypatch, capsys, row, code):
    monkeypatch.setattr(ladder, "missing", lambda: {"CUDA C++": "no nvcc"} | ({} if row else {"Triton": "no triton"}))
    monkeypatch.setattr(ladder, "triton_rows", lambda architectures: [row])
    assert ladder.main() == code
    assert "no CUDA C++ kernels: no nvcc" in capsys.readouterr().err


def test_a_broken_budget_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(ladder, "missing", lambda: {"CUDA C++": "no nvcc"})
    broken = ladder.Row("other", 90, 255, 0, 2, 32, "", 0.1, 0.25, ["2 spills"])
    monkeypatch.setattr(ladder, "triton_rows", lambda architectures: [ROW, broken])
    assert ladder.main() == 1
    assert "2 kernels; 1 budget broken" in capsys.readouterr().out
