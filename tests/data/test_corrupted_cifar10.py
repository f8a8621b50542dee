"""Corrupted CIFAR-10 from small generated folders in its publishers' layout."""

import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="images are decoded by Pillow: pip install 'ffw_fast[images]'")

from PIL import Image

from ffw_fast.data import corrupted_cifar10
from tests.data.image_folders import write_cifar10c


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cifar")
    write_cifar10c(path, "1", align=2, conflict=1, test=3)
    write_cifar10c(path, "0.5", align=1, conflict=1, test=0)
    return path


def test_the_splits_are_the_papers(folder):
    splits = corrupted_cifar10(folder)
    assert [len(part.y) for part in (splits.vanilla, splits.train, splits.val, splits.test)] == [30, 18, 6, 6]
    assert int((splits.vanilla.y == splits.vanilla.b[:, 0]).sum()) == 20
    test = torch.cat([splits.train.y, splits.val.y, splits.test.y])
    assert torch.bincount(test).tolist() == [3] * 10
    assert len(corrupted_cifar10(folder, percent=0.5).vanilla.y) == 20


def test_pixels_and_labels(folder):
    splits = corrupted_cifar10(folder, seed=1)
    mean, deviation = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])
    known = {}
    for path in (folder / "cifar10c" / "test").glob("*/*.png"):
        pixels = torch.frombuffer(bytearray(Image.open(path).tobytes()), dtype=torch.uint8).view(32, 32, 3)
        known[pixels.permute(2, 0, 1).contiguous().numpy().tobytes()] = path
    for index, image in enumerate(splits.train.x.images):
        _, label, bias = known[image.contiguous().numpy().tobytes()].stem.split("_")
        assert (splits.train.y[index].item(), splits.train.b[index].tolist()) == (int(label), [int(bias)])
    expected = (splits.train.x.images[:5] / 255 - mean.view(-1, 1, 1)) / deviation.view(-1, 1, 1)
    torch.testing.assert_close(splits.train.x[:5], expected, rtol=0, atol=1e-5)


def test_the_seed_and_the_sizes_decide(folder):
    first, again, other = (corrupted_cifar10(folder, seed) for seed in (1, 1, 2))
    assert torch.equal(first.train.x.images, again.train.x.images)
    assert not torch.equal(first.train.x.images, other.train.x.images)
    few = corrupted_cifar10(folder, 1, train_size=4, unbiased_size=5)
    assert torch.equal(few.vanilla.x.images, first.vanilla.x.images[:4])
    assert torch.equal(few.train.x.images, first.train.x.images[:5])
    assert torch.equal(few.test.x.images, first.test.x.images)
    for splits in (few, first):
        assert torch.equal(splits.for_heads.x.images, first.train.x.images), "leakage is measured with all of them"
        assert torch.equal(splits.for_heads.b, first.train.b)


def test_images_that_do_not_fit_are_decoded_into_the_folder_named(folder, tmp_path, monkeypatch):
    expected = corrupted_cifar10(folder)
    monkeypatch.setattr("ffw_fast.data.image_files.memory_budget", lambda: 0)
    mapped = corrupted_cifar10(folder, cache_dir=str(tmp_path / "cache"))
    for name in ("vanilla", "train"):
        assert torch.equal(getattr(mapped, name).x.images, getattr(expected, name).x.images)
    assert len(list((tmp_path / "cache").glob("*.uint8"))) == 4


def test_without_a_folder_or_its_files_it_says_where_to_get_them(folder, tmp_path):
    for data_dir, error in ((None, ValueError), (tmp_path, FileNotFoundError)):
        with pytest.raises(error, match="Learning-Debiased-Disentangled"):
            corrupted_cifar10(data_dir)
    with pytest.raises(FileNotFoundError, match=r"2pct: no such folder; percents that are there: 0\.5, 1;"):
        corrupted_cifar10(folder, percent=2)


def test_images_that_are_no_bytes_or_too_large_are_named(folder, tmp_path, monkeypatch):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (image, *_) = (copy / "cifar10c" / "test" / "3").glob("*.png")
    content = image.read_bytes()
    Image.fromarray(np.full((32, 32), 300, dtype=np.uint16)).save(image)
    with pytest.raises(ValueError, match=rf"{image.name} has pixels of more than 8 bits \(I;16\)"):
        corrupted_cifar10(copy)
    image.write_bytes(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"\.png is no image or is truncated: .*decompression bomb"):
        corrupted_cifar10(copy)


def test_damaged_folders(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (image,) = sorted((copy / "cifar10c" / "test" / "3").glob("*.png"))[:1]
    content = image.read_bytes()
    image.write_bytes(content[:200])
    with pytest.raises(ValueError, match=f"{image.name} is no image or is truncated"):
        corrupted_cifar10(copy)
    for name, message in (("x.png", "not of the form"), ("1_4_2.png", "the folder's name"), ("1_3_12.png", "0 to 9")):
        moved = image.rename(image.with_name(name))
        with pytest.raises(ValueError, match=message):
            corrupted_cifar10(copy)
        image = moved
    shutil.rmtree(copy / "cifar10c" / "1pct" / "conflict")
    with pytest.raises(FileNotFoundError, match=r"conflict: found no LABEL/INDEX_LABEL_BIAS\.png"):
        corrupted_cifar10(copy)


@pytest.mark.parametrize(
    "options", [{"percent": 0}, {"percent": float("nan")}, {"train_size": 31}, {"unbiased_size": 19}]
)
def test_bad_options(folder, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        corrupted_cifar10(folder, **options)
