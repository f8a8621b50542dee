"""The page of a comparison: every network beside the others, what it does, what leaks and what it took."""

from pathlib import Path

from ffw_fast.comparison.record import (
    Comparison,
    comparison_lines,
    cost_columns,
    group_columns,
    outcome_columns,
    read_comparison,
)
from ffw_fast.figures.comparisons import comparison_rows
from ffw_fast.figures.sparsity import of_sparsity
from ffw_fast.report.page import Picture, asked, describe_all, origin, picture, render

TRADE_OFF = (
    "Task accuracy against what leaks",
    "The best place is the upper left corner: right on the task, and nothing of the bias to be read. Mean over seeds, "
    "with one standard deviation where there are several.",
)
SPARSITY = (
    "Pruning for the bias, and by magnitude",
    "Magnitude pruning of the biased network as lines, every extraction where it ended.",
)


def comparison_page(path: Path) -> str:
    """The whole page of a folder of ``ffw-fast compare``. ``ValueError`` where its file is damaged."""
    comparison = read_comparison(path)
    names, rows = comparison.workload.bias_names, comparison.rows
    identity = comparison.identity
    return render(
        "comparison.html.j2",
        comparison.workload.title,
        path,
        comparison=comparison,
        unequal=unequal(comparison),
        outcome=comparison_lines("", rows, outcome_columns(names)),
        groups=comparison_lines("", rows, group_columns(rows, names)),
        cost=comparison_lines("", rows, cost_columns()),
        pictures=pictures(comparison),
        asked=asked(
            identity["settings"],
            data={**(identity.get("data_options") or {}), "data_dir": identity.get("data_dir")},
            biased_network={"epochs": identity.get("vanilla_epochs")},
        ),
        origin=origin(comparison.made, {}),
    )


def unequal(comparison: Comparison) -> list[str]:
    """Which networks lack which seeds."""
    lacking = {
        method: [seed for seed in comparison.seeds if seed not in [row["seed"] for row in found]]
        for method, found in comparison.rows.items()
    }
    return [f"{method} lacks {describe_all(seeds)}" for method, seeds in lacking.items() if seeds]


def pictures(comparison: Comparison) -> list[Picture]:
    """Of all networks, and of those that are pruned."""
    rows = comparison_rows(comparison)
    found = [picture("trade-off", *TRADE_OFF, rows, wide=True)]
    pruned = of_sparsity(rows)
    if {"magnitude pruning", "FFW"} <= {row["family"] for row in pruned}:
        found.append(picture("sparsity", *SPARSITY, pruned))
    return found
