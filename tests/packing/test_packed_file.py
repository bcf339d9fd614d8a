from __future__ import annotations

import json
import os
import struct
import tracemalloc
import zlib
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch

from distiller.errors import CheckpointError, UsageError
from distiller.packing import is_packed, pack_tensors, packed_tensors, unpack_tensors
from distiller.packing.header import MAGIC
from distiller.packing.tensors import patterns_of
from tests.packing import slow_reader
from tests.packing.networks import normal, pruned, rounded, shared, shared_by_rows


def network() -> dict[str, torch.Tensor]:
    """One tensor in each encoding that there is, and of many types."""
    values = shared((60, 90), 16)
    codes = torch.unique(values, return_inverse=True)[1].byte()
    return {
        "conv.weight": normal(6, 3, 3, 3),
        "conv.bias": normal(6),
        "bn.num_batches_tracked": torch.tensor(7),
        "pruned.weight": pruned(normal(3600), 0.9),
        "columns.weight": torch.where(torch.arange(200) < 30, normal(50, 200), 0),
        "shared.weight": values,
        "shared.codes": codes,
        "again.weight": values.clone(),
        "grid.weight": rounded(normal(40, 90), 8, False),
        "rows.weight": rounded(normal(40, 90), 4, True),
        "books.weight": shared_by_rows(40, 90, 4),
        "long.weight": pruned(shared((100, 500), 16), 0.5),
        "half": normal(30, 30).half(),
        "brain": normal(30, 30).bfloat16(),
        "wide": normal(9, 9).double(),
        "complex": torch.view_as_complex(normal(9, 8, 2)),
        "flag": torch.tensor([True, False] * 40),
        "nothing": torch.zeros(0, 3),
        "zeros": torch.zeros(300, 300),
        "odd": torch.tensor([-0.0, float("nan"), float("-inf"), 1e-45]),
    }


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and np.array_equal(patterns_of(one), patterns_of(other))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("packed") / "net.dsz"
    structure = {"arch": "net", "shape": (1, 3), 5: [float("inf"), torch.arange(3)], "tied": torch.arange(3)}
    pack_tensors(network(), path, structure)
    return path


def test_all_bits_and_the_structure_come_back(whole):
    torch.manual_seed(1)
    packed = unpack_tensors(whole)
    expected = network()
    assert list(packed.tensors) == list(expected)
    assert all(same_bits(packed.tensors[name], tensor) for name, tensor in expected.items())
    structure = packed.structure
    assert structure["shape"] == (1, 3)
    assert structure[5][0] == float("inf")
    assert structure[5][1].tolist() == structure["tied"].tolist() == [0, 1, 2]
    assert {tensor.encoding for tensor in packed.report.tensors} == {
        "dense/planes", "dense/raw", "sparse/planes", "columns/planes", "dense/codebook", "map", "same", "dense/grid",
        "dense/rowgrid", "dense/rowcodebook", "sparse/raw",
    }  # fmt: skip


def test_a_reader_written_from_the_document_reads_the_same(whole):
    slow, packed = slow_reader.read(whole.read_bytes()), unpack_tensors(whole)
    assert list(slow.tensors) == list(packed.tensors)
    for name, (dtype, shape, patterns) in slow.tensors.items():
        tensor = packed.tensors[name]
        assert (f"torch.{dtype}", tuple(shape)) == (str(tensor.dtype), tuple(tensor.shape))
        assert patterns == patterns_of(tensor).tolist(), name
    assert [entry[2] for entry in slow.others] == [[0, 1, 2]] * 2


def test_one_after_the_other_is_the_same(whole):
    tensors = dict(packed_tensors(whole))
    assert all(same_bits(tensors[name], tensor) for name, tensor in unpack_tensors(whole).tensors.items())


def test_the_report_adds_up_to_the_bytes_on_disk(tmp_path):
    tensors = {"a.weight": shared((100, 100), 4), "b": normal(10)}
    report = pack_tensors(tensors, tmp_path / "x.dsz")
    size = (tmp_path / "x.dsz").stat().st_size
    assert report.bytes == size == report.header_bytes + sum(tensor.bytes for tensor in report.tensors)
    assert report.original_bytes == 4 * 10_010
    assert report.compression_rate == 40_040 / size
    assert report.to_text().splitlines()[-1] == (
        f"packed file {tmp_path / 'x.dsz'}: {size:,} bytes; compression rate 40,040 / {size:,} = {40_040 / size:.2f}x"
    )
    assert report.tensors[0].bits_per_element == 8 * report.tensors[0].bytes / 10_000
    assert unpack_tensors(tmp_path / "x.dsz").report == report
    assert pack_tensors(tensors, tmp_path / "x.dsz", original_bytes=10**6).compression_rate == 10**6 / size


