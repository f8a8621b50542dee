"""How all figures look: sizes, colours for light and dark, and how they are written or put into a page."""

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

WIDTH = 4.2  # inches; about 400 pixels of a page, the width of a narrow screen
DPI = 200
SALT = "ffw_fast"  # of the names in an SVG, so that the same numbers give the same file

# name: (on light, on dark). The light one must be no other colour's, since a page finds it in the SVG by its value.
COLORS = {
    "ink": ("#22252b", "#e8e9ec"),
    "muted": ("#6a707b", "#9aa1ad"),
    "grid": ("#e4e6ea", "#31353d"),
    "vanilla": ("#8b929e", "#8d95a3"),
    "pruned": ("#2f6fb3", "#6aa9e9"),
    "best": ("#1f8a70", "#55c2a5"),
    "warm": ("#c4622d", "#f0935c"),
    "plum": ("#8458a8", "#b78fd8"),
    "gold": ("#a67c1a", "#d9b356"),
}
CYCLE = ("pruned", "warm", "best", "plum", "gold", "vanilla")


def color(name: str) -> str:
    """The colour on light; what is drawn with it follows light and dark in a page."""
    return COLORS[name][0]


LOOK: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": color("ink"),
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlecolor": color("ink"),
    "axes.labelcolor": color("muted"),
    "axes.facecolor": "none",
    "axes.edgecolor": color("grid"),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": color("grid"),
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "lines.solid_capstyle": "round",
    "xtick.color": color("muted"),
    "ytick.color": color("muted"),
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.fontsize": 8.5,
    "svg.hashsalt": SALT,
}


def in_style() -> AbstractContextManager[None]:
    """Within it, what is drawn and saved looks as ``LOOK`` says: Matplotlib reads it whenever a part is made."""
    return mpl.rc_context(LOOK)


def verbatim(name: str) -> str:
    """A name of the user's, in which Matplotlib would take what is between dollars for a formula."""
    return name.replace("$", r"\$")


def series_color(index: int) -> str:
    return color(CYCLE[index % len(CYCLE)])


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure, in inches. It is bound to no window."""
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, hspace=0.06, wspace=0.06)
    return Figure(figsize=(width, height), layout=layout)


def new_axes(figure: Figure, rows: int = 1, columns: int = 1, **options: Any) -> list[Axes]:
    """The figure's axes in reading order; ``options`` are those of ``Figure.subplots``."""
    return list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def legend(axes: Axes, columns: int = 3) -> None:
    """Above the axes, where it hides nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, columnspacing=1.2, borderaxespad=0.2)


def legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    """One for all panels, of what is drawn in one of them."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=columns)


def draw_dots(axes: Axes, x: Sequence[float], y: Sequence[float], network: str) -> None:
    """What was measured of a network; the best one's dots are rings, so that the pruned one's show where it is both."""
    size, fill = (7, "none") if network == "best" else (6, color(network))
    axes.plot(x, y, "o", color=color(network), mfc=fill, mew=1.5, markersize=size, label=network)


def label_line(axes: Axes, y: float, text: str, above: bool = True) -> None:
    """A thin dashed line at y, with what it is, above it or below."""
    axes.axhline(y, color=color("muted"), linewidth=0.8, linestyle=(0, (3, 3)))
    axes.annotate(
        text, (1.0, y), xycoords=("axes fraction", "data"), xytext=(0, 2 if above else -2), textcoords="offset points",
        ha="right", va="bottom" if above else "top", fontsize=8, color=color("muted"),
    )  # fmt: skip


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``NAME.png`` and ``NAME.svg`` on white; their paths."""
    png, svg = folder / f"{name}.png", folder / f"{name}.svg"
    figure.savefig(png, dpi=DPI, facecolor="white")
    svg.write_text(_svg(figure, facecolor="white"), encoding="utf-8")
    return [png, svg]


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an ``<svg>`` for a page: text as text, colours as the page's variables ``--ink`` and so on."""
    with mpl.rc_context({"svg.fonttype": "none"}):
        svg = _svg(figure, transparent=True)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for known, (light, _dark) in COLORS.items():
        svg = re.sub(re.escape(light), f"var(--{known})", svg, flags=re.IGNORECASE)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    width, height = (float(value) for value in re.findall(r'(?:width|height)="([\d.]+)pt"', svg)[:2])
    pixels = f'style="max-width: {width * 4 / 3:.0f}px; aspect-ratio: {width:.0f} / {height:.0f}"'
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    return svg.replace("<svg", f'<svg role="img" aria-label="{_attribute(description)}" {pixels}', 1)


def _svg(figure: Figure, **options: Any) -> str:
    """The figure as SVG, the same text for the same figure: Matplotlib names some parts by where they lie in memory."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", dpi=DPI, metadata={"Date": None, "Creator": None}, **options)
    svg = buffer.getvalue()
    for index, name in enumerate(dict.fromkeys(re.findall(r'\bid="([a-z][0-9a-f]{10})"', svg))):
        svg = svg.replace(name, f"{name[0]}-{index}")
    return svg


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
