import gzip
import hashlib
import struct

import pytest
import torch
import torchvision.transforms.v2.functional as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from course_utils import data, files

SIZES = {"train": 55_000, "calibration": 1_000, "validation": 4_000, "test": 10_000}


def idx(name):
    """Read one of the committed idx files without torchvision, by the format's description."""
    content = gzip.decompress((files.data_dir() / data.FOLDER / f"{name}.gz").read_bytes())
    dimensions = content[3]
    shape = struct.unpack(f">{dimensions}I", content[4 : 4 + 4 * dimensions])
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=4 + 4 * dimensions).reshape(shape)


@pytest.fixture(scope="module")
def splits():
    return {split: data.fashion_mnist(split) for split in SIZES}


@pytest.mark.parametrize("split", SIZES)
def test_every_split_has_its_size_and_equal_classes(splits, split):
    assert len(splits[split]) == SIZES[split]
    assert splits[split].labels.bincount().tolist() == [SIZES[split] // 10] * 10


def test_train_calibration_and_validation_part_the_official_training_set(splits):
    def rows(pixels, labels):
        images = zip(pixels, labels, strict=True)
        return sorted(hashlib.md5(image.numpy().tobytes() + bytes([label])).digest() for image, label in images)

    parts = [splits[split] for split in ("train", "calibration", "validation")]
    found = rows(torch.cat([p.pixels for p in parts]), torch.cat([p.labels for p in parts]))
    assert found == rows(idx("train-images-idx3-ubyte"), idx("train-labels-idx1-ubyte"))


def test_no_position_of_the_official_training_set_is_in_two_splits():
    _, labels = data._official("train")
    masks = data._split_indices(labels)
    assert torch.equal(sum(mask.int() for mask in masks.values()), torch.ones(60_000, dtype=torch.int32))


def test_the_test_split_is_the_official_one_in_file_order(splits):
    assert torch.equal(splits["test"].pixels, idx("t10k-images-idx3-ubyte"))
    assert torch.equal(splits["test"].labels, idx("t10k-labels-idx1-ubyte").long())


def test_mean_and_std_are_those_of_the_official_training_images():
    pixels = idx("train-images-idx3-ubyte").double() / 255
    assert float(pixels.mean()) == pytest.approx(data.MEAN, abs=5e-5)
    assert float(pixels.std()) == pytest.approx(data.STD, abs=5e-5)


def test_batches_are_ready_for_a_model():
    images, labels = next(iter(data.batches(data.fashion_mnist("test"), 5)))
    assert images.shape == (5, 3, 64, 64) and images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64 and torch.equal(labels, data.fashion_mnist("test").labels[:5])


@settings(max_examples=30)
@given(batch_size=st.integers(1, 12), limit=st.none() | st.integers(0, 30), n=st.integers(1, 20))
def test_batches_give_every_image_once_in_order_up_to_the_limit(batch_size, limit, n):
    some = data.fashion_mnist("test", size=8).subset(slice(n))
    found = list(data.batches(some, batch_size, limit=limit))
    expected = n if limit is None else min(n, limit)
    assert [len(labels) for _, labels in found[:-1]] == [batch_size] * (len(found) - 1)
    assert sum(len(labels) for _, labels in found) == expected
    if expected:
        images, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        assert torch.equal(images, data.preprocess(some.pixels[:expected], 8))
        assert torch.equal(labels, some.labels[:expected])


@pytest.mark.parametrize("size", [28, 32, 64, 224, 20])
def test_preprocess_does_what_torchvision_does_to_one_image(size):
    pixels = data.fashion_mnist("test").pixels[7]
    expected = reference.to_dtype(pixels[None], torch.float32, scale=True)
    expected = reference.normalize(expected, [data.MEAN], [data.STD])
    expected = reference.resize(expected, [size, size], antialias=False).repeat(3, 1, 1)
    torch.testing.assert_close(data.preprocess(pixels[None], size)[0], expected, rtol=0, atol=1e-5)


def test_preprocess_leaves_the_pixels_alone():
    pixels = data.fashion_mnist("test").pixels[:2]
    before = pixels.clone()
    data.preprocess(pixels, 28)
    assert torch.equal(pixels, before)


def test_one_item_is_one_row_of_a_batch():
    some = data.fashion_mnist("validation", size=32)
    images, labels = next(iter(data.batches(some, 3)))
    image, label = some[2]
    assert torch.equal(image, images[2]) and label == int(labels[2]) and isinstance(label, int)


@pytest.mark.parametrize("size", [0, -1, 2.5, "64"])
def test_a_size_that_is_no_number_of_pixels_is_refused(size):
    with pytest.raises(ValueError, match="size"):
        data.fashion_mnist("test", size=size)


def test_an_unknown_split_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'dev'.*train, calibration, validation, test"):
        data.fashion_mnist("dev")


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(ValueError, match="batch_size"):
        list(data.batches(data.fashion_mnist("test"), 0))


def test_a_truncated_file_is_one_clear_error(tiny_data):
    path = tiny_data / data.FOLDER / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(files.DataFileError, match="t10k-images-idx3-ubyte.gz.*expected.*git checkout"):
        data.fashion_mnist("test")


def test_an_altered_file_is_one_clear_error(tiny_data):
    path = tiny_data / data.FOLDER / "train-labels-idx1-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(files.DataFileError, match="train-labels-idx1-ubyte.gz was altered"):
        data.fashion_mnist("train")


def test_a_damaged_unpacked_file_heals_itself(tiny_data):
    expected = data.fashion_mnist("test").pixels
    unpacked = tiny_data / data.FOLDER / "t10k-images-idx3-ubyte"
    whole = unpacked.read_bytes()
    for damaged in (whole[:100], whole[:-1] + bytes([whole[-1] ^ 1])):
        unpacked.write_bytes(damaged)
        data._splits.cache_clear()
        assert torch.equal(data.fashion_mnist("test").pixels, expected)
        assert unpacked.read_bytes() == whole


def test_a_read_only_folder_is_unpacked_in_the_cache_of_the_user(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    writable = files.is_writable
    monkeypatch.setattr(files, "is_writable", lambda folder: tiny_data not in folder.parents and writable(folder))
    assert len(data.fashion_mnist("test")) == 20
    unpacked = tmp_path / "cache" / "squeeze-and-speed-up" / data.FOLDER
    assert {path.name for path in unpacked.iterdir()} == set(data.IDX_FILES)
    assert all(path.suffix == ".gz" for path in (tiny_data / data.FOLDER).iterdir())


def test_the_splits_of_other_data_with_the_same_names_do_not_overlap(tiny_data):
    sizes = {split: len(data.fashion_mnist(split)) for split in data.SPLITS}
    assert sizes == {"train": 60, "calibration": 20, "validation": 40, "test": 20}
