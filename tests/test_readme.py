"""Every Python block of README and docs runs as a reader would type it, and every command line is one."""

import re
import shlex
from pathlib import Path

import pytest

from ffw_fast.cli import build_parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_command_lines_of_a_page_are_understood(page):
    """Nothing is run: they take hours. The loops of a shell stand with their variable as a number."""
    for language, block in BLOCK.findall(page.read_text()):
        if language not in ("", "bash"):
            continue
        for line in block.splitlines():
            words = shlex.split(re.sub(r"\$\w+", "1", line), comments=True)
            if words[:1] == ["ffw-fast"] and "--help" not in words:
                build_parser().parse_args(words[1:])


def test_pages_link_to_what_is_there():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_links_every_page():
    readme = PAGES[0].read_text()
    assert len(PAGES) > 5
    assert all(f"(docs/{page.name})" in readme for page in PAGES[1:])
