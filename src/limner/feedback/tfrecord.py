"""TFRecord files and the tf.train.Example messages in them, without TensorFlow.

A file is records one after another; a record is

    length       8 bytes, little-endian
    checksum     4 bytes, of the 8 before
    data         `length` bytes, usually a tf.train.Example
    checksum     4 bytes, of the data

A checksum is CRC-32C, rotated right by 15 bits plus a constant ("masked"), so that checksums of data that hold checksums stay good.
The layout is that of TensorFlow's documentation of TFRecord; Example is that of its example.proto and feature.proto (wire format of
Protocol Buffers 3). Unlike TensorFlow's reader this one says where the damage is, and can be told how many records there should be.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

Value = list[bytes] | list[float] | list[int]

POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed
MASK = 0xA282EAD8
CHUNK = 1 << 20  # bytes a checksum takes at once; four times as much memory
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # Protocol Buffers' wire types


def _byte_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return table


TABLE = _byte_table()
TABLE_ARRAY = np.array(TABLE, dtype=np.uint32)


@functools.cache
def _shift_tables(level: int) -> NDArray[np.uint32]:
    """What 2**level zero bytes do to a CRC register: (4, 256), to be looked up by each of its four bytes and XORed, as it is linear."""
    basis = (np.arange(256, dtype=np.uint32)[None] << np.arange(0, 32, 8, dtype=np.uint32)[:, None]).astype(np.uint32)
    if level == 0:
        return TABLE_ARRAY[basis & 0xFF] ^ (basis >> 8)
    return _shift(_shift(basis, level - 1), level - 1)


def _shift(registers: NDArray[np.uint32], level: int) -> NDArray[np.uint32]:
    tables = _shift_tables(level)
    shifted = tables[0].take(registers & 0xFF)
    for i in (1, 2, 3):
        shifted ^= tables[i].take(registers >> (8 * i) & 0xFF)
    return shifted


def crc32c(data: bytes) -> int:
    """CRC-32C of the bytes, as in RFC 3720 (its check value: 0xE3069283 for b"123456789").

    numpy has no sequential loop, so all bytes start as registers of their own, which are then joined in pairs: the left one as the zero
    bytes of the right one's length would leave it, XOR the right one. A register of zero is left as it is by zeros, so odd counts are
    filled up at the front.
    """
    state = 0xFFFFFFFF
    for start in range(0, len(data), CHUNK):
        part = data[start : start + CHUNK]
        if len(part) < 64:
            for byte in part:
                state = TABLE[(state ^ byte) & 0xFF] ^ state >> 8
            continue
        values = np.frombuffer(part, dtype=np.uint8).copy()
        values[:4] ^= np.frombuffer(struct.pack("<I", state), dtype=np.uint8)  # the register enters with the first four bytes
        registers, level = TABLE_ARRAY.take(values), 0
        while len(registers) > 1:
            if len(registers) % 2:
                registers = np.concatenate([np.zeros(1, np.uint32), registers])
            registers = _shift(registers[0::2], level) ^ registers[1::2]
            level += 1
        state = int(registers[0])
    return state ^ 0xFFFFFFFF


def masked_crc32c(data: bytes) -> int:
    """The checksum of TFRecord: CRC-32C rotated right by 15 bits, plus a constant, modulo 2**32."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + MASK) & 0xFFFFFFFF


def read_records(path: Path, expected: int | None = None) -> Iterator[bytes]:
    """The data of each record of a file, in order; a record is checked before it is handed out.

    Args:
        path: an uncompressed TFRecord file.
        expected: how many records there should be; a file that ends early between two records shows no other sign of it.

    Raises:
        ValueError: a checksum differs, the file ends inside a record, or the count is another; names the file, the record's number and
            the byte where the record starts.
    """
    with path.open("rb") as file:
        end, offset, count = os.fstat(file.fileno()).st_size, 0, 0
        while offset < end:
            where = f"{path}: record {count} at byte {offset}"
            data = _read_one(file, end - offset, where)
            offset += 16 + len(data)
            count += 1
            if expected is not None and count > expected:
                raise ValueError(f"{where}: more records than the expected {expected}")
            yield data
    if expected is not None and count < expected:
        raise ValueError(f"{path}: ends at byte {offset} after {count} records; expected {expected}, so the file is cut short")


def _read_one(file: BinaryIO, left: int, where: str) -> bytes:
    header = file.read(min(12, left))
    if header.startswith(b"version http"):
        raise ValueError(f"{where}: this is a Git LFS pointer, not the data; run `git lfs pull` where it came from")
    if len(header) < 12:
        raise ValueError(f"{where}: the file ends inside the record's length ({len(header)} of 12 bytes)")
    length, checksum = struct.unpack("<QI", header)
    if masked_crc32c(header[:8]) != checksum:
        raise ValueError(f"{where}: damaged (the checksum of its length differs), or not an uncompressed TFRecord file")
    if length > left - 16:  # before anything is allocated
        raise ValueError(f"{where}: its length is {length} bytes, but the file ends {left - 12} bytes later; cut short")
    data = file.read(length + 4)
    if len(data) < length + 4:
        raise ValueError(f"{where}: the file ended while it was read")
    (checksum,) = struct.unpack_from("<I", data, length)
    if masked_crc32c(data[:length]) != checksum:
        raise ValueError(f"{where}: damaged (the checksum of its {length} bytes of data differs)")
    return data[:length]


def write_records(path: Path, records: Iterable[bytes]) -> int:
    """Write a TFRecord file, whole or not at all; returns how many records it holds."""
    partial, count = path.with_name(f".{path.name}.partial"), 0
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as file:
            for data in records:
                length = struct.pack("<Q", len(data))
                file.write(length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data)))
                count += 1
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)  # there only if something went wrong
    return count


