"""The version, as the installed package has it; it stands once, in ``pyproject.toml``."""

from importlib import metadata

try:
    __version__ = metadata.version("ffw_fast")
except metadata.PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"
