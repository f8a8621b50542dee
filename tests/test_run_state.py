"""Checkpoints: an interrupted run ends with the same bits, and a file that is not whole or not its own is refused."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ffw_fast import run_state, schedule
from ffw_fast.extract import extract
from ffw_fast.files import digest, write_tensors
from ffw_fast.progress import Progress
from ffw_fast.run_lock import LOCK
from ffw_fast.run_state import ARRIVING, CHECKPOINT, PREVIOUS, Resumable, RunState, Snapshot
from ffw_fast.version import __version__
from tests.short_runs import assert_same_bits
from tests.six_features import arguments, network, samples

RUNS = [
    {"schedule": "published"},
    {"schedule": "adaptive", "anneal_rate": 2e-6},
    {"schedule": "published", "gate": "bernoulli"},
    {"schedule": "adaptive", "gate": "concrete", "anneal_rate": 2e-6},
]
EPOCHS = 6


@pytest.fixture(autouse=True)
def early_cuts(short_fits, monkeypatch):
    """The published schedule cuts T where the MI fails twice."""
    monkeypatch.setattr(schedule, "MI_PATIENCE", 0)


class Interrupted(Exception):
    pass


class InterruptAfter(Progress):
    """Ends the run when an epoch's checkpoint has been written."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def epoch(self, row: dict[str, Any]) -> None:
        if row["epoch"] == self.epochs:
            raise Interrupted


class OnAnotherDevice:
    """A state that a copy to the host would fail on, and that changes in place."""

    def __init__(self) -> None:
        self.tensor = torch.zeros(3, device="meta")

    def state(self):
        return {"tensor": self.tensor}, {}


def test_a_snapshot_stays_on_the_device():
    run: Any = OnAnotherDevice()
    kept = Snapshot.of(run).tensors["tensor"]
    assert kept.device.type == "meta"
    assert kept is not run.tensor


def run(run_dir: Path | None = None, **changes: Any):
    return extract(network(), samples(40, 2, 1), samples(30, 2, 2), run_dir=run_dir, **arguments(**changes))


# resuming ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", RUNS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_interrupted_runs_end_with_the_same_bits(tmp_path, settings):
    settings = {**settings, "max_epochs": EPOCHS}
    expected = run(**settings)
    assert len(expected.history) == EPOCHS
    assert len({row["temperature"] for row in expected.history}) > 1
    for epochs in range(1, EPOCHS + 1):
        folder = tmp_path / str(epochs)
        with pytest.raises(Interrupted):
            run(folder, **{**settings, "progress": InterruptAfter(epochs)})
        found = run(folder, **settings, resume=True)
        assert_same_bits(found, expected)
        assert found.metrics["seconds"] > sum(row["seconds"] for row in found.history)


@pytest.mark.parametrize("settings", RUNS[:2])
def test_a_run_can_be_extended(tmp_path, settings):
    expected = run(**settings, max_epochs=EPOCHS)
    for epochs in (1, 3, 4, EPOCHS):
        found = run(tmp_path, **settings, max_epochs=epochs, resume=epochs > 1)
        assert len(found.history) == epochs
    assert_same_bits(found, expected)


def test_interrupted_again_and_again(tmp_path):
    expected = run(max_epochs=EPOCHS)
    for epochs in (1, 2, 4):
        with pytest.raises(Interrupted):
            run(tmp_path, max_epochs=EPOCHS, progress=InterruptAfter(epochs), resume=True)
    assert_same_bits(run(tmp_path, max_epochs=EPOCHS, resume=True), expected)


def test_checkpoints_change_nothing(tmp_path):
    assert_same_bits(run(tmp_path), run())


def test_without_resume_a_run_starts_anew(tmp_path):
    run(tmp_path, seed=5)
    assert_same_bits(run(tmp_path), run())


def test_resuming_where_nothing_is_starts_a_run(tmp_path):
    assert_same_bits(run(tmp_path / "new" / "folder", resume=True), run())


def test_resume_needs_a_folder():
    with pytest.raises(ValueError, match="resume needs run_dir, the folder that holds the checkpoint"):
        run(resume=True)


