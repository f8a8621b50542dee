"""From a run folder to the page: what each part of it says, for the template beside this file."""

from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup

from ffw_fast.figures import figure_module
from ffw_fast.figures.rows import Rows
from ffw_fast.figures.style import COLORS, inline_svg
from ffw_fast.progress import describe_time
from ffw_fast.run_folder import RunFolder
from ffw_fast.settings import Settings

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
NO_DEFAULT = ("bottleneck", "num_bias_classes")  # settings that have to be given
MOST_ROWS = 400  # of a table of numbers in the page; an epoch or a layer is one


@dataclass(frozen=True)
class Picture:
    """A figure of the page with its text and the numbers behind it."""

    name: str
    title: str
    caption: str
    svg: Markup
    rows: Rows


def render(run: RunFolder) -> str:
    """The whole page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ffw_fast.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": describe_number, "duration": describe_time}
    return environment.get_template("page.html.j2").render(
        title=run.title,
        run=run,
        metrics=run.metrics,
        complete=run.metrics.get("complete", True),
        measured_on="the unbiased test set" if "validation" in run.metrics else "the validation set",
        warnings=run.metrics.get("warnings", []),
        results=results(run),
        sizes=sizes(run),
        pictures=pictures(run),
        wide=WIDE,
        most_rows=MOST_ROWS,
        asked=asked(run),
        origin=origin(run),
        light={name: light for name, (light, _dark) in COLORS.items()},
        dark={name: dark for name, (_light, dark) in COLORS.items()},
    )


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
    lines.append(("share of weights pruned", "", [network["sparsity"] for network in networks]))
    return lines


SIZE_LINES = {  # field: what it is, its unit, and how many of it are one unit
    "parameters": ("parameters", "", 1),
    "nonzero": ("of them not zero", "", 1),
    "macs": ("multiplications of one sample", "million", 1e6),
    "latency_seconds": ("time of one batch", "ms", 1e-3),
    "file_bytes": ("file", "kB", 1e3),
}


def sizes(run: RunFolder) -> list[tuple[str, str, list[str]]]:
    """Lines of the table of sizes: what, its unit, a value for each network and the first over the last.

    Raises:
        ValueError: the file of sizes is damaged.
    """
    measured = run.sizes
    if measured is None:
        return []
    try:
        networks = list(measured["networks"].values())
        lines = []
        for field, (title, unit, one) in SIZE_LINES.items():
            values = [network[field] / one for network in networks]
            ratio = f"{values[0] / values[-1]:.2f}" if values[-1] else "–"
            lines.append(
                (title, unit, [*(f"{value:,.0f}" if one == 1 else f"{value:,.2f}" for value in values), ratio])
            )
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{run.path} does not hold sizes as ffw-fast compact writes them: {error!r}") from error
    return lines


def pictures(run: RunFolder) -> list[Picture]:
    """The figures that the folder has numbers for."""
    found = []
    for name, (title, caption) in CAPTIONS.items():
        module = figure_module(name)
        if rows := module.run_numbers(run):
            svg = Markup(inline_svg(module.draw(rows), name, title))
            found.append(Picture(name, title, caption, svg, rows))
    return found


def asked(run: RunFolder) -> list[tuple[str, list[tuple[str, str, bool]]]]:
    """What was asked for, in groups of (name, value, whether it is other than the default)."""
    config, defaults = run.config, Settings("", 2).as_dict()
    settings = [
        (name, describe(value), name in defaults and value != defaults[name] and name not in NO_DEFAULT)
        for name, value in run.settings.items()
        if value is not None
    ]
    groups = [("Extraction", settings)]
    data = {**(config.get("data_options") or {}), "data_dir": config.get("data_dir")}
    samples = {f"samples, {name}": count for name, count in (config.get("samples") or {}).items()}
    for title, found in (("Data", {**data, **samples}), ("Biased network", config.get("vanilla_recipe") or {})):
        if lines := [(name, describe(value), False) for name, value in found.items() if value not in (None, [], ())]:
            groups.append((title, lines))
    return groups


def origin(run: RunFolder) -> list[tuple[str, list[tuple[str, str]]]]:
    """Time that the stages took, versions, machine and kernels: groups of (name, value)."""
    config, metrics = run.config, run.metrics
    stages = {name: describe_time(seconds) for name, seconds in metrics.get("stages", {}).items()}
    if not stages and "seconds" in metrics:
        stages = {"extraction": describe_time(metrics["seconds"])}
    cpu = (config.get("backend") or {}).get("cpu") or {}
    kernels = {name: cpu[name] for name in ("used", "instruction_set") if cpu.get(name)}
    groups = [
        ("Time", stages),
        ("Versions", config.get("versions") or {}),
        ("Machine", {**(config.get("machine") or {}), "device": config.get("device")}),
        ("CPU kernels", kernels),
    ]
    return [
        (title, [(name, describe(value)) for name, value in found.items() if value is not None])
        for title, found in groups
        if any(value is not None for value in found.values())
    ]


def describe(value: Any) -> str:
    """A setting as one reads it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(describe, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def describe_number(value: Any) -> str:
    """A number of a table: three decimals, or as many digits as it needs when it is very small."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, float):
        return describe(value)
    return f"{value:.3f}" if value == 0 or abs(value) >= 5e-4 else f"{value:.1e}"