def test_tied_tensors_are_stored_and_counted_once(tmp_path):
    weight = normal(50, 60)
    report = pack_tensors({"encoder": weight, "decoder": weight, "equal": weight.clone()}, tmp_path / "x.dsz")
    assert [tensor.encoding for tensor in report.tensors] == ["dense/planes", "same", "same"]
    assert report.tensors[1].bytes == 5
    assert report.original_bytes == 2 * 4 * 3000
    packed = unpack_tensors(tmp_path / "x.dsz").tensors
    assert packed["decoder"] is packed["encoder"]


def test_the_same_tensors_make_the_same_bytes(tmp_path, whole):
    torch.manual_seed(1)
    pack_tensors(network(), tmp_path / "x.dsz", unpack_tensors(whole).structure)
    assert (tmp_path / "x.dsz").read_bytes() == whole.read_bytes()


def test_tensors_are_asked_for_one_at_a_time(tmp_path):
    class Lazy(dict):
        def __getitem__(self, name):
            return torch.full((20_000,), float(name[1:])) + torch.arange(20_000) % 3

    def peak(count: int) -> int:
        tensors = Lazy((f"t{i}", None) for i in range(count))
        tracemalloc.start()
        pack_tensors(tensors, tmp_path / "x.dsz")
        for name, tensor in packed_tensors(tmp_path / "x.dsz"):
            assert same_bits(tensor, tensors[name])
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(1)
    assert peak(12) < 1.3 * peak(2)


# What is damaged.


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "small.dsz"
    torch.manual_seed(2)
    pack_tensors(
        {"fc.weight": pruned(shared((20, 30), 4), 0.6), "fc.bias": normal(5), "n": torch.tensor(3)},
        path,
        {"a": (1,)},
    )
    return path.read_bytes()


def refusal(data: bytes, path: Path) -> str:
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        unpack_tensors(path)
    told = str(error.value)
    assert told.startswith(f"{path}: ")
    return told.removeprefix(f"{path}: ")


def places(data: bytes) -> list[tuple[str, int]]:
    """What is in a file, with the place where it ends."""
    stored = struct.unpack("<I", data[12:16])[0]
    text = zlib.decompress(data[20 : 20 + stored])
    place, found = 24 + stored, [("header", 24 + stored)]
    for name, _, _, _, length in json.loads(text)["tensors"]:
        place += length + 4
        found.append((f"tensor '{name}'", place))
    return [*found, ("digest", len(data))]


def test_each_flipped_byte_is_found_and_what_it_is_in_is_named(small, tmp_path):
    parts = places(small)
    for place in range(len(small)):
        for flip in (0xFF, 0x01):
            broken = bytearray(small)
            broken[place] ^= flip
            told = refusal(bytes(broken), tmp_path / "x.dsz")
            where = next(name for name, end in parts if place < end)
            if place < 8:
                assert told.startswith("is not a packed file: starts with b'")
            else:
                assert where in told, (place, told)


def test_a_file_that_is_cut_off_anywhere_is_refused_by_name(small, tmp_path):
    parts = places(small)
    for size in range(1, len(small)):
        told = refusal(small[:size], tmp_path / "x.dsz")
        where = next(name for name, end in parts if size < end)
        assert told.startswith("is cut off in "), told
        assert where in told, (size, told)
    assert refusal(b"", tmp_path / "x.dsz") == "is empty; use another copy of the file"
    assert refusal(small + b"\0", tmp_path / "x.dsz") == (
        f"has 1 bytes after its end, at byte {len(small):,}; use another copy of the file"
    )


