"""The extraction of a run's folder, with its biased network, ready to be used."""

import os
from pathlib import Path

from torch import Tensor, nn

from ffw_fast import own
from ffw_fast.extraction import CONFIG, SCORES, Extraction
from ffw_fast.files import read_json, read_tensors
from ffw_fast.runs.writing import VANILLA
from ffw_fast.workloads import get_workload


def load_run(folder: str | os.PathLike[str], model: str | None = None) -> Extraction:
    """The extraction of a run folder, with the biased network that stands beside it, on the CPU.

    No code is run that the folder names, so that one from a stranger can be read.

    Args:
        model: of a run of ``own`` alone: ``module:function`` that builds the network, as it was given to the run.

    Raises:
        FileNotFoundError: the folder holds no finished run.
        ValueError: a file is damaged, the workload is unknown or has another network now, or ``model`` is not given to
            a run of ``own``, or given to another one.
        ImportError, TypeError: the model's module or function cannot be used.
    """
    folder = Path(folder)
    if missing := [name for name in (CONFIG, VANILLA, SCORES) if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} holds no finished run of ffw-fast: it has no {', '.join(missing)}")
    config = read_json(folder / CONFIG)
    network = _network_of_run(folder, str(config.get("workload")), model)  # its weights are read below
    weights, _ = read_tensors(folder / VANILLA)
    beside = {name: value for name, value in network.state_dict().items() if not isinstance(value, Tensor)}
    try:
        network.load_state_dict({**beside, **weights})
    except RuntimeError as error:
        raise ValueError(f"{folder / VANILLA} does not fit {type(network).__name__}: {error}") from error
    return Extraction.load(folder, network.eval())


def _network_of_run(folder: Path, workload: str, model: str | None) -> nn.Module:
    """The network of a run's workload, or of ``own`` what the user's function builds, never one that a file names."""
    if workload != own.NAME:
        if model is not None:
            raise ValueError(f"{folder} holds a run of {workload}, which has a network of its own: leave out the model")
        return get_workload(workload).build_model(seed=0)
    if model is None:
        raise ValueError(
            f"{folder} holds a run of your own model, which is built by a function of yours; {CONFIG} has its name "
            "(data_options.model), but what a file names is not called, as a stranger's folder could run any code so: "
            "give the function by --model MODULE:FUNCTION, in Python load_run(folder, model='module:function')"
        )
    return own.make_network(model)
