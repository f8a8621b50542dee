"""Collects the kernels' own tests, ``cases/``, only where Triton kernels can run in this process."""

import os

import torch

if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    collect_ignore_glob = ["cases/*"]  # test_interpreter.py runs them in processes of their own
