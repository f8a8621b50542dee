"""The report: one self-contained HTML page of a folder of results, which opens from disk without a network.

Jinja2 and Matplotlib are the extra ``report``.
"""

import os
from pathlib import Path

from ffw_fast.comparison.record import RESULTS
from ffw_fast.files import written_whole
from ffw_fast.runs.reading import REPORT, damage_named, open_run
from ffw_fast.sweep.table import TABLE

MISSING = "the report needs Jinja2 and Matplotlib: pip install 'ffw_fast[report]'"


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` into a folder of ``ffw-fast run``, ``compare`` or ``sweep``, or of ``Extraction.save``.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: the folder holds no results.
        ValueError: a file in it is damaged.
        ImportError: the extra ``report`` is not installed.
    """
    path = Path(folder)
    with damage_named([path]):
        page = _page(path)
    with written_whole(path / REPORT) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path / REPORT


def _page(path: Path) -> str:
    """The text of the page: what the folder holds tells which."""
    if (path / RESULTS).exists():
        check_extra()
        from ffw_fast.report.comparison_page import comparison_page

        return comparison_page(path)
    if (path / TABLE).exists():
        check_extra()
        from ffw_fast.report.sweep_page import sweep_page

        return sweep_page(path)
    run = open_run(path)
    check_extra()
    from ffw_fast.report.run_page import run_page

    return run_page(run)


def check_extra() -> None:
    """``ImportError`` that names the extra, where it is missing."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(MISSING) from error
