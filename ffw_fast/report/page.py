"""What all pages have in common: the template's surroundings, pictures, and how values are told."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import jinja2
from markupsafe import Markup

from ffw_fast.figures import figure_module
from ffw_fast.figures.rows import Rows
from ffw_fast.figures.style import COLORS, in_style, inline_svg
from ffw_fast.progress import describe_time
from ffw_fast.settings import Settings

NO_DEFAULT = ("bottleneck", "num_bias_classes")  # settings that have to be given
MOST_ROWS = 400  # of a table of numbers in the page; an epoch or a layer is one
Asked: TypeAlias = list[tuple[str, list[tuple[str, str, bool]]]]  # groups of (name, value, whether it is no default)
Facts: TypeAlias = list[tuple[str, list[tuple[str, str]]]]  # groups of (name, value)


@dataclass(frozen=True)
class Picture:
    """A figure of the page with its text and the numbers behind it."""

    name: str
    title: str
    caption: str
    svg: Markup
    rows: Rows
    wide: bool


def picture(name: str, title: str, caption: str, rows: Rows, wide: bool = False) -> Picture:
    """The figure of that name, drawn from its rows."""
    with in_style():
        svg = Markup(inline_svg(figure_module(name).draw(rows), name, title))
    return Picture(name, title, caption, svg, rows, wide)


def render(template: str, title: str, path: Path, **contents: Any) -> str:
    """The page of a template of this package; ``path`` is the folder that it tells of."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ffw_fast.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": describe_number, "duration": describe_time, "value": describe}
    return environment.get_template(template).render(
        title=title,
        path=path.absolute(),
        most_rows=MOST_ROWS,
        light={name: light for name, (light, _dark) in COLORS.items()},
        dark={name: dark for name, (_light, dark) in COLORS.items()},
        **contents,
    )


def asked(settings: dict[str, Any], **others: dict[str, Any]) -> Asked:
    """What was asked for: settings of the extraction, and other groups by their title."""
    defaults = Settings("", 2).as_dict()
    lines = [
        (name, describe(value), name in defaults and value != defaults[name] and name not in NO_DEFAULT)
        for name, value in settings.items()
        if value is not None
    ]
    groups = [("Extraction", lines)]
    for title, found in others.items():
        if rest := [(name, describe(value), False) for name, value in found.items() if value not in (None, [], ())]:
            groups.append((title.replace("_", " ").capitalize(), rest))
    return groups


def origin(made: dict[str, Any], stages: dict[str, str]) -> Facts:
    """Times, versions, machine and kernels, from what ``ffw_fast.runs.request.how_made`` gave."""
    cpu = (made.get("backend") or {}).get("cpu") or {}
    kernels = {name: cpu[name] for name in ("used", "instruction_set") if cpu.get(name)}
    groups = [
        ("Time", stages),
        ("Versions", made.get("versions") or {}),
        ("Machine", {**(made.get("machine") or {}), "device": made.get("device")}),
        ("CPU kernels", kernels),
    ]
    return [
        (title, [(name, describe(value)) for name, value in found.items() if value is not None])
        for title, found in groups
        if any(value is not None for value in found.values())
    ]


def describe_all(values: Iterable[Any]) -> str:
    """Several values, with commas."""
    return ", ".join(map(describe, values))


def describe(value: Any) -> str:
    """A setting as one reads it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return describe_all(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def describe_number(value: Any) -> str:
    """A number of a table: three decimals, or as many digits as it needs when it is very small."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, float):
        return describe(value)
    return f"{value:.3f}" if value == 0 or abs(value) >= 5e-4 else f"{value:.1e}"
