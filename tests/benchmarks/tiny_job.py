"""A workload small enough that everything about it is measured in a second."""

from ffw_fast.benchmarks.jobs import Job
from torch import nn

from ffw_fast.models import MLP


def network() -> nn.Module:
    return MLP(in_features=3 * 6 * 6, hidden=16)


JOB = Job("Tiny", network, "relu3", (3, 6, 6), 10, 2, train=400, val=200, paper_seconds=60, batch_size=50)
