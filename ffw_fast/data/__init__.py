"""The data sets: digits read from files, coloured so that colour and label agree too often."""

from ffw_fast.data.biased_mnist import biased_mnist
from ffw_fast.data.digits import DigitPools, Digits, load_digits
from ffw_fast.data.multi_color_mnist import multi_color_mnist
from ffw_fast.data.samples import Samples, Splits

__all__ = ["DigitPools", "Digits", "Samples", "Splits", "biased_mnist", "load_digits", "multi_color_mnist"]
