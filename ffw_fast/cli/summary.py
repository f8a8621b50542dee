"""The closing table of a run."""

from collections.abc import Callable
from functools import partial
from typing import Any

from rich.table import Table

from ffw_fast.runs.reading import MEASURED_ON, NETWORKS


def metrics_table(metrics: dict[str, Any], bias_names: tuple[str, ...], num_bias_classes: int) -> Table:
    """Vanilla, pruned and best network side by side, from the contents of a run's ``metrics.json``.

    The worst group is that of the pairs of a target and one bias. The floor of an MI, in brackets, is what the same
    predictions give with shuffled labels.
    """
    chance = f"{1 / num_bias_classes:.2f}"
    table = Table(
        title=f"{MEASURED_ON[metrics['measured_on']]} (chance level of a head: {chance})", title_justify="left"
    )
    table.add_column("")
    for network in NETWORKS:
        table.add_column(network, justify="right")

    def add(title: str, cell: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(title, *(cell(metrics[network]) for network in NETWORKS))

    add("task accuracy", lambda row: f"{row['task_accuracy']:.3f}")
    add("worst group of a bias", lambda row: f"{min(row['groups']['bias_worst_group']):.3f}")
    for index, name in enumerate(bias_names):
        add(f"{name}, read by a head", partial(_accuracy, index=index))
        add(f"{name}, MI (floor)", partial(_information, index=index))
    add("sparsity", lambda row: f"{row['sparsity']:.3f}")
    add("weights gone", lambda row: f"{row['weight_sparsity']:.3f}")
    return table


def _accuracy(row: dict[str, Any], index: int) -> str:
    return f"{row['bias_accuracy'][index]:.3f}"


def _information(row: dict[str, Any], index: int) -> str:
    return f"{row['bias_mi'][index]:.3f} ({row['bias_mi_floor'][index]:.3f})"
