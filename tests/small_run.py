"""Run folders of a moment's work, for tests of what is made from them."""

from pathlib import Path
from typing import Any

from ffw_fast.progress import Progress
from ffw_fast.runs.request import Request
from ffw_fast.runs.run import run_workload
from ffw_fast.workloads import get_workload


def small_run(out: Path, *, workload: str = "multi-color-mnist", **changes: Any) -> Path:
    """Run a few samples for a few epochs; the folder. ``changes`` are of the request."""
    data = {"train_size": 100, "unbiased_size": 100}
    if workload == "biased-mnist":
        data["image_size"] = 7
    basis: dict[str, Any] = {
        "data_options": data,
        "extraction": {"max_epochs": 3, "schedule": "adaptive", "anneal_rate": 0.05},
        "vanilla_epochs": 1,
    }
    run_workload(Request(workload=get_workload(workload), out=out, **{**basis, **changes}), Progress())
    return out
