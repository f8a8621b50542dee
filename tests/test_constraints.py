"""The versions that the tests are run with, one by one in ``constraints.txt``."""

import tomllib
from importlib import metadata
from pathlib import Path

import pytest

packaging = pytest.importorskip("packaging", reason="it comes with pytest")
from packaging.requirements import Requirement  # noqa: E402
from packaging.utils import canonicalize_name  # noqa: E402

ROOT = Path(__file__).parents[1]
AS_FOUND = {"torch", "triton"}  # whatever PyTorch there is, and the Triton that goes with it

pytestmark = pytest.mark.skipif(not (ROOT / "constraints.txt").exists(), reason="needs a source checkout")


@pytest.fixture(scope="module")
def pinned() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    requirements = [Requirement(line) for line in lines]
    assert lines == sorted(lines)
    for requirement in requirements:
        (version,) = requirement.specifier
        assert version.operator == "=="
        assert "+" not in version.version, "a local version is no one else's"
    return {canonicalize_name(requirement.name): str(requirement.specifier)[2:] for requirement in requirements}


def test_all_that_the_tests_install_is_pinned(pinned):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for requirement in map(Requirement, [*project["dependencies"], *extras["test"], *extras["digits"]]):
        name = canonicalize_name(requirement.name)
        assert (name in pinned) == (name not in AS_FOUND), name
        assert name in AS_FOUND or requirement.specifier.contains(pinned[name])


def test_what_those_need_is_pinned_too(pinned):
    """As far as it is installed here in that version."""
    installed = {canonicalize_name(found.metadata["Name"]): found for found in metadata.distributions()}
    for name, version in pinned.items():
        if name not in installed or installed[name].version != version:
            continue
        for requirement in map(Requirement, installed[name].requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                assert canonicalize_name(requirement.name) in pinned.keys() | AS_FOUND, f"{requirement} of {name}"
