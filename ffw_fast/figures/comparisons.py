"""What figures of comparisons share: the rows of ``ffw-fast compare``, one for each method and seed."""

import re
from pathlib import Path
from statistics import mean

from ffw_fast.figures.rows import Rows
from ffw_fast.files import read_json

RESULTS = "compare.json"
MAGNITUDE = re.compile(r"magnitude ([\d.]+)")


def read_comparison(path: Path) -> tuple[dict, Rows]:
    """What was compared, and one row for each method and seed: accuracies (the biases' as their mean), sparsity.

    Args:
        path: a comparison's folder, or its file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    file = path / RESULTS if path.is_dir() else path
    content = read_json(file)
    try:
        identity, methods = content["identity"], content["methods"]
        chance = 1 / identity["settings"]["num_bias_classes"]
        rows = [
            {
                "method": method,
                "family": family(method),
                "seed": row["seed"],
                "task_accuracy": row["task_accuracy"],
                "bias_accuracy": mean(row["bias_accuracy"]),
                "sparsity": row["sparsity"],
                "chance": chance,
            }
            for method, found in methods.items()
            for row in found
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} does not hold a comparison: {error!r} is missing or of another kind") from error
    if not rows:
        raise ValueError(f"{file} holds no results")
    return identity, rows


def family(method: str) -> str:
    """What a method's colour tells: "FFW", "FFW, fine-tuned", "magnitude pruning", "vanilla" or "trained anew"."""
    if method == "vanilla":
        return "vanilla"
    if MAGNITUDE.match(method):
        return "magnitude pruning"
    if method.startswith(("FFW", "BISE")):
        return "FFW, fine-tuned" if method.endswith("fine-tuned") else "FFW"
    return "trained on the unbiased set"