def encode_example(features: Mapping[str, Sequence[bytes] | Sequence[float] | Sequence[int]]) -> bytes:
    """A tf.train.Example: bytes make a bytes_list, floats a float_list (float32, packed), ints an int64_list (packed).

    Features are written in alphabetical order, so equal features give equal bytes. An empty list has no kind, and is written as a
    feature that is not set.

    Raises:
        ValueError: values of several or other kinds, or out of their kind's range; names the feature.
    """
    entries = [_field(1, _field(1, name.encode()) + _field(2, _encode_feature(name, list(features[name])))) for name in sorted(features)]
    return _field(1, b"".join(entries))


def _encode_feature(name: str, values: list) -> bytes:
    try:
        if not values:
            return b""
        if all(isinstance(v, bytes) for v in values):
            return _field(1, b"".join(_field(1, v) for v in values))
        if all(isinstance(v, float | np.floating) for v in values):
            return _field(2, _field(1, struct.pack(f"<{len(values)}f", *values)))
        if all(isinstance(v, int | np.integer) and not isinstance(v, bool) for v in values):
            packed = [struct.pack("<q", v) for v in values]  # checks the range
            return _field(3, _field(1, b"".join(_varint(int.from_bytes(p, "little")) for p in packed)))
    except (OverflowError, struct.error) as error:
        raise ValueError(f"feature {name}: {error}") from error
    kinds = ", ".join(sorted({type(v).__name__ for v in values}))
    raise ValueError(f"feature {name}: values of {kinds}; expected all bytes, all float or all int")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | BYTES]) + _varint(len(content)) + content


def parse_example(data: bytes, where: str = "Example") -> dict[str, Value]:
    """The features of a tf.train.Example: lists of bytes, float (float32's values) or int; packed or not.

    Fields that Example does not have are skipped, a name given twice holds what came last, and a feature that is not set is an empty
    list, as Protocol Buffers have it.

    Raises:
        ValueError: not a message of this kind, or cut; names `where` and the byte within the message.
    """
    found: dict[str, Value] = {}
    for features in _submessages(data, 0, len(data), 1, where):
        for entry in _submessages(data, *features, 1, where):
            name = ""
            value: Value = list[bytes]()
            for number, wire, start, stop in _fields(data, *entry, where):
                if number == 1 and wire == BYTES:
                    try:
                        name = data[start:stop].decode()
                    except UnicodeDecodeError as error:
                        raise ValueError(f"{where}: byte {start}: a feature's name is not UTF-8") from error
                elif number == 2 and wire == BYTES:
                    value = _parse_feature(data, start, stop, where)
            found[name] = value
    return found


def _parse_feature(data: bytes, start: int, stop: int, where: str) -> Value:
    kind, texts, floats, ints = 0, list[bytes](), list[float](), list[int]()
    for number, wire, begin, end in _fields(data, start, stop, where):
        if wire != BYTES or number not in (1, 2, 3):
            continue
        if number != kind:  # of a oneof the last member counts
            kind, texts, floats, ints = number, [], [], []
        for inner, form, a, b in _fields(data, begin, end, where):
            if inner != 1:
                continue
            if kind == 1 and form == BYTES:
                texts.append(data[a:b])
            elif kind == 2 and form in (BYTES, FIXED32):
                if (b - a) % 4:
                    raise ValueError(f"{where}: byte {a}: {b - a} bytes of packed floats; expected a multiple of 4")
                floats += struct.unpack_from(f"<{(b - a) // 4}f", data, a)
            elif kind == 3 and form in (BYTES, VARINT):
                while a < b:
                    value, a = _read_varint(data, a, b, where)
                    ints.append(value - (1 << 64) if value >> 63 else value)
            else:
                raise ValueError(f"{where}: byte {a}: wire type {form} in a list of {('bytes', 'float', 'int64')[kind - 1]}")
    return floats if kind == 2 else ints if kind == 3 else texts


def _submessages(data: bytes, start: int, stop: int, wanted: int, where: str) -> Iterator[tuple[int, int]]:
    return ((a, b) for number, wire, a, b in _fields(data, start, stop, where) if number == wanted and wire == BYTES)


def _fields(data: bytes, start: int, stop: int, where: str) -> Iterator[tuple[int, int, int, int]]:
    """Number, wire type and the extent in `data` of each field's content between start and stop."""
    while start < stop:
        begin = start
        key, start = _read_varint(data, start, stop, where)
        number, wire = key >> 3, key & 7
        if wire == VARINT:
            end = _read_varint(data, start, stop, where)[1]
        elif wire == BYTES:
            size, start = _read_varint(data, start, stop, where)
            end = start + size
        elif wire in (FIXED32, FIXED64):
            end = start + (4 if wire == FIXED32 else 8)
        else:  # groups went out of use before tf.train.Example came up
            raise ValueError(f"{where}: byte {begin}: wire type {wire}; not a tf.train.Example")
        if end > stop or number == 0:
            raise ValueError(
                f"{where}: byte {begin}: field {number} ends at byte {end}, its message at {stop}; cut, or not a tf.train.Example"
            )
        yield number, wire, start, end
        start = end


def _read_varint(data: bytes, start: int, stop: int, where: str) -> tuple[int, int]:
    value = 0
    for i in range(10):
        if start + i >= stop:
            break
        value |= (data[start + i] & 0x7F) << (7 * i)
        if data[start + i] < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, start + i + 1
    raise ValueError(f"{where}: byte {start}: a number that does not end; cut, or not a tf.train.Example")