# other runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "belongs to another run: seed was 0 and is now 1$"),
        (
            {"gamma": 3.0, "gate": "hard"},
            "run: gamma was 10.0 and is now 3.0; gate was 'ffw' and is now 'hard'|"
            "run: gate was 'ffw' and is now 'hard'; gamma was 10.0 and is now 3.0",
        ),
        ({"schedule": "adaptive"}, "schedule was 'published' and is now 'adaptive'"),
        ({"bottleneck": "fc1"}, "bottleneck was 'relu' and is now 'fc1'"),
        ({"batch_size": 9}, "batch_size was 10 and is now 9"),
    ],
)
def test_a_run_of_other_settings_is_refused(tmp_path, changes, message):
    run(tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **changes, resume=True)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_a_run_of_another_model_is_refused(tmp_path):
    run(tmp_path)
    train, val = samples(40, 2, 1), samples(30, 2, 2)
    with pytest.raises(ValueError, match=r"belongs to another run: weights was '.*' and is now"):
        extract(network(seed=1), train, val, run_dir=tmp_path, resume=True, **arguments())


def test_a_run_of_the_same_weights_in_other_modules_is_refused(tmp_path):
    run(tmp_path)
    train, val, model = samples(40, 2, 1), samples(30, 2, 2), network()
    model.relu = nn.Tanh()
    with pytest.raises(ValueError, match=r"belongs to another run: modules was '.*' and is now"):
        extract(model, train, val, run_dir=tmp_path, resume=True, **arguments())


def test_where_modules_lie_in_memory_identifies_nothing(tmp_path):
    class Addressed(nn.ReLU):
        def extra_repr(self) -> str:
            return object.__repr__(self)

    train, val, model = samples(40, 2, 1), samples(30, 2, 2), network()
    for max_epochs in (1, 2):
        model.relu = Addressed()
        found = extract(model, train, val, run_dir=tmp_path, resume=True, **arguments(max_epochs=max_epochs))
    assert len(found.history) == 2


# files ---------------------------------------------------------------------------------------------------------------


class Notes(Resumable):
    """Something small that can be checkpointed."""

    def __init__(self, epochs: int = 3) -> None:
        self.epochs = epochs
        self.tensors: dict[str, torch.Tensor] = {}
        self.record: dict[str, Any] = {}

    def state(self):
        tensors = {"half": torch.arange(3).half(), "counts": torch.arange(6).view(2, 3).T, "one": torch.tensor(2.5)}
        return tensors, {"epochs": self.epochs, "best": None, "losses": [0.1, float("inf")]}

    def load_state(self, tensors, record):
        self.tensors, self.record = tensors, record


IDENTITY = {"seed": 3, "gamma": 0.1, "bottleneck": "pool"}


def saved(folder: Path) -> Path:
    RunState(folder, IDENTITY, resume=False).save(Notes())
    return folder / CHECKPOINT


def restore(folder: Path) -> Notes:
    notes = Notes()
    assert RunState(folder, IDENTITY, resume=True).restore(notes)
    return notes


def assert_whole(notes: Notes) -> None:
    tensors, record = notes.state()
    assert notes.record == record
    assert notes.tensors.keys() == tensors.keys()
    for name, value in tensors.items():
        assert notes.tensors[name].dtype == value.dtype
        assert torch.equal(notes.tensors[name], value)


def test_state_is_read_as_it_was_written(tmp_path):
    saved(tmp_path)
    assert_whole(restore(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]  # no temporary file is left


def assert_refused_or_whole(folder: Path, content: bytes) -> bool:
    """Whether the file was refused, by a ``ValueError`` with its path."""
    (folder / CHECKPOINT).write_bytes(content)
    notes, message = Notes(), None
    try:
        RunState(folder, IDENTITY, resume=True).restore(notes)
    except ValueError as error:
        message = str(error)
    if message is None:
        assert_whole(notes)
    else:
        assert str(folder / CHECKPOINT) in message
        assert not notes.tensors
    return message is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def content(folder):
    return saved(folder).read_bytes()


def test_every_truncation_is_refused(folder, content):
    for length in range(len(content)):
        assert assert_refused_or_whole(folder, content[:length])


def test_every_flipped_byte_is_refused_or_harmless(folder, content):
    """Harmless are a few bytes of padding and the case of a hexadecimal digit; nothing of the state."""
    harmless = 0
    for position in range(len(content)):
        for bit in (0, 3, 5, 7):
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            harmless += not assert_refused_or_whole(folder, bytes(changed))
    assert harmless < 0.01 * 4 * len(content)


@given(st.data())
def test_mutations_are_refused_or_harmless(folder, content, data):
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(start + 40, len(content))))
    assert_refused_or_whole(folder, content[:start] + data.draw(st.binary(max_size=40)) + content[end:])


@given(st.binary(max_size=300))
def test_garbage_is_refused(folder, garbage):
    assert assert_refused_or_whole(folder, garbage)


def test_a_safetensors_file_of_others_is_refused(tmp_path):
    for metadata, message in (
        (None, "it has no checksum"),
        ({"format": "pt"}, "it has no checksum"),
        ({"record": "{}", "identity": "{}", "checksum": "0"}, "do not have the checksum that was written"),
    ):
        save_file({"weight": torch.ones(3)}, tmp_path / CHECKPOINT, metadata)
        with pytest.raises(ValueError, match=message):
            restore(tmp_path)


