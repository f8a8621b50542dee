"""Kills short runs with SIGKILL and lets them go on: ``python -m tests.kills --kills 200`` prints what came of it.

Every run is a process of its own, forked from this one. It is killed at a random instant, or, every second time, by
itself at a random step of writing a file: before or after it, halfway through, before or after the flush to the disk
and every renaming. After one to three kills it is let go on to its end. Scores, best scores, masks, history and metrics
must then be, bit by bit, those of a run that nobody killed; times aside. So must the weights and buffers of biased
networks, whose training is killed likewise.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ffw_fast import files, heads, run_state, schedule, vanilla
from ffw_fast.data.pixels import Pixels
from ffw_fast.data.samples import Samples, Splits
from ffw_fast.extract import extract
from ffw_fast.extraction import read_history, read_json
from ffw_fast.models import SimpleConvNet
from ffw_fast.progress import Progress
from ffw_fast.run_state import EXTRACTION
from ffw_fast.runs.biased_network import prepare_vanilla
from ffw_fast.runs.request import Request
from ffw_fast.runs.run import run_workload
from ffw_fast.vanilla import Recipe
from ffw_fast.workloads import Workload, get_workload
from tests.six_features import arguments, network, samples

EXTRACTIONS: list[dict[str, Any]] = [
    {"schedule": "published"},
    {"schedule": "adaptive", "anneal_rate": 2e-6},
    {"schedule": "published", "gate": "bernoulli"},
    {"schedule": "adaptive", "gate": "concrete", "anneal_rate": 2e-6},
]
VANILLA: list[dict[str, Any]] = [
    {"optimizer": "adam", "lr": 0.01, "schedule": "cosine"},
    {"optimizer": "sgd", "lr": 0.1, "schedule": "plateau", "lr_end": 1e-6, "flips": True, "crop_padding": 1},
]
TIMES = ("seconds", "stages")


def run_extraction(folder: Path, settings: dict[str, Any]) -> None:
    train, val = samples(40, 2, 1), samples(30, 2, 2)
    found = extract(network(), train, val, run_dir=folder, resume=True, **arguments(max_epochs=30, **settings))
    found.save(folder)


def run_vanilla(folder: Path, settings: dict[str, Any]) -> None:
    workload = Workload(
        name="images",
        title="Small images",
        bias_names=("bias",),
        bottleneck="flatten",
        network=SimpleConvNet,
        data=lambda _data_dir, _seed: Splits(*(images(seed) for seed in range(4))),
        full_recipe=None,
        shipped_recipe=Recipe(batch_size=8, epochs=25, **settings),
    )
    prepare_vanilla(Request(workload=workload, out=folder), Progress())


def images(seed: int) -> Samples:
    """20 images of noise, 7x7 pixels."""
    source = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (20, 3, 7, 7), dtype=torch.uint8, generator=source)
    y, b = torch.randint(10, (20,), generator=source), torch.randint(10, (20, 1), generator=source)
    return Samples(Pixels(x, (0.5,) * 3, (0.25,) * 3), y, b)


def run_everything(folder: Path, _settings: dict[str, Any]) -> None:
    request = Request(
        workload=get_workload("multi-color-mnist"),
        out=folder,
        data_options={"train_size": 100, "unbiased_size": 100},
        extraction={"max_epochs": 8},
        vanilla_epochs=8,
        resume=True,
    )
    run_workload(request, Progress())


def forked(action: Callable[[], None]) -> int:
    """The action in a process of its own; its process id."""
    if child := os.fork():
        return child
    status = 1
    try:
        action()
        status = 0
    finally:
        if status:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        os._exit(status)


def make_short() -> None:
    """Runs of a fraction of a second, whose every epoch is written."""
    torch.set_num_threads(1)
    heads.MAX_EPOCHS = 6
    schedule.MI_PATIENCE = 0
    vanilla.PATIENCE = vanilla.COOLDOWN = 0
    run_state.LONGEST = 0.0


def kill_in_write(at: int) -> None:
    """Let this process kill itself at a step of its writes, the ``at``-th from now on."""
    left = at

    def step() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def save_file(tensors: dict, path: Path, texts: dict) -> None:
        step()
        saved(tensors, path, texts)
        if left == 1:
            os.truncate(path, os.path.getsize(path) // 2)
        step()

    def fsync(opened: int) -> None:
        step()
        flushed(opened)
        step()

    def replace(self: Path, target: Path) -> Path:
        step()
        moved = renamed(self, target)
        step()
        return moved

    saved, flushed, renamed = files.save_file, os.fsync, Path.replace
    files.save_file, os.fsync, Path.replace = save_file, fsync, replace  # type: ignore[assignment, method-assign]


def result(folder: Path) -> dict[str, Any]:
    """All that a run found, without the times."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: timeless(entry) for name, entry in value.items() if name not in TIMES}
        return value

    tensors = {path.name: path.read_bytes() for path in folder.glob("*.safetensors") if path.name not in EXTRACTION}
    if "vanilla.safetensors" in tensors and not (folder / "metrics.json").exists():
        return tensors
    history = [timeless(row) for row in read_history(folder / "history.csv")]
    return {**tensors, "history": history, "metrics": timeless(read_json(folder / "metrics.json"))}


