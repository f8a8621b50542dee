"""CelebA and Corrupted CIFAR-10 through the command line, on small generated folders."""

import json

import pytest

pytest.importorskip("PIL", reason="images are decoded by Pillow: pip install 'ffw_fast[images]'")

from ffw_fast.cli import main
from ffw_fast.data import image_files
from ffw_fast.runs import biased_network
from tests.data.image_folders import write_celeba, write_cifar10c

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = ["--vanilla-epochs", "1", "--max-epochs", "1", "--batch-size", "8", "--quiet"]


def test_celeba_runs_to_its_end(tmp_path, capsys):
    write_celeba(tmp_path, {0: [5, 6, 4, 1], 1: [6, 7, 8, 5], 2: [3, 2, 4, 3]})
    out = tmp_path / "out"
    arguments = ["run", "celeba", "--data-dir", str(tmp_path), "--image-size", "64", "--out", str(out), *SHORT]
    assert main(arguments) == 0
    metrics, config = (json.loads((out / name).read_text()) for name in ("metrics.json", "config.json"))
    assert config["samples"] == {"vanilla": 16, "train": 12, "val": 8, "test": 8}
    assert config["vanilla_recipe"]["schedule"] == "plateau"
    assert len(metrics["pruned"]["bias_accuracy"]) == 1
    assert 0 < metrics["pruned"]["sparsity"] < 1
    assert "gender" in capsys.readouterr().out


def test_a_trained_network_needs_no_images_of_the_biased_set_but_a_few(tmp_path, monkeypatch):
    """A few tell whether it was trained on these."""
    write_celeba(tmp_path, {0: [5, 6, 4, 1], 1: [6, 7, 8, 5], 2: [3, 2, 4, 3]})
    arguments = ["run", "celeba", "--data-dir", str(tmp_path), "--image-size", "32", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(biased_network, "FINGERPRINT_SAMPLES", 2)
    decoded = []
    decode = image_files._decode
    monkeypatch.setattr(image_files, "_decode", lambda path, side: decoded.append(path) or decode(path, side))
    unbiased = 12 + 8 + 8
    for images in (16 + 2, 2):
        decoded.clear()
        assert main([*arguments, *SHORT]) == 0
        assert len(decoded) == unbiased + images


def test_corrupted_cifar10_runs_to_its_end_and_resumes(tmp_path, capsys):
    write_cifar10c(tmp_path, "5", align=2, conflict=1, test=2)
    out = tmp_path / "out"
    arguments = ["run", "corrupted-cifar10", "--data-dir", str(tmp_path), "--percent", "5", "--out", str(out), *SHORT]
    assert main(arguments) == 0
    first = json.loads((out / "metrics.json").read_text())
    assert main([*arguments[:-7], *SHORT[2:], "--resume"]) == 2
    assert "vanilla_recipe" in capsys.readouterr().err, "other epochs of the biased network"
    arguments[arguments.index("--max-epochs") + 1] = "2"
    assert main([*arguments, "--resume"]) == 0
    second = json.loads((out / "metrics.json").read_text())
    assert (first["epochs"], second["epochs"]) == (1, 2)
    assert first["vanilla"] == second["vanilla"]


@pytest.mark.parametrize("workload", ["celeba", "corrupted-cifar10"])
def test_the_folder_is_asked_for(workload, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["run", workload])
    assert "--data-dir" in capsys.readouterr().err
    assert main(["run", workload, "--data-dir", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "page is https://" in capsys.readouterr().err
