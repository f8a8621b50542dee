"""The entry of the command line, in processes of its own: what happens while PyTorch and the kernels are loaded."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ffw_fast.cli import main

ROOT = Path(__file__).parents[1]
ENTRY = [sys.executable, "-c", "import sys, ffw_fast_command; sys.exit(ffw_fast_command.main())"]


def run(*arguments: str, backend: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"FFW_FAST_BACKEND": backend}
    command = [*ENTRY, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.version.cuda is not None, reason="its kernels may be there")
def test_info_tells_why_the_backend_that_was_asked_for_is_not_there():
    done = run("info", backend="cuda")
    reason = "this PyTorch is built without CUDA"
    assert done.stderr == f"ffw-fast: error: FFW_FAST_BACKEND=cuda, but {reason}\n"
    assert done.returncode == 0
    assert "\nbackend: cuda\n" in done.stdout
    assert f"why_not: {reason}" in done.stdout


@pytest.mark.skipif(torch.version.cuda is not None, reason="its kernels may be there")
def test_all_else_ends_in_that_error(tmp_path):
    out = tmp_path / "run"
    done = run("run", "multi-color-mnist", "--out", str(out), backend="cuda")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "ffw-fast: error: FFW_FAST_BACKEND=cuda, but this PyTorch is built without CUDA\n"
    assert not out.exists()


def test_a_backend_that_does_not_exist_is_an_error_of_one_line():
    done = run("info", backend="fast")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "ffw-fast: error: FFW_FAST_BACKEND must be one of auto, cpp, cuda, triton, torch, got 'fast'\n"
    )


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_an_interrupt_while_pytorch_is_imported_is_no_traceback(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import time; print('importing', flush=True); time.sleep(600)")
    interruptible = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); " + ENTRY[2]
    process = subprocess.Popen(
        [*ENTRY[:2], interruptible, "info"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=300) == ("", "ffw-fast: interrupted\n")
    assert process.returncode == 130


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_gone_is_no_error(unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run([*ENTRY, "info"], env=environment, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_broken_pipe_that_is_not_the_output_is_an_error(monkeypatch, capfd):
    def broken() -> None:
        raise BrokenPipeError(32, "a worker's pipe is broken")

    monkeypatch.setattr("ffw_fast.cli.machine.backend_info", broken)
    assert main(["info"]) == 2
    assert "a worker's pipe is broken" in capfd.readouterr().err


def test_a_closed_standard_output_is_no_error():
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *ENTRY, "info"], cwd=ROOT, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
