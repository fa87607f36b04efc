"""TFRecord framing and tf.train.Example: known bytes, round trips, damage of every kind, and the `tfrecord` package on the other side."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limner.feedback.tfrecord import (
    CHUNK,
    TABLE,
    crc32c,
    encode_example,
    masked_crc32c,
    parse_example,
    read_records,
    write_records,
)

SAME_FOLDER = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
RECORDS = st.lists(st.binary(max_size=90), min_size=1, max_size=4)
FLOATS = st.floats(width=32, allow_nan=False)
FEATURES = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.one_of(
        st.lists(st.binary(max_size=20), max_size=4),
        st.lists(FLOATS, max_size=4),
        st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
    ),
    max_size=4,
)


def bytewise(data: bytes) -> int:
    state = 0xFFFFFFFF
    for byte in data:
        state = TABLE[(state ^ byte) & 0xFF] ^ state >> 8
    return state ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),  # this and the next three: RFC 3720, B.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"", 0),
    ],
)
def test_crc32c_of_the_standard(data: bytes, crc: int) -> None:
    assert crc32c(data) == crc


def test_crc32c_of_any_length_is_the_bytewise_one() -> None:
    rng = np.random.default_rng(0)
    for n in [*range(60, 70), 127, 128, 129, 1000, 4097, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 63, CHUNK + 64]:
        data = rng.bytes(n)
        assert crc32c(data) == bytewise(data), n


def starts(records: list[bytes]) -> list[int]:
    return np.cumsum([0, *(16 + len(r) for r in records)]).tolist()


@SAME_FOLDER
@given(records=st.lists(st.binary(max_size=200), max_size=5))
def test_round_trip(tmp_path: Path, records: list[bytes]) -> None:
    path = tmp_path / "a.tfrecord"
    assert write_records(path, records) == len(records)
    assert list(read_records(path, len(records))) == list(read_records(path)) == records
    assert path.stat().st_size == starts(records)[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["a.tfrecord"]


@SAME_FOLDER
@given(records=RECORDS, data=st.data())
def test_any_bit_flip_is_reported_with_file_and_byte(tmp_path: Path, records: list[bytes], data: st.DataObject) -> None:
    path = tmp_path / "flip.tfrecord"
    write_records(path, records)
    content = bytearray(path.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    hit = max(i for i, start in enumerate(starts(records)[:-1]) if start <= bit // 8)
    reader = read_records(path)
    assert [next(reader) for _ in range(hit)] == records[:hit]
    with pytest.raises(ValueError, match=f"flip.tfrecord: record {hit} at byte {starts(records)[hit]}: "):
        next(reader)


@SAME_FOLDER
@given(records=RECORDS, data=st.data())
def test_any_cut_is_reported(tmp_path: Path, records: list[bytes], data: st.DataObject) -> None:
    """Inside a record by the record itself, between two records by the expected count."""
    path = tmp_path / "cut.tfrecord"
    write_records(path, records)
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content) - 1))
    path.write_bytes(content[:cut])
    whole = max(i for i, start in enumerate(starts(records)) if start <= cut)
    if cut in starts(records):
        assert list(read_records(path)) == records[:whole]
        message = f"cut.tfrecord: ends at byte {cut} after {whole} records; expected {len(records)}"
    else:
        message = f"cut.tfrecord: record {whole} at byte {starts(records)[whole]}: "
    with pytest.raises(ValueError, match=message):
        list(read_records(path, len(records)))


def test_more_records_than_expected(tmp_path: Path) -> None:
    write_records(tmp_path / "a.tfrecord", [b"a", b"b"])
    with pytest.raises(ValueError, match="record 1 at byte 17: more records than the expected 1"):
        list(read_records(tmp_path / "a.tfrecord", 1))


@pytest.mark.parametrize("length", [3, 2**31, 2**62, 2**64 - 1])
def test_a_length_beyond_the_file_allocates_nothing(tmp_path: Path, length: int) -> None:
    header = struct.pack("<Q", length)
    path = tmp_path / "long.tfrecord"
    path.write_bytes(header + struct.pack("<I", masked_crc32c(header)) + b"abcdef")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"record 0 at byte 0: its length is {length} bytes"):
            next(read_records(path))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@SAME_FOLDER
@given(content=st.binary(min_size=1, max_size=200))
def test_any_other_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match="record 0 at byte 0"):
        list(read_records(tmp_path / "x"))


def test_a_git_lfs_pointer_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 150710286\n")
    with pytest.raises(ValueError, match="Git LFS pointer"):
        list(read_records(tmp_path / "x"))


def test_nothing_is_left_of_a_file_that_failed(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        write_records(tmp_path / "a", (bytes(1 // i) for i in (1, 0)))
    assert list(tmp_path.iterdir()) == []


@settings(deadline=None, max_examples=100)
@given(features=FEATURES)
def test_example_round_trip(features: dict) -> None:
    assert parse_example(encode_example(features)) == features


def test_example_of_known_bytes() -> None:
    """By hand from example.proto; the float list once packed (2a = length-delimited) and once one by one."""
    packed = b"\x0a\x13\x0a\x11\x0a\x01f\x12\x0c\x12\x0a\x0a\x08" + struct.pack("<2f", 0.5, -2)
    single = b"\x0a\x13\x0a\x11\x0a\x01f\x12\x0c\x12\x0a" + b"\x0d" + struct.pack("<f", 0.5) + b"\x0d" + struct.pack("<f", -2)
    assert encode_example({"f": [0.5, -2.0]}) == packed
    assert parse_example(packed) == parse_example(single) == {"f": [0.5, -2.0]}
    ints = b"\x0a\x0d\x0a\x0b\x0a\x01i\x12\x06\x1a\x04\x08\x05\x08\x07"
    assert parse_example(ints) == {"i": [5, 7]}
    assert parse_example(b"\x10\x01" + ints + b"\x19" + bytes(8)) == {"i": [5, 7]}  # unknown fields
    assert parse_example(b"") == {}


@settings(deadline=None, max_examples=150)
@given(features=FEATURES, data=st.data())
def test_damaged_examples_are_errors_or_examples_never_crashes(features: dict, data: st.DataObject) -> None:
    content = bytearray(encode_example(features))
    for _ in range(data.draw(st.integers(1, 3))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    for damaged in (bytes(content), bytes(content[:cut]), data.draw(st.binary(max_size=60))):
        assert complaint(damaged).startswith(("here: byte ", "none"))


def complaint(data: bytes) -> str:
    try:
        parse_example(data, "here")
    except ValueError as error:
        return str(error)
    return "none"


def test_a_field_does_not_reach_beyond_its_message() -> None:
    """A bytes value one longer than its list, with enough bytes behind it in the data."""
    good = encode_example({"a": [b"xy"], "b": [b"z"]})
    at = good.index(b"\x02xy")
    assert complaint(
        good[:at] + b"\x03" + good[at + 1 :]
    ) == f"here: byte {at - 1}: field 1 ends at byte {at + 4}, its message at {at + 3}; " + ("cut, or not a tf.train.Example")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2.0], "values of float, int"),
        (["a"], "values of str"),
        ([True], "values of bool"),
        ([2**63], "feature x: "),
        ([1e39], "feature x: "),
    ],
)
def test_encode_refuses(values: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_example({"x": values})


KINDS = {"filename": ([b"train/a.png", b""], "byte"), "score": ([0.25, -1.5], "float"), "k": ([-1, 2**62], "int")}


def test_the_tfrecord_package_reads_ours(tmp_path: Path) -> None:
    reader = pytest.importorskip("tfrecord.reader")
    path = tmp_path / "ours.tfrecord"
    write_records(path, [encode_example({name: values for name, (values, _) in KINDS.items()})] * 3)
    found = list(reader.tfrecord_loader(str(path), None, {"score": "float", "k": "int"}))
    assert len(found) == 3
    assert found[2]["score"].tolist() == [0.25, -1.5] and found[2]["k"].tolist() == [-1, 2**62]
    raw = [bytes(r) for r in reader.tfrecord_iterator(str(path))]
    assert raw == list(read_records(path))
    example = pytest.importorskip("tfrecord.example_pb2").Example.FromString(raw[0])
    assert list(example.features.feature["filename"].bytes_list.value) == [b"train/a.png", b""]


def test_we_read_the_tfrecord_packages(tmp_path: Path) -> None:
    writer = pytest.importorskip("tfrecord.writer").TFRecordWriter(str(tmp_path / "theirs.tfrecord"))
    for _ in range(2):
        writer.write(KINDS)
    writer.close()
    found = [parse_example(r) for r in read_records(tmp_path / "theirs.tfrecord", 2)]
    assert found == [{name: values for name, (values, _) in KINDS.items()}] * 2
