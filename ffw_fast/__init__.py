"""ffw_fast: finds the unbiased sub-network inside a biased neural network, fast."""

import os

# PyTorch asks for huge pages behind its large CPU tensors only if this is set before it is imported. Without them the
# large outputs of every step are faulted in anew, page by page.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from ffw_fast import reference
from ffw_fast.backend import backend_info
from ffw_fast.backend import load as _load_backend
from ffw_fast.compact import compact, load_compacted
from ffw_fast.evaluation import Evaluation, evaluate
from ffw_fast.export import export
from ffw_fast.extract import extract
from ffw_fast.extraction import Extraction, apply_masks, load_masks
from ffw_fast.gates import GATES
from ffw_fast.masking import mask_model
from ffw_fast.modules import (
    MaskedConv1d,
    MaskedConv2d,
    MaskedConv3d,
    MaskedLinear,
    draw_gates,
    masked_layers,
    set_temperature,
)
from ffw_fast.objective import mutual_information
from ffw_fast.optim import GatedAdam
from ffw_fast.version import __version__

_load_backend()

__all__ = [
    "GATES",
    "Evaluation",
    "Extraction",
    "GatedAdam",
    "MaskedConv1d",
    "MaskedConv2d",
    "MaskedConv3d",
    "MaskedLinear",
    "__version__",
    "apply_masks",
    "backend_info",
    "compact",
    "draw_gates",
    "evaluate",
    "export",
    "extract",
    "load_compacted",
    "load_masks",
    "mask_model",
    "masked_layers",
    "mutual_information",
    "reference",
    "set_temperature",
]
