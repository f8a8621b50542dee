"""The networks of the benchmarks. Every non-linearity is a module of its own that is used once."""

from ffw_fast.models.mlp import MLP
from ffw_fast.models.resnet import ResNet18
from ffw_fast.models.simple_conv_net import SimpleConvNet

__all__ = ["MLP", "ResNet18", "SimpleConvNet"]
