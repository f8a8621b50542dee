"""The data sets, their sources, and how a user's own data are read."""

from ffw_fast.data.biased_mnist import biased_mnist
from ffw_fast.data.celeba import celeba
from ffw_fast.data.corrupted_cifar10 import corrupted_cifar10
from ffw_fast.data.digits import DigitPools, Digits, load_digits
from ffw_fast.data.multi_color_mnist import multi_color_mnist
from ffw_fast.data.samples import Samples, Splits

__all__ = [
    "DigitPools",
    "Digits",
    "Samples",
    "Splits",
    "biased_mnist",
    "celeba",
    "corrupted_cifar10",
    "load_digits",
    "multi_color_mnist",
]