def test_a_file_of_this_package_that_is_no_checkpoint_is_refused(tmp_path):
    write_tensors(tmp_path / CHECKPOINT, {"weight": torch.ones(3)})
    with pytest.raises(ValueError, match="is no checkpoint: it has no identity, record"):
        restore(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("half"),
        lambda tensors: tensors.update(half=torch.ones(1).half()),  # it could be broadcast
        lambda tensors: tensors.update(half=torch.ones(3)),
        lambda tensors: tensors.update(other=torch.ones(3)),
    ],
)
def test_a_forged_file_whose_tensors_do_not_fit_is_refused(tmp_path, change):
    forged = Notes()
    tensors, record = forged.state()
    change(tensors)
    forged.state = lambda: (tensors, record)
    RunState(tmp_path, IDENTITY, resume=False).save(forged)
    with pytest.raises(ValueError, match=r"does not fit this run: (half|other)$"):
        restore(tmp_path)


def test_a_whole_file_that_does_not_fit_the_run_is_refused(tmp_path):
    saved(tmp_path)

    class Other(Notes):
        def load_state(self, tensors, record):
            return tensors["moments"]

    with pytest.raises(ValueError, match="does not fit this run: 'moments'"):
        RunState(tmp_path, IDENTITY, resume=True).restore(Other())


def test_another_identity_is_listed(tmp_path):
    saved(tmp_path)
    state = RunState(tmp_path, {"seed": 4, "gamma": 0.1, "precision": "fp32"}, resume=True)
    differences = "bottleneck was 'pool' and is now None; precision was None and is now 'fp32'; seed was 3 and is now 4"
    with pytest.raises(ValueError, match=f"belongs to another run: {differences}$"):
        state.restore(Notes())


def test_a_failed_write_is_a_warning_and_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    saved(tmp_path)

    def fail(tensors, target, metadata):
        Path(target).write_bytes(b"half a che")
        raise OSError("No space left on device")

    monkeypatch.setattr("ffw_fast.files.save_file", fail)
    with pytest.warns(UserWarning, match=r"no checkpoint could be written, the run goes on without: No space left"):
        RunState(tmp_path, IDENTITY, resume=True).save(Notes(epochs=4))
    assert_whole(restore(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]  # the half file is gone


# the last two --------------------------------------------------------------------------------------------------------


@pytest.fixture
def every_state_written(monkeypatch):
    monkeypatch.setattr(run_state, "LONGEST", 0.0)


def two_saved(folder: Path) -> None:
    """A checkpoint after 3 epochs, and the newest after 4."""
    state = RunState(folder, IDENTITY, resume=False)
    for epochs in (2, 3, 4):
        state.save(Notes(epochs))


def test_the_last_two_checkpoints_are_kept(tmp_path, every_state_written):
    two_saved(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {CHECKPOINT, PREVIOUS}
    assert restore(tmp_path).record["epochs"] == 4


@pytest.mark.parametrize("content", [b"", b"half", None])
def test_a_damaged_newest_falls_back_to_the_one_before_it(tmp_path, every_state_written, content):
    two_saved(tmp_path)
    newest = tmp_path / CHECKPOINT
    newest.write_bytes(newest.read_bytes()[:-1] if content is None else content)
    with pytest.warns(UserWarning, match=rf"{newest} is damaged.*; the run goes on from the checkpoint before it$"):
        assert restore(tmp_path).record["epochs"] == 3
    assert restore(tmp_path).record["epochs"] == 3  # it has taken the damaged one's place
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]


def test_a_missing_newest_falls_back_too(tmp_path, every_state_written):
    """A kill between the two renames leaves it so."""
    two_saved(tmp_path)
    (tmp_path / CHECKPOINT).unlink()
    assert restore(tmp_path).record["epochs"] == 3


def test_two_damaged_ones_are_an_error(tmp_path, every_state_written):
    two_saved(tmp_path)
    for name in (CHECKPOINT, PREVIOUS):
        (tmp_path / name).write_bytes(b"half")
    with pytest.raises(ValueError, match=rf"{CHECKPOINT} is damaged.*{PREVIOUS} is damaged"):
        restore(tmp_path)


def test_the_checkpoint_of_an_older_run_is_not_kept_as_the_previous_one(tmp_path, every_state_written):
    two_saved(tmp_path)
    RunState(tmp_path, IDENTITY, resume=False).save(Notes(1))
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]
    assert restore(tmp_path).record["epochs"] == 1


