"""What the biased and the pruned network look at: the same samples, Grad-CAM of the class each predicts (Fig. 4)."""

from pathlib import Path

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from ffw_fast.figures.rows import Rows
from ffw_fast.figures.style import color, new_axes, new_figure
from ffw_fast.runs.reading import RunFolder, open_run

NETWORKS = ("vanilla", "pruned")
HEAT = LinearSegmentedColormap.from_list("heat", [(0.95, 0.45, 0.1, 0.0), (0.95, 0.45, 0.1, 0.55), (1, 0.9, 0.3, 0.85)])


def numbers(paths: list[Path]) -> Rows:
    """One row a pixel of a map and one of an image, of the first path's run. ``ValueError`` where there are none."""
    run = open_run(paths[0])
    if rows := run_numbers(run):
        return rows
    raise ValueError(f"{run.path} holds no examples of images to explain")


def run_numbers(run: RunFolder) -> Rows:
    """Columns sample, target, bias, network, prediction, row, column, value.

    The network is empty for the pixels of the image itself, whose value is its colour, ``#rrggbb``.
    """
    examples = run.examples()
    if not examples:
        return []
    rows: Rows = []
    images = _colors(examples["x"].numpy())
    for sample, image in enumerate(images):
        labels = {
            "sample": sample,
            "target": int(examples["y"][sample]),
            "bias": " ".join(str(int(label)) for label in examples["b"][sample]),
        }
        rows += [
            {**labels, "network": "", "prediction": None, "row": row, "column": column, "value": value}
            for (row, column), value in np.ndenumerate(image)
        ]
        for network in NETWORKS:
            prediction = int(examples[f"{network}.prediction"][sample])
            rows += [
                {**labels, "network": network, "prediction": prediction, "row": row, "column": column, "value": value}
                for (row, column), value in np.ndenumerate(examples[f"{network}.map"][sample].numpy().round(4))
            ]
    return rows


def _colors(x: np.ndarray) -> np.ndarray:
    """Images (n, height, width) of colours as text, from floats (n, 1 or 3, height, width) on any scale."""
    low, high = x.min(), x.max()
    levels = np.rint((x - low) / max(high - low, 1e-12) * 255).astype(int)
    red, green, blue = np.broadcast_to(levels, (len(x), 3, *x.shape[2:])).transpose(1, 0, 2, 3)
    return np.char.mod("#%06x", (red << 16) | (green << 8) | blue)


def draw(rows: Rows) -> Figure:
    """A column for each sample: the image, and under it the two networks' maps over the image, with their answers."""
    grids: dict[tuple[int, str], list[tuple[int, int, object]]] = {}
    labels: dict[tuple[int, str], dict] = {}
    for row in rows:
        key = (row["sample"], row["network"])
        labels[key] = row
        grids.setdefault(key, []).append((row["row"], row["column"], row["value"]))
    samples = sorted({sample for sample, _ in grids})
    width = max(4.2, 0.82 * len(samples))
    figure = new_figure(3.35 / 6.6 * width if len(samples) > 5 else 3.2, width)
    all_axes = new_axes(figure, 1 + len(NETWORKS), len(samples))
    for line, network in enumerate(("", *NETWORKS)):
        for column, sample in enumerate(samples):
            axes = all_axes[line * len(samples) + column]
            image = _image(_grid(grids[sample, ""]))
            height, width_pixels = image.shape[:2]
            extent = (0, width_pixels, height, 0)
            axes.imshow(image, extent=extent, interpolation="nearest")
            row = labels[sample, network]
            if network:
                heat = _grid(grids[sample, network]).astype(float)
                axes.imshow(heat, cmap=HEAT, vmin=0, vmax=1, extent=extent, interpolation="bilinear")
                right = row["prediction"] == row["target"]
                hue = color("best" if right else "warm")
                axes.set_title(f"says {row['prediction']}", loc="center", color=hue, fontsize=8.5)
            else:
                axes.set_title(f"{row['target']}", loc="center", fontsize=8.5)
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(False)
            for spine in axes.spines.values():
                spine.set_visible(False)
            if column == 0:
                axes.set_ylabel(network or "image", color=color("ink"), fontsize=8.5)
    return figure


def _grid(values: list[tuple[int, int, object]]) -> np.ndarray:
    height, width = 1 + max(row for row, _, _ in values), 1 + max(column for _, column, _ in values)
    grid = np.empty((height, width), dtype=object)
    for row, column, value in values:
        grid[row, column] = value
    return grid


def _image(colors: np.ndarray) -> np.ndarray:
    levels = np.array([[int(value[1:], 16) for value in row] for row in colors])
    return np.stack([levels >> 16, levels >> 8 & 255, levels & 255], axis=-1).astype(np.uint8)
