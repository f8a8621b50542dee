"""The closing table of a run."""

from typing import Any

from rich.table import Table

NETWORKS = ("vanilla", "pruned", "best")


def metrics_table(metrics: dict[str, Any], bias_names: tuple[str, ...], num_bias_classes: int) -> Table:
    """Vanilla, pruned and best network side by side, on the unbiased test set."""
    table = Table(title=f"unbiased test set (chance level of a head: {1 / num_bias_classes:.2f})")
    table.add_column("network")
    for column in ("task accuracy", "worst group"):
        table.add_column(column, justify="right")
    for name in bias_names:
        table.add_column(f"{name}\naccuracy", justify="right")
        table.add_column(f"{name}\nMI (floor)", justify="right")
    table.add_column("sparsity", justify="right")
    for network in NETWORKS:
        row = metrics[network]
        biases = zip(row["bias_accuracy"], row["bias_mi"], row["bias_mi_floor"], strict=True)
        cells = [cell for accuracy, mi, floor in biases for cell in (f"{accuracy:.3f}", f"{mi:.3f} ({floor:.3f})")]
        table.add_row(
            network,
            f"{row['task_accuracy']:.3f}",
            f"{row['groups']['worst_group']:.3f}",
            *cells,
            f"{row['sparsity']:.3f}",
        )
    return table
