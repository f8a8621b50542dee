"""CelebA from small generated folders in its publishers' layout."""

import errno
import os
import re
import shutil
import stat

import pytest
import torch

pytest.importorskip("PIL", reason="images are decoded by Pillow: pip install 'ffw_fast[images]'")

from PIL import Image

from ffw_fast.data import celeba
from tests.data.image_folders import write_celeba

COUNTS = {0: [5, 6, 4, 1], 1: [6, 7, 8, 5], 2: [3, 2, 4, 3]}
SMALL = {"image_size": 32}


@pytest.fixture(scope="module", params=["txt", "csv"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    write_celeba(path, COUNTS, request.param)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    """A folder that may be damaged."""
    return shutil.copytree(folder, tmp_path / "copy")


def test_the_splits_are_the_papers(folder):
    splits = celeba(folder, **SMALL)
    assert [len(part.y) for part in (splits.vanilla, splits.train, splits.val, splits.test)] == [16, 12, 8, 8]
    for unbiased, each in ((torch.cat([splits.train.y, splits.val.y]), 5), (splits.test.y, 2)):
        biases = torch.cat([splits.train.b, splits.val.b]) if each == 5 else splits.test.b
        assert torch.bincount(2 * unbiased + biases[:, 0]).tolist() == [each] * 4
    assert splits.vanilla.x.shape == (16, 3, 32, 32)


def test_blond_women_are_aligned(folder):
    vanilla = celeba(folder, **SMALL).vanilla
    groups = torch.bincount(2 * vanilla.y + vanilla.b[:, 0], minlength=4).tolist()
    assert groups == [6, 5, 1, 4], "not blond man, not blond woman, blond man, blond woman"


def test_pixels_are_resized_and_normalised_as_by_torchvision(folder):
    splits = celeba(folder, seed=3, **SMALL)
    paths = sorted((folder / "celeba" / "img_align_celeba").iterdir())
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = []
    for path in paths:
        image = Image.open(path).resize((32, 32), Image.Resampling.BILINEAR)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(32, 32, 3)
        expected.append(((pixels / 255 - mean) / deviation).permute(2, 0, 1))
    given = splits.vanilla.x[:4]
    distances = [min((image - other).abs().max().item() for other in expected) for image in given]
    assert max(distances) < 1e-5


def test_the_seed_decides(folder):
    first, again, other = (celeba(folder, seed=seed, **SMALL) for seed in (1, 1, 2))
    assert torch.equal(first.train.x.images, again.train.x.images)
    assert not torch.equal(first.train.x.images, other.train.x.images)
    few, others = (celeba(folder, seed=seed, train_size=3, **SMALL) for seed in (1, 2))
    assert not torch.equal(few.vanilla.x.images, others.vanilla.x.images)
    assert torch.equal(few.test.x.images, first.test.x.images)


def test_all_seeds_share_the_decoded_images_of_the_vanilla_set(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("ffw_fast.data.image_files.memory_budget", lambda: 0)
    first, second = (celeba(folder, seed=seed, cache_dir=str(tmp_path / "cache"), **SMALL) for seed in (1, 2))
    first.vanilla.x.decode()
    monkeypatch.setattr("ffw_fast.data.image_files._decode", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(first.vanilla.x.images, second.vanilla.x.images)
    assert torch.equal(first.vanilla.y, second.vanilla.y)


def test_images_that_do_not_fit_are_decoded_once_into_a_file(folder, tmp_path, monkeypatch):
    expected = celeba(folder, **SMALL)
    monkeypatch.setattr("ffw_fast.data.image_files.memory_budget", lambda: 0)
    arguments = {**SMALL, "cache_dir": str(tmp_path / "cache")}
    mapped = celeba(folder, **arguments)
    assert mapped.vanilla.x.mapped
    for name in ("vanilla", "train", "val", "test"):
        assert torch.equal(getattr(mapped, name).x.images, getattr(expected, name).x.images)
    files = sorted((tmp_path / "cache").glob("*.uint8"))
    assert sum(file.stat().st_size for file in files) == (16 + 12 + 8 + 8) * 3 * 32 * 32

    monkeypatch.setattr("ffw_fast.data.image_files._decode", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(celeba(folder, **arguments).vanilla.x.images, expected.vanilla.x.images)
    monkeypatch.undo()
    monkeypatch.setattr("ffw_fast.data.image_files.memory_budget", lambda: 0)
    with files[0].open("r+b") as file:  # a damaged file is made anew
        file.seek(1000)
        file.write(b"\0\1\2\3\4\5")
    again = celeba(folder, **arguments)
    assert torch.equal(again.vanilla.x.images, expected.vanilla.x.images)
    assert torch.equal(again.train.x.images, expected.train.x.images)


def test_a_cache_without_room_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("ffw_fast.data.image_files.memory_budget", lambda: 0)

    def fill(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", fill)
    with pytest.raises(OSError, match=r"36.9 kB decoded, more than fits .* no room for them \(No space .*--cache-dir"):
        celeba(folder, cache_dir=str(tmp_path), **SMALL)
    assert not list(tmp_path.glob("*.tmp"))


def test_what_a_killed_process_left_does_not_stay(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("ffw_fast.data.image_files.memory_budget", lambda: 0)
    assert celeba(folder, cache_dir=str(tmp_path), **SMALL).vanilla.x.mapped
    for file in tmp_path.glob("*.uint8"):
        leftover = file.rename(file.with_suffix(".tmp"))
        leftover.write_bytes(leftover.read_bytes() + b"of another size")
    expected = celeba(folder, cache_dir=str(tmp_path), **SMALL)
    assert expected.vanilla.x.mapped
    monkeypatch.setattr("ffw_fast.data.image_files._decode", lambda *_: pytest.fail("decoded again"))
    again = celeba(folder, cache_dir=str(tmp_path), **SMALL)
    assert torch.equal(again.vanilla.x.images, expected.vanilla.x.images)
    assert {path.suffix for path in tmp_path.iterdir()} == {".uint8", ".json", ".lock"}


def test_a_whole_cache_may_be_shared_and_only_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("ffw_fast.data.image_files.memory_budget", lambda: 0)
    before = os.umask(0o022)
    expected = celeba(folder, cache_dir=str(tmp_path), **SMALL)
    assert expected.vanilla.x.mapped
    os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o644}

    def refuse(*_arguments, **_options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    again = celeba(folder, cache_dir=str(tmp_path), **SMALL)
    assert torch.equal(again.vanilla.x.images, expected.vanilla.x.images)
    with pytest.raises(PermissionError, match=r"cannot be written: name another folder as cache_dir"):
        celeba(folder, cache_dir=str(tmp_path / "other"), **SMALL)


def test_without_a_folder_or_its_files_it_says_where_to_get_them(tmp_path):
    for data_dir, error in ((None, ValueError), (tmp_path, FileNotFoundError)):
        with pytest.raises(error, match=r"mmlab\.ie\.cuhk\.edu\.hk/projects/CelebA"):
            celeba(data_dir)


def test_missing_images(copy):
    images = copy / "celeba" / "img_align_celeba"
    for name in ("000002.jpg", "000005.jpg"):
        (images / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of 16 images are missing, the first is .*jpg"):
        celeba(copy, **SMALL)
    shutil.rmtree(images)
    with pytest.raises(FileNotFoundError, match="16 of 16 images are missing"):
        celeba(copy, **SMALL)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_damaged_images(copy, damage):
    """Of an unbiased set one is found at once; of the biased one when it is read, which it may never be."""
    (listing,) = (copy / "celeba").glob("list_eval_partition.*")
    lines = [line.replace(",", " ").split() for line in listing.read_text().splitlines()]

    def spoil(part: str) -> None:
        for name in [line[0] for line in lines if line[1:] == [part]]:
            path = copy / "celeba" / "img_align_celeba" / name
            path.write_bytes({"truncated": path.read_bytes()[:300], "text": b"not an image", "empty": b""}[damage])

    spoil("0")
    splits = celeba(copy, **SMALL)
    with pytest.raises(ValueError, match=r"\d.jpg is no image or is truncated"):
        splits.vanilla.x[:1]
    spoil("1")
    with pytest.raises(ValueError, match=r"\d.jpg is no image or is truncated"):
        celeba(copy, **SMALL)


def edit(copy, name: str, change) -> None:
    (path,) = (copy / "celeba").glob(f"{name}.*")
    path.write_text(change(path.read_text()))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("list_attr_celeba", lambda text: text.replace("Blond_Hair", "Grey_Hair"), "has no attribute Blond_Hair"),
        ("list_attr_celeba", lambda text: text.replace("-1", "no", 1), "row 1 of the images holds no whole numbers"),
        ("list_attr_celeba", lambda text: text.rsplit("\n", 2)[0], "list other images: 53 and 54|announces 54 images"),
        ("list_attr_celeba", lambda text: text + text.splitlines()[-1] + "\n", "row 55 .* lists 000054.jpg again"),
        ("list_eval_partition", lambda text: re.sub(r"[ ,]\w+$", "", text, flags=re.M), "or names alone|has 0"),
        ("list_attr_celeba", lambda text: "", "list_attr_celeba.* lists no images|has no attribute"),
        ("list_eval_partition", lambda text: text[:-2] + "7\n", "must number splits 0, 1 and 2"),
        ("list_eval_partition", lambda text: text.replace("2\n", "0\n"), "test split has no image of some group"),
    ],
)
def test_damaged_lists(copy, name, change, message):
    edit(copy, name, change)
    with pytest.raises(ValueError, match=message):
        celeba(copy, **SMALL)


def test_a_byte_order_mark_is_no_part_of_a_name(copy):
    expected = celeba(copy, **SMALL)
    for name in ("list_attr_celeba", "list_eval_partition"):
        edit(copy, name, lambda text: "\ufeff" + text)
    assert torch.equal(celeba(copy, **SMALL).train.x.images, expected.train.x.images)


@pytest.mark.parametrize("options", [{"image_size": 31}, {"image_size": 225}, {"train_size": 17}, {"train_size": 0}])
def test_bad_options(folder, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        celeba(folder, **{**SMALL, **options})
