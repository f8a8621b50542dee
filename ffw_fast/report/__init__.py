"""The report: one self-contained HTML page of a run folder, which opens from disk without a network.

Jinja2 and Matplotlib are the extra ``report``.
"""

import os
from pathlib import Path

from ffw_fast.files import written_whole
from ffw_fast.run_folder import REPORT, open_run

MISSING = "the report needs Jinja2 and Matplotlib: pip install 'ffw_fast[report]'"


def write_report(folder: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` into a folder of ``ffw-fast run`` or ``Extraction.save``, and return its path.

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: a file in it is damaged.
        ImportError: the extra ``report`` is not installed.
    """
    run = open_run(Path(folder))
    check_extra()
    from ffw_fast.report.page import render

    path = run.path / REPORT
    with written_whole(path) as temporary:
        temporary.write_text(render(run), encoding="utf-8")
    return path


def check_extra() -> None:
    """``ImportError`` that names the extra, where it is missing."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(MISSING) from error
