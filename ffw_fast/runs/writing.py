"""What a run writes into its folder: all of it or nothing, and never over what another run left before it has more."""

import shutil
import warnings
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from ffw_fast.attribution import explain
from ffw_fast.data.samples import Samples
from ffw_fast.extraction import BEST_SCORES, CONFIG, HISTORY, METRICS, MODEL, SCORES, Extraction
from ffw_fast.files import TEMPORARY, read_json, sync_folder, write_json, write_tensors
from ffw_fast.run_state import ARRIVING, CHECKPOINT, PREVIOUS, Checkpoints, check_same_run
from ffw_fast.runs.reading import EXAMPLES, OF_THE_NETWORK

# Of one extraction from one network.
RESULTS = (CHECKPOINT, PREVIOUS, SCORES, BEST_SCORES, MODEL, METRICS, HISTORY, EXAMPLES, *OF_THE_NETWORK)
VANILLA = "vanilla.safetensors"
VANILLA_RECORD = "vanilla.json"
VANILLA_CHECKPOINTS = Checkpoints.named("vanilla.checkpoint")  # while it is trained
STAGING = ".writing-"
MAY_DIFFER = (  # between resumed runs
    "title", "settings", "correlations", "max_epochs", "samples", "input_shape", "device", "versions", "machine",
    "backend",
)  # fmt: skip


def check_folder(out: Path) -> None:
    """Make the folder; ``OSError`` with its name where it cannot be made or written."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"the run folder {out} is a file")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out, prefix=STAGING):
            pass
    except OSError as error:
        raise type(error)(f"the run folder {out} cannot be written: {error.strerror or error}") from error


def check_own(out: Path) -> None:
    """Leave a folder alone that is not of a run.

    Raises:
        FileExistsError: it holds a file that a run would write or remove, and no record of a run; which file.
        DamagedFileError: its record cannot be read.
    """
    if not ((out / CONFIG).exists() and {"workload", "settings"} & read_json(out / CONFIG).keys()):
        check_free(out, (CONFIG, *RESULTS))


def check_free(folder: Path, names: Iterable[str]) -> None:
    """``FileExistsError`` with the first of these files that the folder holds."""
    for name in names:
        if (folder / name).exists():
            raise FileExistsError(f"{folder / name} was not written by this command, and is kept: take another folder")


def check_resumed(out: Path, config: dict[str, Any]) -> None:
    """``OtherRunError`` where the folder holds another run than the one that is to be continued."""
    if not (out / CONFIG).exists():
        return
    check_same_run(f"{out} holds another run, which cannot be resumed", read_json(out / CONFIG), config, MAY_DIFFER)


def remove_leftovers(out: Path) -> None:
    """Remove what a run that was killed left half written."""
    for path in out.glob(f"{STAGING}*"):
        shutil.rmtree(path, ignore_errors=True)
    names = (CONFIG, *RESULTS, VANILLA, VANILLA_RECORD, *VANILLA_CHECKPOINTS)
    for name, ending in product(names, (TEMPORARY, ARRIVING, f"{ARRIVING}{TEMPORARY}")):
        (out / f"{name}{ending}").unlink(missing_ok=True)


def clear_results(out: Path) -> None:
    """Remove what another extraction left, so that no file belongs to another run than the one beside it."""
    for name in RESULTS:
        (out / name).unlink(missing_ok=True)


def _examples(found: Extraction, test: Samples) -> dict[str, Tensor]:
    """Where both networks look; none where they cannot be asked, which is no reason to lose an extraction."""
    try:
        return explain({"vanilla": found.dense_model.eval(), "pruned": found.model()}, test)
    except Exception as error:  # whatever the model's own code raises
        warnings.warn(f"no pictures of what the networks look at: {type(error).__name__}: {error}", stacklevel=2)
        return {}


def write_results(out: Path, found: Extraction, config: dict[str, Any], metrics: dict[str, Any], test: Samples) -> None:
    """Write the extraction and the run's own records beside it, then move all of it into the folder at once."""
    with TemporaryDirectory(dir=out, prefix=STAGING) as staging:
        found.save(staging)
        if examples := _examples(found, test):
            write_tensors(Path(staging) / EXAMPLES, examples)
        write_json(Path(staging) / CONFIG, config)
        write_json(Path(staging) / METRICS, metrics)
        for name in (METRICS, *OF_THE_NETWORK):  # of what it was before; metrics come last, and tell that all is there
            (out / name).unlink(missing_ok=True)
        for path in sorted(Path(staging).iterdir(), key=lambda path: path.name == METRICS):  # it comes last
            path.replace(out / path.name)
        sync_folder(out)
