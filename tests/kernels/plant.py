"""A pytest plugin that plants a fault: FFW_FAST_PLANT is JSON of [module, text, what stands there instead].

The module is loaded from a changed copy, under its own name, before any test imports it.
"""

import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path

import ffw_fast.kernels


def plant(module: str, text: str, fault: str) -> None:
    source = Path(ffw_fast.kernels.__path__[0], f"{module}.py").read_text()
    assert source.count(text) >= 1, f"{text!r} is not in {module}"
    copy = Path(tempfile.mkdtemp(), f"{module}.py")
    copy.write_text(source.replace(text, fault))
    name = f"ffw_fast.kernels.{module}"
    spec = importlib.util.spec_from_file_location(name, copy)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    setattr(ffw_fast.kernels, module, sys.modules[name])
    spec.loader.exec_module(sys.modules[name])


plant(*json.loads(os.environ["FFW_FAST_PLANT"]))
