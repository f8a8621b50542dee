"""What an A100 of 40 GB can do at most, by its data sheet. No A100 has run anything of this package."""

MATRIX_RATES = {"fp32": 19.5e12, "tf32": 156e12, "bf16": 312e12}  # FLOP/s of dense matrix products
SINGLE_RATE = 19.5e12  # FLOP/s of what runs on no tensor core
BYTES_PER_SECOND = 1.555e12  # of its memory
MULTIPROCESSORS = 108
