"""Every Python block of README and docs runs as a reader would type it."""

import re
from pathlib import Path

import pytest

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
