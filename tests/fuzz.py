"""Damages files of every kind that the package reads: ``python -m tests.fuzz --files 10000`` prints what came of it.

Checkpoints, score files, IDX files (plain and gzip), configs, metrics and histories are mutated by flipped bits, cut
and spliced pieces and extreme numbers. Each must give a ``ValueError`` that names the file, or exactly what the whole
file gives; texts that a person may edit, and pixels, may also be read as what they now say. Anything else, a crash of
the process among it, is a failure.
"""

import argparse
import gzip
import json
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ffw_fast.data.digits import read_idx
from ffw_fast.extract import extract
from ffw_fast.extraction import BEST_SCORES, CONFIG, HISTORY, METRICS, SCORES, Extraction
from ffw_fast.files import digest
from ffw_fast.run_state import CHECKPOINT, Resumable, RunState
from tests.six_features import arguments, network, samples

EXTREMES = [b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7, b"NaN", b"-1", b"1e999", b"null", b"../../x", b'"', b"["]


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        content: of the whole file.
        read: what a reader makes of the file at a path, in a form that can be compared.
        checked: whether a checksum or the like stands guard, so that anything that is read must be what was written.
            Texts that a person may edit have none: there a changed number is another right one.
    """

    path: Path
    content: bytes
    read: Callable[[], Any]
    checked: bool


class Notes(Resumable):
    """Something small that can be checkpointed."""

    def __init__(self) -> None:
        self.read: Any = None

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return {"half": torch.arange(3).half(), "counts": torch.arange(6).view(2, 3)}, {"epochs": 3, "best": None}

    def load_state(self, tensors: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
        self.read = (digest(*(tensors[name] for name in sorted(tensors))), json.dumps(record))


def make_kinds(folder: Path) -> dict[str, Kind]:
    """Every kind with a file of its own, written by the package where it writes such files."""
    model = network()
    found = extract(model, samples(40), samples(30, seed=1), **arguments())
    found.save(folder / "run")

    def loaded() -> Any:
        again = Extraction.load(folder / "run", model)
        scores = [*again.scores.values(), *again.best_scores.values()]
        return digest(*scores), again.settings, repr(again.history), repr(again.metrics)

    def checkpoint() -> Any:
        notes = Notes()
        RunState(folder / "state", {"seed": 3}, resume=True).restore(notes)
        return notes.read

    RunState(folder / "state", {"seed": 3}, resume=False).save(Notes())
    images = bytes((0, 0, 8, 3, 0, 0, 0, 5, 0, 0, 0, 4, 0, 0, 0, 4)) + bytes(range(80))
    (folder / "images").write_bytes(images)
    (folder / "images.gz").write_bytes(gzip.compress(images, mtime=0))
    files = {
        "checkpoint": (folder / "state" / CHECKPOINT, checkpoint, True),
        "scores": (folder / "run" / SCORES, loaded, True),
        "best scores": (folder / "run" / BEST_SCORES, loaded, True),
        "config": (folder / "run" / CONFIG, loaded, False),
        "metrics": (folder / "run" / METRICS, loaded, False),
        "history": (folder / "run" / HISTORY, loaded, False),
        "IDX": (folder / "images", lambda: read_idx(folder / "images", (None, 4, 4)).tolist(), False),
        "IDX in gzip": (folder / "images.gz", lambda: read_idx(folder / "images.gz", (None, 4, 4)).tolist(), True),
    }
    return {name: Kind(path, path.read_bytes(), read, checked) for name, (path, read, checked) in files.items()}


def mutated(content: bytes, source: random.Random) -> bytes:
    """The content after one to four changes."""
    for _ in range(source.choice((1, 1, 1, 2, 4))):
        at = source.randrange(len(content) + 1)
        until = min(len(content), at + source.choice((0, 1, 4, 8, 40, len(content))))
        pieces = [
            bytes(byte ^ (1 << source.randrange(8)) for byte in content[at : at + 1]) + content[at + 1 : until],
            source.randbytes(source.randrange(30)),
            b"",
            source.choice(EXTREMES),
            content[source.randrange(len(content) + 1) :][:40],
        ]
        content = content[:at] + source.choice(pieces) + content[until:]
    return content


def outcome(kind: Kind, content: bytes, expected: Any) -> str:
    """What a damaged file gives: "refused", "whole", "read otherwise" where that may be, or what is wrong."""
    kind.path.write_bytes(content)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = kind.read()
    except ValueError as error:
        return "refused" if kind.path.name in str(error) else f"FAILURE: the file is not named: {error}"
    except Exception as error:
        return f"FAILURE: {type(error).__name__}: {error}"
    finally:
        kind.path.write_bytes(kind.content)
    if result == expected:
        return "whole"
    return "FAILURE: other contents were believed" if kind.checked else "read otherwise"


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000, help="of all kinds together (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (default: %(default)s)")
    options = parser.parse_args(given)
    source = random.Random(options.seed)
    failures = 0
    with TemporaryDirectory() as scratch:
        kinds = make_kinds(Path(scratch))
        for name, kind in kinds.items():
            expected, seen = kind.read(), Counter[str]()
            for _ in range(-(-options.files // len(kinds))):
                content = mutated(kind.content, source)
                result = outcome(kind, content, expected)
                if result.startswith("FAILURE") and seen[result] == 0:
                    print(f"{name}: {result}\n  {content!r}")
                seen[result] += 1
            failures += sum(count for result, count in seen.items() if result.startswith("FAILURE"))
            print(f"{name}: {dict(seen)}", flush=True)
    print(f"failures: {failures}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
