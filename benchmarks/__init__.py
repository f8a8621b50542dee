"""Benchmarks, installed as ``ffw_fast.benchmarks``: ``ffw-fast bench NAME`` runs ``main`` of the module NAME."""

BENCHES = {
    "table8": "the parts of every epoch of the paper's Table 8 against the reference and the floor; or one run whole",
    "operators": "every operator (fused layers excepted) and layer shape against PyTorch, torch.compile and the floor",
    "masked_layers": "MaskedConv2d and MaskedLinear against the dense layers: the ratio per shape",
    "growth": "how time and peak memory grow with samples, parameters, batch size and threads",
    "fft_conv": "SimpleConvNet's convolutions by FFT against direct ones",
    "bise": "the full schedule of BISE against its reference",
    "roofline": "Table 8 on an A100, on paper: floors of all kernels and a projection, without a GPU",
    "step_profile": "where the time of a training step goes, kernel by kernel, on the CPU or on a GPU",
    "gpu": "on a CUDA machine: build, kernel tests, operators and Table 8; --dry on the CPU",
    "cooling": "what a fall of T does to the gates: the published tenfold cut beside the adaptive schedule",
    "annealing": "what the adaptive schedule adds to a step of the gates, for every kind of gate",
    "augmented": "heads on new draws of augmented data in every epoch, or on one draw a fit: time and result",
    "learning_rate": "the adaptive schedule with other learning rates of the scores: accuracy and leakage",
    "checkpoints": "what checkpoints cost: the seconds spent on them over the seconds of a whole run",
    "scaling": "bytes, messages, memory and projected time of an extraction on several processes, on paper",
    "processes": "one process beside several on the same cores, or on two simulated hosts: the time of each part",
}
