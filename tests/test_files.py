"""Files: who may read them, and what is said where they cannot be written."""

import errno
import os
from stat import S_IMODE

import pytest
import torch

from ffw_fast.files import write_json, write_tensors, written_whole

pytestmark = pytest.mark.skipif(os.name != "posix", reason="a umask, on POSIX systems")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_the_umask_says_who_may_read_what_is_written(tmp_path, umask):
    before = os.umask(umask)
    try:
        (tmp_path / "scores.tmp").touch(0o600)  # as a kill may have left it
        write_tensors(tmp_path / "scores", {"scores": torch.ones(3)})
        write_json(tmp_path / "record", {})
    finally:
        os.umask(before)
    assert [S_IMODE((tmp_path / name).stat().st_mode) for name in ("scores", "record")] == [0o666 & ~umask] * 2


def test_a_full_disk_is_told_with_the_file_that_does_not_fit(tmp_path):
    with (
        pytest.raises(OSError, match=r"No space left on device: .*report\.html'"),
        written_whole(tmp_path / "report.html"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a file's write raises it, without a name
    assert not list(tmp_path.iterdir())
