"""Every Python block of README and docs runs as a reader would type it, and every command line is one."""

import argparse
import re
import shlex
from pathlib import Path

import pytest

from ffw_fast.cli import build_parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "SECURITY.md"]
RECORDS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


def run_block(block: str, page: Path, names: dict) -> None:
    """Skips, visibly, where an extra is missing that the block needs."""
    try:
        exec(compile(block, str(page), "exec"), names)
    except ImportError as error:
        if "pip install 'ffw_fast[" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """All blocks of a page one after the other, in one namespace."""
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "page"}
    for language, block in BLOCK.findall(page.read_text()):
        if language == "python":
            run_block(block, page, names)


def commands_of(page: Path) -> list[str]:
    """Every command of ours that a page names with what follows it; the loops of a shell with 1 for their variable."""
    text = page.read_text()
    blocks = [block for language, block in BLOCK.findall(text) if language in ("", "bash")]
    lines = [line for block in blocks for line in block.splitlines()]
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", BLOCK.sub("", text))]
    commands = lines + [code for code in inline if " --" in code and "\\|" not in code]
    commands = [re.sub(r"^([A-Z_]+=\S+ )+", "", command) for command in commands]
    return [re.sub(r"\$\w+", "1", line) for line in commands if re.match(r"(ffw-fast|torchrun|podman run) ", line)]


def own_words(command: str) -> list[str]:
    """What is ours of a command: behind the launcher's or the container's name."""
    words = shlex.split(command, comments=True)
    return words[next(index for index, word in enumerate(words) if word in ("ffw-fast", "ffw_fast")) + 1 :]


class _Understood(Exception):
    pass


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_command_lines_of_a_page_are_understood(page, monkeypatch):
    """Nothing is run: they take hours."""
    read = argparse.ArgumentParser.parse_args

    def only_read(*arguments):
        read(*arguments)
        raise _Understood

    for command in commands_of(page):
        words = own_words(command)
        if "--help" in words:
            continue
        options = build_parser().parse_args(words)
        if words[0] == "bench":  # it has a parser of its own
            with monkeypatch.context() as patch:
                patch.setattr(argparse.ArgumentParser, "parse_args", only_read)
                with pytest.raises(_Understood):
                    options.command(options)


def test_commands_are_found_in_blocks_and_in_sentences():
    commands = [command for page in PAGES for command in commands_of(page)]
    assert len(commands) > 60
    assert any(command.startswith("ffw-fast bench table8 --only CelebA") for command in commands), "in a sentence"


def test_the_launchers_options_are_torchruns():
    from torch.distributed.run import get_args_parser

    launched = {command for page in PAGES for command in commands_of(page) if command.startswith("torchrun")}
    assert len(launched) == 3
    for command in launched:
        options = get_args_parser().parse_args(shlex.split(command, comments=True)[1:])
        assert (options.module, options.training_script) == (True, "ffw_fast")


def anchors_of(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_pages_link_to_what_is_there():
    pages = [*PAGES, RECORDS / "README.md"]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^):]+)\)", page.read_text())]
    assert any("#" in link for _, link in links)
    for page, link in links:
        target, _, anchor = link.partition("#")
        file = page.parent / target if target else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors_of(file), f"{page.name} links to {link}"


def test_the_readme_links_every_page():
    readme = PAGES[0].read_text()
    assert len(PAGES) > 5
    assert all(f"({page.relative_to(ROOT)})" in readme for page in PAGES[1:])


def test_every_record_is_listed_beside_it():
    patterns = re.findall(r"`([\w*.-]+\.\w+)`", (RECORDS / "README.md").read_text())
    listed = [path for pattern in patterns for path in RECORDS.glob(pattern)]
    assert sorted(listed) == sorted(path for path in RECORDS.iterdir() if path.name != "README.md")