class Trials:
    """Runs of one kind with one setting, against the one that nobody killed."""

    def __init__(self, run: Callable[[Path, dict], None], settings: dict[str, Any], folder: Path) -> None:
        self.run, self.settings, self.folder = run, settings, folder
        run(folder / "warm", settings)  # in this process: what is imported at first use is there in every fork
        started = time.monotonic()
        assert self._wait(forked(lambda: run(folder / "whole", settings))) == 0, "the run fails by itself"
        self.seconds = time.monotonic() - started
        self.expected = result(folder / "whole")

    @staticmethod
    def _wait(child: int) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def trial(self, source: random.Random) -> Counter[str]:
        """One run that is killed one to three times; how often, and at what."""
        folder = self.folder / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        seen: Counter[str] = Counter()
        for _ in range(source.randint(1, 3)):
            in_write = source.random() < 0.5
            if self._killed(folder, source, in_write):
                seen["kills in a write" if in_write else "kills at a random instant"] += 1
        status = self._wait(forked(lambda: self.run(folder, self.settings)))
        assert status == 0, f"cannot go on: {sorted(folder.iterdir())}"
        found = result(folder)
        seen["runs"] += 1
        seen["runs with other bits"] += found != self.expected
        return seen

    def _killed(self, folder: Path, source: random.Random, in_write: bool) -> bool:
        """Whether the run was killed before it came to its end."""
        at = source.randint(1, 150)

        def action() -> None:
            if in_write:
                kill_in_write(at)
            self.run(folder, self.settings)

        child = forked(action)
        if not in_write:
            time.sleep(source.uniform(0, self.seconds))
            os.kill(child, signal.SIGKILL)
        status = self._wait(child)
        assert status in (0, -signal.SIGKILL), f"the run fails with {status}: {sorted(folder.iterdir())}"
        return status != 0


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="of extractions, at least (default: %(default)s)")
    parser.add_argument("--vanilla-kills", type=int, default=0, help="of biased networks (default: %(default)s)")
    parser.add_argument("--workload-kills", type=int, default=0, help="of whole workloads (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the instants (default: %(default)s)")
    options = parser.parse_args(given)
    make_short()
    source = random.Random(options.seed)
    total: Counter[str] = Counter()
    with TemporaryDirectory() as scratch:
        kinds: list[tuple[Callable[[Path, dict], None], dict[str, Any], float]]
        kinds = [(run_extraction, settings, options.kills / len(EXTRACTIONS)) for settings in EXTRACTIONS]
        kinds += [(run_vanilla, settings, options.vanilla_kills / len(VANILLA)) for settings in VANILLA]
        kinds.append((run_everything, {}, options.workload_kills))
        for number, (run, settings, kills) in enumerate(kinds):
            if not kills:
                continue
            trials, seen = Trials(run, settings, Path(scratch) / str(number)), Counter()
            while seen["kills in a write"] + seen["kills at a random instant"] < kills:
                seen += trials.trial(source)
            total += seen
            print(f"{run.__name__} {settings}: {dict(seen)}", flush=True)
    print(f"together: {dict(total)}")
    return int(total["runs with other bits"] > 0)


if __name__ == "__main__":
    sys.exit(main())
