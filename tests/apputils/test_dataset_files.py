import gzip
import os
import pickle
import struct

import numpy as np
import pytest

from distiller.apputils.dataset_files import (
    describe_places,
    find_folder,
    missing_files,
    read_cifar_batch,
    read_idx,
)
from distiller.errors import DatasetError


def idx_bytes(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


def test_idx_file_is_read_as_it_is_and_compressed(tmp_path):
    (tmp_path / "plain").write_bytes(idx_bytes(IMAGES))
    (tmp_path / "packed.gz").write_bytes(gzip.compress(idx_bytes(IMAGES)))
    np.testing.assert_array_equal(read_idx(tmp_path, "plain", 3), IMAGES)
    np.testing.assert_array_equal(read_idx(tmp_path, "packed", 3), IMAGES)


WHOLE = idx_bytes(IMAGES)
PACKED = gzip.compress(WHOLE, mtime=0)  # without the time, which would be another in each worker of the tests
NO_IDX = "not an idx file of unsigned bytes in 3 dimension(s), which starts with 00000803; got "


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (
            b"\x89PNG" + WHOLE,
            NO_IDX + "89504e47",
        ),
        (
            b"",
            NO_IDX + "an empty file",
        ),
        (
            idx_bytes(IMAGES[0]),
            NO_IDX + "00000802",
        ),
        (WHOLE[:9], "truncated within its header of 16 bytes, got 9 bytes"),
        (WHOLE[:-5], "its header promises 24 bytes of data, got 19; delete it and get it again"),
        (WHOLE + b"x", "its header promises 24 bytes of data, got 25; delete it and get it again"),
        (idx_bytes(IMAGES[:0]), "holds no data, its header says 0 x 3 x 4"),
    ],
)
def test_damaged_idx_file_is_refused(tmp_path, content, complaint):
    (tmp_path / "images").write_bytes(content)
    with pytest.raises(DatasetError) as caught:
        read_idx(tmp_path, "images", 3)
    assert str(caught.value) == f"{tmp_path / 'images'}: {complaint}"


@pytest.mark.parametrize(
    "content",
    [b"not gzip at all", PACKED[:-12], PACKED[:12] + b"\xff" * 30],
)
def test_damaged_gzip_file_is_refused(tmp_path, content):
    (tmp_path / "images.gz").write_bytes(content)
    with pytest.raises(DatasetError, match=r"images\.gz: cannot be read: "):
        read_idx(tmp_path, "images", 3)


def test_idx_file_that_is_gone_is_named(tmp_path):
    with pytest.raises(DatasetError) as caught:
        read_idx(tmp_path, "images", 3)
    assert str(caught.value) == f"{tmp_path / 'images'}: no such file, nor with .gz added"


def test_folder_is_found_only_with_all_files(tmp_path):
    first, second, absent = tmp_path / "first", tmp_path / "second", tmp_path / "absent"
    for folder, names in ((first, ["a"]), (second, ["a", "b.gz"])):
        folder.mkdir()
        for name in names:
            (folder / name).touch()
    assert find_folder([absent, first, second], ["a", "b"]) == second
    assert find_folder([absent, first], ["a", "b"]) is None
    assert missing_files(first, ["a", "b"]) == ["b"]
    assert describe_places([absent, first], ["a", "b"]) == f"  {absent}: no such folder\n  {first}: lacks b"


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, as in the CIFAR files."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, content):
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(content)

    dispatch[bytes] = save_bytes


DATA = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)


def test_cifar_file_written_by_python_2_is_read(tmp_path):
    path = tmp_path / "batch"
    with path.open("wb") as file:
        content = {b"data": DATA, b"labels": [4, 0, 9], b"filenames": [b"a.png"] * 3, b"batch_label": b"one"}
        Python2Pickler(file, protocol=2).dump(content)
    path.write_bytes(path.read_bytes().replace(b"numpy._core", b"numpy.core"))
    images, labels = read_cifar_batch(path, "labels")
    np.testing.assert_array_equal(images, DATA.reshape(3, 3, 32, 32))
    assert labels.tolist() == [4, 0, 9]
    assert labels.dtype == np.int64


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("data", [DATA, np.asfortranarray(DATA)], ids=["C", "Fortran"])
def test_cifar_file_written_by_python_3_is_read(tmp_path, protocol, data):
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps({"data": data, "fine_labels": [1, 2, 3]}, protocol=protocol))
    images, labels = read_cifar_batch(path, "fine_labels")
    np.testing.assert_array_equal(images, DATA.reshape(3, 3, 32, 32))
    assert labels.tolist() == [1, 2, 3]


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_cifar_file_is_not_run(tmp_path):
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps({"data": DATA, "labels": Malicious(tmp_path / "harm")}))
    with pytest.raises(DatasetError) as caught:
        read_cifar_batch(path, "labels")
    assert str(caught.value) == f"{path}: holds 'posix.mkdir', which is no plain data; it was not run"
    assert not (tmp_path / "harm").exists()


class OtherEncoding:
    def __reduce__(self):
        import codecs

        return codecs.encode, ("x", "rot13")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([1, 2], "holds a list where a dictionary is wanted"),
        ({"data": DATA}, "has no entry 'labels', got ['data']"),
        ({"data": b"123", "labels": [0]}, "'data' must be a numpy array, got bytes"),
        ({"data": DATA, "labels": "abc"}, "'labels' must be a list of whole numbers"),
        (
            {"data": DATA[:, :10], "labels": [0]},
            "'data' must be uint8 (u1) of shape (count, 3072), got u1 (3, 10)",
        ),
        (
            {"data": DATA.astype(np.float32), "labels": [0]},
            "'data' must be uint8 (u1) of shape (count, 3072), got f4 (3, 3072)",
        ),
        (OtherEncoding(), "holds bytes encoded as 'rot13', which is no plain data"),
    ],
)
def test_cifar_file_with_other_content_is_refused(tmp_path, content, complaint):
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps(content, protocol=4))
    with pytest.raises(DatasetError) as caught:
        read_cifar_batch(path, "labels")
    assert str(caught.value) == f"{path}: {complaint}"


def test_array_that_promises_more_than_it_holds_is_refused(tmp_path):
    path = tmp_path / "batch"
    content = pickle.dumps({"data": DATA, "labels": [0]}, protocol=4)
    path.write_bytes(content.replace(b"K\x03M\x00\x0c\x86", b"K\x04M\x00\x0c\x86"))  # (3, 3072) -> (4, 3072)
    with pytest.raises(DatasetError) as caught:
        read_cifar_batch(path, "labels")
    assert str(caught.value) == f"{path}: 'data' promises 4 rows of 3072 bytes, got 9216 bytes"


@pytest.mark.parametrize("content", [b"", b"\x00\x01 no pickle", pickle.dumps({"data": DATA})[:-700]])
def test_damaged_pickle_is_refused(tmp_path, content):
    path = tmp_path / "batch"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match="batch: not a readable pickle "):
        read_cifar_batch(path, "labels")


def test_missing_pickle_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="cannot be read: "):
        read_cifar_batch(tmp_path / "batch", "labels")
