"""Benchmarks, installed as ``ffw_fast.benchmarks``: ``ffw-fast bench NAME`` runs ``main`` of the module NAME."""

BENCHES = {
    "table8": "the parts of every epoch of the paper's Table 8 against the reference and the floor; or one run whole",
    "fft_conv": "SimpleConvNet's convolutions by FFT against direct ones",
}