def test_what_is_told_of_damage(small, tmp_path):
    path = tmp_path / "x.dsz"
    end = dict(places(small))["header"]
    flipped = bytearray(small)
    flipped[end + 2] ^= 1
    assert refusal(bytes(flipped), path) == (
        "tensor 'fc.weight' is damaged: its checksum is wrong; use another copy of the file"
    )
    flipped = bytearray(small)
    flipped[30] ^= 1
    assert (
        refusal(bytes(flipped), path)
        == "header is damaged: its checksum is wrong; use another copy of the file"
    )
    flipped = bytearray(small)
    flipped[8] = 2
    assert refusal(bytes(flipped), path) == (
        "header has version 2, this library reads 1; use the library's version that wrote it, or another copy of the "
        "file if that was this one"
    )
    flipped = bytearray(small)
    flipped[-1] ^= 1
    assert refusal(bytes(flipped), path) == (
        "is damaged: the digest of header and tensors is wrong; use another copy of the file"
    )
    assert refusal(small[: end + 9], path) == (
        f"is cut off in tensor 'fc.weight': has {end + 9:,} of {len(small):,} bytes; use another copy of the file"
    )
    assert refusal(b"PK\3\4" * 9, path) == (
        "is not a packed file: starts with b'PK\\x03\\x04PK\\x03\\x04'; give a file that --pack wrote"
    )


# What is forged: all checksums are right.


