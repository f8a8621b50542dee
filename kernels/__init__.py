"""Triton kernels and their launchers; no autograd and no modules. Installed as ``ffw_fast.kernels``."""
