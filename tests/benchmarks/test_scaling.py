"""What several processes cost on paper, and that hosts which are simulated send just that."""

from contextlib import ExitStack

import pytest
from ffw_fast.benchmarks import processes, scaling
from ffw_fast.benchmarks.hosts import Hosts


def test_the_paper_costs(capsys):
    network = scaling.Network(gates=1000, macs=1e6, features=8, classes=3, heads=2)
    joint, gradient, features = scaling.messages(network, batch=10)
    assert (joint.bytes, gradient.bytes, features.bytes) == (4 * 19, 4000, 320)
    assert scaling.bytes_sent(gradient, 4) == 6000
    assert scaling.bytes_sent(features, 4) == 240
    assert scaling.message_seconds(gradient, 1, 1.0) == 0
    assert sum(scaling.bytes_sent(message, 4) for message in scaling.messages(network, 10, shard=True)[1:3]) == 6000
    assert scaling.measured_state(1600, 1) == scaling.counted_state(1600, 1) == 7 * 4 * 1600
    assert scaling.measured_state(1600, 4) == scaling.counted_state(1600, 4) == 4 * 4 * 1600
    scaling.main([])
    assert "speed-up" in capsys.readouterr().out


@pytest.mark.parametrize("shard", [False, True])
def test_what_two_hosts_send_each_other_is_what_the_paper_counts(shard):
    tiny = ["--tiny", "--job", "convolutions", "--batch", "5", "--steps", "3", "--repeats", "1"]
    tiny += ["--shard"] * shard
    with ExitStack() as stack:
        try:
            hosts = stack.enter_context(Hosts("1gbit"))
        except OSError as error:
            pytest.skip(str(error))
        members = processes.measure_on(2, tiny, cores=2, hosts=hosts)
    network = scaling.Network(members[0]["gates"], 0, features=16, classes=10, heads=1)
    on_paper = scaling.messages(network, 5, shard)
    each = sum(scaling.bytes_sent(message, 2) for message in on_paper)
    for member in members:
        assert member["sent"] == {message.name: message.bytes for message in on_paper}
        assert each <= member["carried"] < 2 * each, "with the headers of small packets"
        assert {part.strip() for part in member["seconds"]} > member["sent"].keys()
