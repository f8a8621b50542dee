"""What a run shows: plain lines for logs, a live display on a terminal, nothing where that is asked for."""

import io

import pytest
from rich.console import Console

from ffw_fast.progress import LiveDisplay, PlainLines, Progress, StageClock, describe_time, make_progress

ROW = {
    "epoch": 3,
    "temperature": 0.1,
    "loss": 1.25,
    "val_mi": 0.5,
    "val_task_accuracy": 0.75,
    "val_bias_accuracy": [0.2, 0.4],
}
FIGURES = "T 1.0e-01, loss 1.250, MI 0.500, task 0.750, bias 0.300"


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def plain_lines(epochs: int, run: int) -> list[str]:
    out = io.StringIO()
    with PlainLines(out) as progress:
        progress.stage("extraction", epochs)
        for epoch in range(1, run + 1):
            progress.tick(epoch, "figures")
    return out.getvalue().splitlines()


def test_a_plain_line_holds_the_figures_of_its_epoch(clock):
    out = io.StringIO()
    with PlainLines(out) as progress:
        progress.stage("data")
        progress.stage("extraction", 9)
        clock[0] = 90.0
        progress.epoch({**ROW, "epoch": 3})
    assert out.getvalue().splitlines() == ["data", f"extraction 3/9: {FIGURES}, at most 9 min 0 s left"]


def test_every_epoch_of_a_short_stage_has_a_line():
    assert len(plain_lines(30, 30)) == 30


def test_long_stages_are_thinned_out_and_still_tell_the_first_and_the_last_epoch():
    lines = plain_lines(200, 137)
    assert 12 <= len(lines) <= 25
    assert lines[0].startswith("extraction 1/200")
    assert lines[-1].startswith("extraction 137/200")


def test_the_time_left_counts_only_epochs_of_this_run(clock):
    stage = StageClock(200)
    clock[0] = 2.0
    assert stage.left(101) == 198  # 100 were done before it was interrupted
    clock[0] = 4.0
    assert stage.left(102) == 196


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (7500, "2 h 5 min")]
)
def test_times_are_told_in_two_units(seconds, text):
    assert describe_time(seconds) == text


def test_the_live_display_fits_a_terminal_and_leaves_it_clean():
    out = io.StringIO()
    display = LiveDisplay(Console(file=out, force_terminal=True, color_system=None, width=80))

    def be_interrupted():
        with display:
            display.stage("data")
            display.stage("extraction", 200)
            with display:  # as the loop does with what it is handed
                display.epoch(ROW)
            display.epoch({**ROW, "epoch": 4})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        be_interrupted()
    shown = out.getvalue()
    assert FIGURES in shown
    assert "4/200 at most" in shown
    assert all(len(line) <= 80 + 40 for line in shown.splitlines())  # 40: moves of the cursor
    assert shown.rstrip().endswith("\x1b[?25h"), "the cursor is back"


def test_a_progress_is_shown_until_the_outer_with_ends():
    calls = []

    class Recorded(Progress):
        def show(self) -> None:
            calls.append("show")

        def hide(self) -> None:
            calls.append("hide")

    progress = Recorded()
    with progress:
        with make_progress(progress) as same:
            assert same is progress
        calls.append("between")
    assert calls == ["show", "between", "hide"]


def test_what_suits_standard_error(monkeypatch):
    assert isinstance(make_progress(True), PlainLines)
    assert type(make_progress(False)) is Progress
    monkeypatch.setattr("sys.stderr", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    assert isinstance(make_progress(True), LiveDisplay)


def test_a_standard_error_that_is_missing_shows_nothing(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr", None)
    with make_progress(True) as progress:
        progress.stage("data")
    assert capsys.readouterr().out == ""


def test_a_standard_error_that_can_only_be_written_gets_plain_lines(monkeypatch):
    written = []
    monkeypatch.setattr("sys.stderr", type("Log", (), {"write": staticmethod(written.append)})())
    with make_progress(True) as progress:
        progress.stage("data")
    assert written == ["data", "\n"]
