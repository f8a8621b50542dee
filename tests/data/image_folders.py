"""Small folders in the publishers' layouts of CelebA and Corrupted CIFAR-10, filled with generated images."""

from pathlib import Path

import numpy as np
from PIL import Image

GROUPS = [(blond, male) for blond in (0, 1) for male in (0, 1)]
SPLITS = (0, 1, 2)


def write_image(path: Path, seed: int, size: tuple[int, int], **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


def write_celeba(folder: Path, counts: dict[int, list[int]], form: str = "txt") -> None:
    """``counts``: split -> images of each group: not blond woman, not blond man, blond woman, blond man."""
    people = [
        (split, *group)
        for split in SPLITS
        for group, count in zip(GROUPS, counts[split], strict=True)
        for _ in range(count)
    ]
    celeba = folder / "celeba"
    celeba.mkdir(parents=True, exist_ok=True)
    names = [f"{number:06d}.jpg" for number in range(1, len(people) + 1)]
    signs = {name: (2 * blond - 1, 2 * male - 1) for name, (_, blond, male) in zip(names, people, strict=True)}
    for number, name in enumerate(names):
        write_image(celeba / "img_align_celeba" / name, number, (44, 54), quality=95)
    if form == "txt":
        rows = [f"{name}  1 {signs[name][0]:2d} {signs[name][1]:2d}" for name in names]
        attributes = [str(len(names)), "Bald Blond_Hair Male", *rows]
        partition = [f"{name} {split}" for name, (split, *_) in zip(names, people, strict=True)]
    else:
        rows = [f"{name},1,{signs[name][0]},{signs[name][1]}" for name in names]
        attributes = ["image_id,Bald,Blond_Hair,Male", *rows]
        lines = [f"{name},{split}" for name, (split, *_) in zip(names, people, strict=True)]
        partition = ["image_id,partition", *lines]
    (celeba / f"list_attr_celeba.{form}").write_text("\n".join(attributes) + "\n")
    (celeba / f"list_eval_partition.{form}").write_text("\n".join(partition) + "\n")


def write_cifar10c(folder: Path, percent: str = "1", align: int = 2, conflict: int = 1, test: int = 3) -> None:
    """So many images of each class."""
    root, number = folder / "cifar10c", 0
    for place, count, aligned in (
        (root / f"{percent}pct" / "align", align, True),
        (root / f"{percent}pct" / "conflict", conflict, False),
        (root / "test", test, False),
    ):
        for label in range(10):
            for _ in range(count):
                number += 1
                bias = label if aligned else (label + 1 + number % 9) % 10
                write_image(place / str(label) / f"{number}_{label}_{bias}.png", number, (32, 32))
