"""The page of one run: what each part of it says, for the template."""

from typing import Any

from ffw_fast.figures import figure_module
from ffw_fast.progress import describe_time
from ffw_fast.report.page import Picture, asked, origin, picture, render
from ffw_fast.runs.reading import MEASURED_ON, RunFolder

CAPTIONS = {
    "leakage": (
        "What still tells the bias",
        "A linear head, fitted afresh on each network's bottleneck, tries to read the bias. The left tick is chance; "
        "the ticks below are the information that the same answers share with shuffled labels.",
    ),
    "layers": ("What was pruned, layer by layer", "Where the final scores are below zero."),
    "groups": (
        "Accuracy by groups",
        "Aligned samples agree with the bias, conflicting ones do not. The worst group is the pair of a target and "
        "a bias with the lowest accuracy.",
    ),
    "training": (
        "The course of the extraction",
        "Validation set, epoch by epoch. Upright lines: the temperature has fallen tenfold. Dots: the network pruned "
        "there and then, with a head of its own. Green: how far gates are from open or shut.",
    ),
    "grad-cam": (
        "What the networks look at",
        "Samples that conflict with the bias. Warm: what speaks for the class that the network says, by Grad-CAM at "
        "its last convolution, or by gradient times input where it has none. Green answers are right.",
    ),
}
WIDE = ("grad-cam",)


def run_page(run: RunFolder) -> str:
    """The whole page of a run folder."""
    config, metrics = run.config, run.metrics
    samples = {f"samples, {name}": count for name, count in (config.get("samples") or {}).items()}
    stages = {name: describe_time(seconds) for name, seconds in metrics.get("stages", {}).items()}
    if not stages and "seconds" in metrics:
        stages = {"extraction": describe_time(metrics["seconds"])}
    return render(
        "run.html.j2",
        run.title,
        run.path,
        run=run,
        metrics=metrics,
        complete=metrics.get("complete", True),
        measured_on=measured_on(metrics),
        best=best(metrics),
        warnings=metrics.get("warnings", []),
        results=results(run),
        sizes=sizes(run),
        pictures=pictures(run),
        asked=asked(
            run.settings,
            data={**(config.get("data_options") or {}), "data_dir": config.get("data_dir"), **samples},
            biased_network=config.get("vanilla_recipe") or {},
        ),
        origin=origin(config, stages),
    )


def measured_on(metrics: dict[str, Any]) -> str:
    """The set whose figures the page shows: a run has a test set, a saved extraction has none."""
    return MEASURED_ON[metrics.get("measured_on", "test" if "validation" in metrics else "val")]


def best(metrics: dict[str, Any]) -> str:
    """By what the best network was chosen."""
    return metrics.get("validation", metrics).get("selection", "lowest bias accuracy on the validation set")


def results(run: RunFolder) -> list[tuple[str, str, list[float | None]]]:
    """Lines of the table of networks: what it is, a remark, and its value for each network."""
    networks = list(run.networks.values())
    lines: list[tuple[str, str, list[float | None]]] = [
        ("task accuracy", "", [network["task_accuracy"] for network in networks])
    ]
    if all("groups" in network for network in networks):
        lowest = [min(network["groups"]["bias_worst_group"]) for network in networks]
        lines.append(("worst group of a bias", "", lowest))
    for index, bias in enumerate(run.bias_names):
        heads = [network["bias_accuracy"][index] for network in networks]
        lines.append((f"{bias}, read by a head", f"chance {run.chance:.2f}", heads))
        information = [network["bias_mi"][index] for network in networks]
        floors = [network["bias_mi_floor"][index] for network in networks if "bias_mi_floor" in network]
        lines.append((f"{bias}, information", f"floor {max(floors):.3f}" if floors else "", information))
    lines.append(("share of gates closed", "", [network["sparsity"] for network in networks]))
    if all("weight_sparsity" in network for network in networks):
        lines.append(("share of weights gone", "", [network["weight_sparsity"] for network in networks]))
    return lines


SIZE_LINES = {  # field: what it is, its unit, and how many of it are one unit
    "parameters": ("parameters", "", 1),
    "nonzero": ("of them not zero", "", 1),
    "macs": ("multiplications of one sample", "million", 1e6),
    "latency_seconds": ("time of one batch", "ms", 1e-3),
    "file_bytes": ("file", "kB", 1e3),
}


def sizes(run: RunFolder) -> list[tuple[str, str, list[str]]]:
    """Lines of the table of sizes: what, its unit, a value for each network and the first over the last."""
    measured = run.sizes
    if measured is None:
        return []
    networks = list(measured["networks"].values())
    lines = []
    for field, (title, unit, one) in SIZE_LINES.items():
        values = [network[field] / one for network in networks]
        ratio = f"{values[0] / values[-1]:.2f}" if values[-1] else "–"
        lines.append((title, unit, [*(f"{value:,.0f}" if one == 1 else f"{value:,.2f}" for value in values), ratio]))
    return lines


def pictures(run: RunFolder) -> list[Picture]:
    """The figures that the folder has numbers for."""
    found = ((name, texts, figure_module(name).run_numbers(run)) for name, texts in CAPTIONS.items())
    return [picture(name, *texts, rows, wide=name in WIDE) for name, texts, rows in found if rows]
