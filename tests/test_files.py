"""Files: who may read them."""

import os
from stat import S_IMODE

import pytest
import torch

from ffw_fast.files import write_json, write_tensors

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
