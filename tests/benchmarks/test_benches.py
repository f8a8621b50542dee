"""``ffw-fast bench``: every benchmark stands in its help and has a help of its own."""

import pytest
from ffw_fast.benchmarks import BENCHES

from ffw_fast.cli import main


def test_the_help_has_a_line_for_each(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "--help"])
    printed = capsys.readouterr().out
    for name, text in BENCHES.items():
        assert any(name in line and text in line for line in printed.splitlines())


@pytest.mark.parametrize("name", BENCHES)
def test_each_has_a_help(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["bench", name, "--help"])
    assert f"ffw-fast bench {name}" in capsys.readouterr().out
