"""What figures of comparisons share: the rows of ``ffw-fast compare``, one for each method and seed."""

import re
from statistics import mean

from ffw_fast.comparison.record import Comparison
from ffw_fast.figures.rows import Rows

MAGNITUDE = re.compile(r"magnitude ([\d.]+)")


def comparison_rows(comparison: Comparison) -> Rows:
    """One row for each method and seed: accuracies (the biases' as their mean), sparsity."""
    return [
        {
            "method": method,
            "family": family(method),
            "seed": row["seed"],
            "task_accuracy": row["task_accuracy"],
            "bias_accuracy": mean(row["bias_accuracy"]),
            "sparsity": row["sparsity"],
            "chance": comparison.chance,
        }
        for method, found in comparison.rows.items()
        for row in found
    ]


def family(method: str) -> str:
    """What a method's colour tells: vanilla, magnitude pruning, FFW, fine-tuned or not, or the unbiased set alone."""
    if method == "vanilla":
        return "vanilla"
    if MAGNITUDE.match(method):
        return "magnitude pruning"
    if method.startswith(("FFW", "BISE")):
        return "FFW, fine-tuned" if method.endswith("fine-tuned") else "FFW"
    return "trained on the unbiased set"