def forged(header: object, *sections: bytes, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    stored = zlib.compress(text)
    body = struct.pack("<III", 1, len(stored), len(text) if size is None else size) + stored
    data = MAGIC + body + struct.pack("<I", zlib.crc32(body))
    data += b"".join(section + struct.pack("<I", zlib.crc32(section)) for section in sections)
    return data + blake2b(data, digest_size=16).digest()


def of(*rows: list, structure: object = None) -> dict:
    return {"structure": structure, "tensors": list(rows), "others": []}


MALFORMED = "header is malformed: "
COPY = "; use another copy of the file"
LIKE = "is malformed: "


@pytest.mark.parametrize(
    "data, told",
    [
        (forged(b"{"), MALFORMED),
        (forged(b"\xff\xfe"), MALFORMED),
        (forged(b"[" * 100_000), MALFORMED),
        (forged(b'{"structure": NaN, "tensors": [], "others": []}'), MALFORMED + "has NaN, which JSON does not have" + COPY),
        (forged([]), MALFORMED + "must have 'structure', 'tensors' and 'others'" + COPY),
        (forged({"structure": 1, "tensors": 1, "others": []}), MALFORMED + "'tensors' must be a list" + COPY),
        (forged(of(), size=2**31), MALFORMED + "would have 2,147,483,648 bytes" + COPY),
        (forged(of(), size=9), MALFORMED + "has not the 9 bytes that it should have" + COPY),
        (forged(of(["a", "float32", [1], "dense/raw"])), MALFORMED + "'tensors[0]' must be name, type, shape, encoding and length" + COPY),
        (forged(of(["a", "float31", [1], "dense/raw", 4])), MALFORMED + "tensor 'a' has the unknown type 'float31'; did you mean 'float32'?" + COPY),
        (forged(of(["a", "float32", [-1], "dense/raw", 4])), MALFORMED + "tensor 'a' has the impossible shape [-1]" + COPY),
        (forged(of(["a", "float32", [2**30, 2**30], "dense/raw", 4])), MALFORMED + "tensor 'a' has the impossible shape [1073741824, 1073741824]" + COPY),
        (forged(of(["a", "float32", [1.5], "dense/raw", 4])), MALFORMED + "tensor 'a' has the impossible shape [1.5]" + COPY),
        (forged(of(["a", "float32", [1], "dense/lzma", 4])), MALFORMED + "tensor 'a' has the unknown encoding 'dense/lzma'; a later version may know it" + COPY),
        (forged(of(["a", "float32", [1], "dense/raw", -4])), MALFORMED + "tensor 'a' has the impossible length -4" + COPY),
        (forged(of(["a", "float32", [2**38], "sparse/raw", 1]), b"\0"),
         MALFORMED + "tensor 'a' of shape [274877906944] cannot be in 1 bytes, the least for its 1,099,511,627,776 bytes is 16,777,216" + COPY),
        (forged(of(["a", "float32", [1], "dense/raw", 4], ["a", "float32", [1], "dense/raw", 4]), b"abcd", b"abcd"),
         MALFORMED + "has two tensors of one name" + COPY),
        (forged(of(["a", "float32", [1], "dense/raw", 2**60])), "is cut off in tensor 'a': has "),
        (forged(of(structure={"$what": 1})), MALFORMED + "'structure': '$what' is unknown, or holds something else" + COPY),
        (forged(of(structure={"$tensor": 3})), MALFORMED + "'structure': "),
        (forged(of(["a", "float32", [2], "dense/raw", 4]), b"abcd"), "tensor 'a' " + LIKE + "asks for 8 bytes where 4 are left" + COPY),
        (forged(of(["a", "float32", [1], "dense/raw", 5]), b"abcde"), "tensor 'a' " + LIKE + "has bytes left over after byte 4" + COPY),
        (forged(of(["a", "bool", [1], "dense/raw", 1]), b"\2"), "tensor 'a' " + LIKE + "has the truth value 2" + COPY),
        (forged(of(["a", "float32", [1], "same", 1]), b"\0"), "tensor 'a' " + LIKE + "refers to tensor 0, which it cannot" + COPY),
        (forged(of(["a", "int8", [1], "dense/raw", 1], ["b", "float32", [1], "same", 1]), b"a", b"\0"),
         "tensor 'b' " + LIKE + "refers to tensor 0, which it cannot" + COPY),
        (forged(of(["a", "int8", [1], "dense/raw", 1], ["b", "int8", [1], "same", 1], ["c", "int8", [1], "same", 1]), b"a", b"\0", b"\1"),
         "tensor 'c' " + LIKE + "refers to tensor 1, which it cannot" + COPY),
        (forged(of(["a", "int8", [2], "dense/raw", 2], ["b", "int8", [1], "map", 3]), b"ab", b"\0\1\1"),
         "tensor 'b' " + LIKE + "refers to tensor 0, which it cannot" + COPY),
        (forged(of(["a", "float32", [4], "sparse/raw", 1]), b"\5"), "tensor 'a' " + LIKE + "has the number 5 where less than 5 is possible" + COPY),
        (forged(of(["a", "float32", [10**6], "dense/codebook", 400]), b"\xff\xff\3" + bytes(397)), "tensor 'a' " + LIKE + "asks for 262144 bytes where 397 are left" + COPY),
    ],
)  # fmt: skip
def test_a_forged_file_is_refused_and_takes_no_memory(data, told, tmp_path):
    tracemalloc.start()
    found = refusal(data, tmp_path / "x.dsz")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == told or (not told.endswith(COPY) and found.startswith(told))
    assert peak < 20 * 10**6


def test_a_large_tensor_of_one_value_is_as_large_as_a_65536th(tmp_path):
    report = pack_tensors({"a": torch.zeros(1000, 1000)}, tmp_path / "x.dsz")
    assert report.tensors[0].bytes == 62 + 4  # 4,000,000 / 65,536
    assert not unpack_tensors(tmp_path / "x.dsz").tensors["a"].any()


# What cannot be read or written.


def test_a_path_that_is_no_packed_file(tmp_path):
    for path, told in (
        (tmp_path, "is a folder; name the packed file in it"),
        (tmp_path / "no", "cannot be read: No such file or directory"),
    ):
        with pytest.raises(CheckpointError) as error:
            unpack_tensors(path)
        assert str(error.value) == f"{path}: {told}"
        assert not is_packed(path)


def test_a_path_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    for path, told in (
        (tmp_path / "folder", "Is a directory"),
        (tmp_path / "no/x.dsz", "No such file or directory"),
    ):
        with pytest.raises(CheckpointError) as error:
            pack_tensors({}, path)
        assert str(error.value) == f"{path}: cannot be written: {told}; make room, or choose another folder"
    before = tmp_path / "x.dsz"
    pack_tensors({"a": normal(3)}, before)
    content = before.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device; make room"):
        pack_tensors({"a": normal(4)}, before)
    assert before.read_bytes() == content
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "x.dsz"}


@pytest.mark.parametrize(
    "tensor, told",
    [
        (5, "pack: 'a' is a int, must be a tensor with text for its name"),
        (torch.ones(2, 2).to_sparse(), "pack: 'a' is a tensor of torch.float32 that is not stored as plain dense numbers; convert it first"),
        (torch.ones(2, device="meta"), "pack: 'a' is a tensor of torch.float32 that is not stored as plain dense numbers; convert it first"),
    ],
    ids=["number", "sparse", "meta"],
)  # fmt: skip
def test_what_is_no_dense_tensor_is_refused_and_nothing_is_left(tensor, told, tmp_path):
    with pytest.raises(CheckpointError) as error:
        pack_tensors({"a": tensor}, tmp_path / "x.dsz")
    assert str(error.value) == told
    assert list(tmp_path.iterdir()) == []


def test_arguments_of_other_types_are_refused(tmp_path):
    with pytest.raises(
        UsageError, match="^pack_tensors: tensors: must be a mapping of tensors by name, got list$"
    ):
        pack_tensors([], tmp_path / "x.dsz")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="^pack_tensors: path: must be a path, got int$"):
        pack_tensors({}, 5)  # type: ignore[arg-type]
