"""The budget for data in memory, of control groups as files."""

import pytest

from ffw_fast.data import memory

GB = 1 << 30
NAMES = {1: memory.VERSION_1, 2: memory.VERSION_2}


@pytest.fixture
def group(tmp_path, monkeypatch):
    """Makes groups around this process, on a machine with 100 GB available."""
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {100 << 20} kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(memory, "GROUPS", tmp_path)

    def make(path, limit, used, reclaimable, version=2):
        folder = tmp_path / ("" if version == 2 else "memory") / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in zip(NAMES[version], (limit, used, None), strict=True):
            if value is not None:
                (folder / name).write_text(f"{value}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{NAMES[version][2]} {reclaimable}\n")
        (tmp_path / "membership").write_text(
            f"4:cpu,cpuacct:/x\n3:memory:/{path}\n" if version == 1 else f"0::/{path}\n"
        )

    return make


@pytest.mark.parametrize("version", [1, 2])
def test_what_the_system_takes_back_is_available(group, version):
    group("box", 16 * GB, 15 * GB, 9 * GB, version)
    assert memory.memory_budget() == 5 * GB


def test_the_tightest_group_around_the_process_counts(group):
    group("", "max", 0, 0)
    group("slice", 8 * GB, 6 * GB, 0)
    group("slice/job", "max", GB, 0)
    assert memory.memory_budget() == GB
    group("slice/job/step", 2 * GB, GB, 0)
    assert memory.memory_budget() == GB // 2


def test_a_group_beyond_its_limit_leaves_nothing(group):
    group("", GB, GB + 4096, 0)
    assert memory.memory_budget() == 0


def test_without_limits_it_is_half_of_what_the_machine_has(group):
    assert memory.memory_budget() == 50 * GB
    group("box", "max", GB, 0)
    assert memory.memory_budget() == 50 * GB