@pytest.mark.parametrize("error", [OSError("busy"), KeyboardInterrupt()], ids=["OSError", "Ctrl-C"])
def test_what_is_cut_off_between_the_two_renames_is_written_by_the_next_write(
    tmp_path, monkeypatch, every_state_written, error
):
    rename, arrivals = Path.replace, []

    def fail_at_the_second(path, target):
        arrivals.extend([path] if path.name.endswith(ARRIVING) else [])
        if arrivals[1:] == [path]:
            arrivals.append(None)
            raise error
        return rename(path, target)

    def two_epochs():
        with RunState(tmp_path, IDENTITY, resume=False) as state:
            state.save(Notes(3))
            state.save(Notes(4))

    monkeypatch.setattr(Path, "replace", fail_at_the_second)
    with pytest.warns(UserWarning, match="busy") if isinstance(error, OSError) else pytest.raises(KeyboardInterrupt):
        two_epochs()
    assert {path.name for path in tmp_path.iterdir()} == {CHECKPOINT, PREVIOUS, LOCK}
    assert restore(tmp_path).record["epochs"] == 4


# when it is written --------------------------------------------------------------------------------------------------


def test_a_state_that_is_not_yet_worth_a_write_is_written_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(run_state, "SHARE", 1e-9)

    def run_on():
        with RunState(tmp_path, IDENTITY, resume=False) as state:
            for epochs in (1, 2, 3):
                state.save(Notes(epochs))
                assert restore(tmp_path).record["epochs"] == 1
            raise Interrupted

    with pytest.raises(Interrupted):
        run_on()
    assert restore(tmp_path).record["epochs"] == 3


def test_writing_takes_a_hundredth_of_the_time(tmp_path, monkeypatch):
    """By a clock that counts only the writes, of half a second, and the epochs, of three seconds."""
    now = [0.0]
    monkeypatch.setattr(run_state.time, "perf_counter", lambda: now[0])
    writes = []

    def write(*_arguments):
        now[0] += 0.5
        writes.append(now[0])
        (tmp_path / f"{CHECKPOINT}.new").touch()

    monkeypatch.setattr(run_state, "write_tensors", write)
    state = RunState(tmp_path, IDENTITY, resume=False)
    for epochs in range(200):
        now[0] += 3
        state.save(Notes(epochs))
    assert 0.008 < 0.5 * len(writes) / now[0] < 0.0125  # the first one comes at once
    assert max(after - before for before, after in pairwise(writes)) < 50 + 3 + 1


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    times = iter([1e9, -1e9, 5e9, 0.0, -1.0, 3.0])
    monkeypatch.setattr("time.time", lambda: next(times, 0.0))
    assert_same_bits(run(tmp_path, max_epochs=EPOCHS), run(max_epochs=EPOCHS))


def test_what_is_kept_is_not_changed_by_the_run_that_goes_on():
    notes = Notes()
    tensors, record = notes.state()
    notes.state = lambda: (tensors, record)
    state = RunState(None, IDENTITY, resume=False)
    state.keep(notes)
    expected = tensors["half"].clone()
    tensors["half"].zero_()
    record["epochs"] = 9
    state.last.load_into(notes)
    assert torch.equal(notes.tensors["half"], expected)
    assert notes.record["epochs"] == 3


# the format ----------------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_no_code(tmp_path):
    """Tensors and JSON: it can be read without this package."""
    with safe_open(saved(tmp_path), framework="pt") as file:
        texts = file.metadata()
    assert sorted(texts) == ["checksum", "identity", "record"]
    assert json.loads(texts["identity"]) == {"format": 2, "version": __version__, **IDENTITY}


def test_another_version_of_the_package_is_refused(tmp_path, monkeypatch):
    saved(tmp_path)
    monkeypatch.setattr(run_state, "__version__", "9.9")
    with pytest.raises(ValueError, match=f"belongs to another run: version was '{__version__}' and is now '9.9'"):
        restore(tmp_path)


def test_without_a_folder_nothing_is_written():
    state = RunState(None, IDENTITY, resume=False)
    state.save(Notes())
    assert not state.restore(Notes())


def test_digest_tells_bits_shapes_dtypes_and_numbers_of_tensors():
    x = torch.arange(6.0)
    others = (x.view(2, 3), x.double(), x.view(torch.int32), -x, x[:5], torch.tensor(0.0), torch.empty(0))
    assert len({digest(tensor) for tensor in (x, *others)}) == 1 + len(others)
    assert digest(x, x) != digest(x)
    assert digest(x.view(2, 3).T) == digest(x.view(2, 3).T.contiguous())
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))
