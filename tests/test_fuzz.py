"""Damaged files give a clear error or the right result; ``tests.fuzz`` damages them."""

import pytest

from tests import fuzz


@pytest.mark.parametrize("files", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_files_are_refused_or_harmless(files, capsys):
    assert fuzz.main(["--files", str(files), "--seed", "7"]) == 0, capsys.readouterr().out
    assert "refused" in capsys.readouterr().out
