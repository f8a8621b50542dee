"""The build: sdist to wheel to an installed package that runs, with and without a compiler.

Installs go to temporary folders, without dependencies and without build isolation, so nothing is downloaded.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib import util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a source checkout")

CHECK = """
import json, torch
import ffw_fast, ffw_fast.kernels
from ffw_fast import backend, ops, philox
backend.load()
ones = torch.ones(5)
gated = ops.gate_weight(ones, ones, torch.tensor(1.0), philox.make_draw(), 0)
print(json.dumps([backend.backend_info()["cpu"], ffw_fast.kernels.__file__, gated.tolist()]))
"""

# A .pth file works in a site folder only, and this environment may have an editable install of its own.
PRETEND_FRESH_SITE = """
import site, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
for name in [name for name in sys.modules if name.startswith("__editable__")]:
    del sys.modules[name]
sys.path.insert(0, {0!r})
site.addsitedir({0!r})
"""


def run(*command, cwd, **environment):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr, done.stdout


def build_wheel(source: Path, into: Path, **environment) -> tuple[Path, str]:
    options = ("--no-build-isolation", "--no-deps", "--no-index", "-v", "-w", into)
    code, output, _ = run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=into, **environment)
    assert code == 0, output
    (wheel,) = into.glob("*.whl")
    return wheel, output


def check_installed(folder: Path) -> tuple[dict, Path]:
    """The installed package's CPU kernels, and where its Triton kernels are, from a process elsewhere."""
    code, output, printed = run(sys.executable, "-W", "ignore", "-c", CHECK, cwd=folder, PYTHONPATH=str(folder))
    assert code == 0, output
    cpu, kernels, gated = json.loads(printed)
    assert gated == [1.0] * 5
    return cpu, Path(kernels)


def install(wheel: Path, folder: Path) -> None:
    code, output, _ = run(
        sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", folder, wheel, cwd=wheel.parent
    )
    assert code == 0, output


@pytest.fixture
def source(sdist, tmp_path) -> Path:
    """A copy of the sdist of its own, so that no test finds what another one built."""
    return Path(shutil.copytree(sdist, tmp_path / "source"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The unpacked sdist of this checkout."""
    folder = tmp_path_factory.mktemp("sdist")
    program = "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))"
    code, output, _ = run(sys.executable, "-c", program, folder, cwd=ROOT, FFW_FAST_BUILD="none")
    assert code == 0, output
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_sdist_holds_all_sources(sdist):
    for folder, suffixes in (
        ("csrc", (".h", ".inl", ".cpp", ".cu", ".cuh")),
        ("kernels", (".py",)),
        ("ffw_fast", (".py",)),
    ):
        wanted = {path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.suffix in suffixes}
        assert wanted
        assert wanted <= {path.relative_to(sdist) for path in (sdist / folder).rglob("*")}
    assert not list(sdist.rglob("*.so"))


@pytest.mark.slow
def test_wheel_from_sdist_runs(source, tmp_path):
    wheel, _ = build_wheel(source, tmp_path, FFW_FAST_BUILD="cpu")
    assert "-cp311-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
    assert "ffw_fast/kernels/__init__.py" in names
    assert not any(name.startswith(("kernels/", "csrc/", "tests/")) for name in names)
    install(wheel, tmp_path / "target")
    cpu, kernels = check_installed(tmp_path / "target")
    assert cpu["used"] == "cpp"
    assert kernels == tmp_path / "target" / "ffw_fast" / "kernels" / "__init__.py"


SMOKE = """
import torch, ffw_fast
from torch import nn
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
sets = [(torch.randn(40, 4), torch.randint(2, (40,)), torch.randint(2, (40,))) for _ in range(2)]
found = ffw_fast.extract(model, *sets, bottleneck="1", num_bias_classes=2, max_epochs=1, run_dir="run", progress=False)
found.save("run")
again = ffw_fast.Extraction.load("run", model)
assert all(torch.equal(again.scores[name], scores) for name, scores in found.scores.items())
print(ffw_fast.__file__)
"""


@pytest.mark.slow
def test_wheel_runs_in_an_empty_environment(source, tmp_path):
    """An environment of its own, with what the package depends on lent to it and nothing else of this one."""
    wheel, _ = build_wheel(source, tmp_path, FFW_FAST_BUILD="cpu")
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=os.name == "posix")
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    options = ("--python", python, "install", "--no-deps", "--no-index", wheel)
    code, output, _ = run(sys.executable, "-m", "pip", *options, cwd=tmp_path)
    assert code == 0, output
    _, _, site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path)
    lent = {str(Path(util.find_spec(name).origin).parents[1]) for name in ("torch", "numpy", "safetensors", "rich")}
    (Path(site.strip()) / "lent.pth").write_text("\n".join(sorted(lent)))
    code, output, printed = run(python, "-W", "ignore", "-c", SMOKE, cwd=tmp_path)
    assert code == 0, output
    assert environment in Path(printed.strip()).parents
    code, output, printed = run(python.with_name("ffw-fast"), "info", cwd=tmp_path)
    assert code == 0, output
    assert f"library: {environment}" in printed


def test_without_a_compiler_the_package_still_installs(source, tmp_path):
    nothing = {"CC": "/nowhere/cc", "CXX": "/nowhere/c++"}
    earlier = source / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "ffw_fast"
    earlier.mkdir(parents=True)
    (earlier / "_cpu.abi3.so").write_bytes(b"of an older source")
    os.utime(earlier / "_cpu.abi3.so", (0, 0))
    wheel, output = build_wheel(source, tmp_path, FFW_FAST_BUILD="auto", **nothing)
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(wheel).namelist())
    assert 'building extension "ffw_fast._cpu" failed' in output
    install(wheel, tmp_path / "target")
    cpu, _ = check_installed(tmp_path / "target")
    assert cpu["used"] == "torch"
    assert "missing" in cpu["why_not"]


def test_what_is_asked_for_must_build(source, tmp_path):
    nothing = {"CC": "/nowhere/cc", "CXX": "/nowhere/c++", "FFW_FAST_BUILD": "cpu"}
    options = ("--no-build-isolation", "--no-deps", "--no-index", "-w", tmp_path)
    code, output, _ = run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=tmp_path, **nothing)
    assert code != 0
    assert "/nowhere/c" in output


def test_nothing_to_compile(source, tmp_path):
    wheel, _ = build_wheel(source, tmp_path, FFW_FAST_BUILD="none")
    assert wheel.name.endswith("-py3-none-any.whl")
    install(wheel, tmp_path / "target")
    assert check_installed(tmp_path / "target")[0]["used"] == "torch"


def test_unknown_choice(sdist):
    code, output, _ = run(sys.executable, "setup.py", "--version", cwd=sdist, FFW_FAST_BUILD="gpu")
    assert code != 0
    assert "FFW_FAST_BUILD must be one of auto, cpu, cuda, none, got 'gpu'" in output


def test_editable_install_has_the_triton_kernels(source, tmp_path):
    program = "import setuptools.build_meta as b, sys; print(b.build_editable(sys.argv[1]))"
    code, output, _ = run(sys.executable, "-c", program, tmp_path, cwd=source, FFW_FAST_BUILD="none")
    assert code == 0, output
    (wheel,) = tmp_path.glob("*.whl")
    install(wheel, tmp_path / "target")
    start = PRETEND_FRESH_SITE.format(str(tmp_path / "target"))
    code, output, printed = run(sys.executable, "-W", "ignore", "-c", start + CHECK, cwd=tmp_path)
    assert code == 0, output
    assert Path(json.loads(printed)[1]) == source / "kernels" / "__init__.py"
