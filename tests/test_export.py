import sys

import pytest
import torch
from torch import nn

from ffw_fast.compact import compact
from ffw_fast.export import TOLERANCE, export
from ffw_fast.masking import mask_model
from tests.small_images import network


@pytest.fixture(scope="module")
def model():
    """A convolutional network with batch norm, pruned and compact."""
    pytest.importorskip("torch_pruning", reason="the extra 'compact' is not installed")
    model = network()
    with torch.no_grad():
        model.conv1.weight[:3] = 0
        model.norm2.weight[:5] = model.norm2.bias[:5] = 0
    return compact(model, torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("count", [1, 7])
def test_a_program_computes_the_same_for_every_batch_size(model, exported, count):
    x = torch.randn(count, 3, 8, 8)
    torch.testing.assert_close(torch.export.load(exported / "model.pt2").module()(x), model(x))


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    difference = export(model, torch.randn(2, 3, 8, 8), folder / "model.pt2")
    assert 0 <= difference <= TOLERANCE * 100
    assert [path.name for path in folder.iterdir()] == ["model.pt2"]
    return folder


def test_onnx_computes_the_same_for_every_batch_size(model, tmp_path):
    pytest.importorskip("onnxscript", reason="the extra 'onnx' is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
    assert export(model, torch.randn(2, 3, 8, 8), tmp_path / "network", "onnx") < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["network"]
    session = onnxruntime.InferenceSession(tmp_path / "network", providers=["CPUExecutionProvider"])
    for count in (1, 5):
        x = torch.randn(count, 3, 8, 8)
        (logits,) = session.run(["logits"], {"input": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=1e-4, atol=1e-5)


def test_every_part_keeps_its_mode(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2).eval(), nn.ReLU())
    modes = [part.training for part in model.modules()]
    export(model, torch.randn(4, 3), tmp_path / "model.pt2")
    assert [part.training for part in model.modules()] == modes == [True, True, False, True]


class LooksAtValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else x


def test_a_network_that_cannot_be_exported_is_named(tmp_path):
    with pytest.raises(ValueError, match="LooksAtValues cannot be exported: "):
        export(LooksAtValues(), torch.randn(2, 3), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_a_network_with_gates_is_refused(granularity, tmp_path):
    model = mask_model(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), granularity=granularity)
    with pytest.raises(ValueError, match=r"prune the network first, .*; it has gates at [01]$"):
        export(model, torch.randn(2, 3), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    model = nn.Linear(3, 2)
    (tmp_path / "model.pt2").write_text("what was there")
    other = torch.export.export(nn.Linear(3, 2), (torch.randn(3, 3),))
    monkeypatch.setattr(torch.export, "load", lambda path: other)
    with pytest.raises(ValueError, match="computes something else: outputs differ by up to"):
        export(model.train(), torch.randn(2, 3), tmp_path / "model.pt2")
    assert (tmp_path / "model.pt2").read_text() == "what was there"
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


@pytest.mark.parametrize(
    ("count", "name", "message"),
    [
        (2, "model.tflite", "unknown format 'tflite' for .*; known formats: onnx, pt2"),
        (2, "model", "unknown format '' for"),
        (1, "model.pt2", "at least 2 samples to leave the batch size open, got 1"),
    ],
)
def test_bad_requests(tmp_path, count, name, message):
    with pytest.raises(ValueError, match=message):
        export(nn.Linear(3, 2), torch.randn(count, 3), tmp_path / name)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_without_the_extra(tmp_path, monkeypatch, package):
    for name in ("onnx", "onnxruntime", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None if name == package else sys)
    with pytest.raises(ImportError, match=rf"needs {package}.*: pip install 'ffw_fast\[onnx\]'"):
        export(nn.Linear(3, 2), torch.randn(2, 3), tmp_path / "model.onnx")


def test_onnx_in_a_format_that_it_does_not_know(tmp_path):
    pytest.importorskip("onnxscript", reason="the extra 'onnx' is not installed")
    with pytest.raises(ValueError, match=r"needs float16, float32 or float64, got torch\.bfloat16"):
        export(nn.Linear(3, 2).bfloat16(), torch.randn(2, 3).bfloat16(), tmp_path / "model.onnx")
