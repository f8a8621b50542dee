"""How cost grows: points run in processes of their own, exponents and slopes are fitted."""

import json

import pytest
from ffw_fast.benchmarks import growth
from ffw_fast.benchmarks.growth import Cost, Point


def test_power_laws_are_recovered():
    assert growth.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    costs = [Cost(gates, 1.0, 500 + 31 * gates, 1000 + 35 * gates, own=7 * gates) for gates in (10, 100, 1000)]
    assert growth.bytes_per_gate(costs) == pytest.approx((24, 28))


def test_every_size_is_varied_alone():
    for swept, points in growth.sweeps(tiny=False).items():
        varied = {name for name in ("samples", "hidden", "batch_size", "threads") for point in points
                  if getattr(point, name) != getattr(points[0], name)}  # fmt: skip
        assert varied <= {swept.replace(" ", "_"), {"parameters": "hidden"}.get(swept, swept)}
        assert len(set(points)) == len(points)


def test_a_table_and_a_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    growth.main(["--tiny", "--memory", "--json", str(tmp_path / "g.json"), "--plot", str(tmp_path / "g.png")])
    assert "bytes" in capsys.readouterr().out
    rows = json.loads((tmp_path / "g.json").read_text())["rows"]
    assert [row["hidden"] for row in rows] == [16, 32]
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_process_tells_why():
    with pytest.raises(RuntimeError, match="batch_size"):
        growth.in_own_process(Point(batch_size=0))
