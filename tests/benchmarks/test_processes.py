"""One extraction on one process and on two, at tiny sizes: tables, and a record of all figures."""

import json

from ffw_fast.benchmarks import processes
from ffw_fast.benchmarks.scaling import FEATURES, GRADIENT, JOINT


def test_figures_are_printed_and_written(tmp_path, capsys):
    small = ["--tiny", "--batch", "4", "--steps", "2", "--repeats", "1", "--cores", "2"]
    processes.main([*small, "--json", str(tmp_path / "figures.json")])
    printed = capsys.readouterr().out
    assert "Tiny convolutions, batch 4: milliseconds" in printed
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["machine"]["torch"] in printed
    chosen = figures["options"]
    assert (chosen["job"], chosen["batch"], chosen["steps"], chosen["late"]) == ("Tiny convolutions", 4, 2, False)
    alone, together = figures["rows"]
    assert [(row["processes"], row["threads"]) for row in (alone, together)] == [(1, 2), (2, 1)]
    assert alone["seconds"].keys() < together["seconds"].keys() <= set(processes.PARTS)
    assert all(seconds > 0 for seconds in together["seconds"].values())
    assert alone["bytes"] == {"messages": {}, "link": None}
    assert set(together["bytes"]["messages"]) == {JOINT, GRADIENT, FEATURES}
    assert together["bytes"]["messages"][GRADIENT] == 4 * together["gates"]
