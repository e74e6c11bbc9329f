"""torch checkpoints made by hand, opcode by opcode and record by record, so that each can be wrong in one place.

What a good one looks like is told by torch itself in the tests that have it.
"""

import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

# --- pickles ----------------------------------------------------------------------------------------------------------


def string(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def many(*items: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(items) + b"t"


def numbers(values: Sequence[int]) -> bytes:
    return many(*map(number, values))


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + many(*arguments) + b"R"


def table(items: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(string(key) + value for key, value in items.items()) + b"u"


def pickled(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


NO_HOOKS = call(name("collections", "OrderedDict"))
UTILS = "torch._utils"


def storage(key: str = "0", count: int = 4, kind: bytes = name("torch", "FloatStorage"), *more: bytes) -> bytes:
    return many(string("storage"), kind, string(key), string("cpu"), number(count), *more) + b"Q"


def tensor(
    shape: Sequence[int] = (4,), stride: Sequence[int] = (1,), offset: int = 0, of: bytes | None = None, *more: bytes
) -> bytes:
    """A float32 tensor of storage 0, which has 16 bytes."""
    arguments = (storage() if of is None else of, number(offset), numbers(shape), numbers(stride), b"\x89", NO_HOOKS)
    return call(name(UTILS, "_rebuild_tensor_v2"), *arguments, *more)


ONE = pickled(table({"a": tensor()}))
STORAGES = {"0": struct.pack("<4f", 1, 2, 3, 4)}

# --- zip --------------------------------------------------------------------------------------------------------------


class Record(NamedTuple):
    """A member, with everything about it that can lie."""

    name: bytes
    data: bytes
    method: int = 0
    flags: int = 0
    crc: int | None = None
    local_name: bytes | None = None
    local_method: int | None = None
    local_sizes: int = 0
    padding: int = 0
    size: int | None = None
    packed: int | None = None
    at: int | None = None
    wide: bool = False
    listed: bool = True


def archive(
    records: Sequence[Record],
    *,
    zip64: bool = True,
    count: int | None = None,
    wide_count: int | None = None,
    start: int | None = None,
    locator: int | None = None,
    comment: bytes = b"",
    left: bytes = b"",
) -> bytes:
    """An archive as torch writes one, apart from what is asked for."""
    body, directory = b"", b""
    for r in records:
        at = len(body)
        label = r.name if r.local_name is None else r.local_name
        method = r.method if r.local_method is None else r.local_method
        extra = b"FB" + struct.pack("<H", r.padding) + bytes(r.padding)
        fixed = (20, r.flags, method, 0, 0, 0, r.local_sizes, r.local_sizes, len(label), len(extra))
        body += struct.pack("<4s5H3I2H", b"PK\3\4", *fixed) + label + extra + r.data
        directory += _entry(r, at) if r.listed else b""
    directory += left
    begin = len(body) if start is None else start
    total = sum(r.listed for r in records) if count is None else count
    end = b""
    if zip64:
        wide = total if wide_count is None else wide_count
        end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, wide, wide, len(directory), begin)
        end += struct.pack("<4sIQI", b"PK\6\7", 0, len(body) + len(directory) if locator is None else locator, 1)
    end += struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, total, total, len(directory), begin, len(comment)) + comment
    return body + directory + end


def _entry(r: Record, at: int) -> bytes:
    at = at if r.at is None else r.at
    size = len(r.data) if r.size is None else r.size
    packed = size if r.packed is None else r.packed
    extra = b""
    if r.wide:
        extra = struct.pack("<2H3Q", 1, 24, size, packed, at)
        size = packed = at = 0xFFFFFFFF
    crc = zlib.crc32(r.data) if r.crc is None else r.crc
    fixed = (45, 20, r.flags, r.method, 0, 0, crc, packed, size, len(r.name), len(extra), 0, 0, 0, 0, at)
    return struct.pack("<4s6H3I5H2I", b"PK\1\2", *fixed) + r.name + extra


def records(
    pickle: bytes = ONE, storages: Mapping[str, bytes] = STORAGES, order: bytes | None = b"little"
) -> list[Record]:
    found = [Record(b"archive/data.pkl", pickle)]
    if order is not None:
        found.append(Record(b"archive/byteorder", order))
    found.extend(Record(f"archive/data/{key}".encode(), data, padding=7) for key, data in storages.items())
    return [*found, Record(b"archive/version", b"3\n")]


def zipped(pickle: bytes = ONE, storages: Mapping[str, bytes] = STORAGES, order: bytes | None = b"little") -> bytes:
    return archive(records(pickle, storages, order))


def changed(index: int, **changes: object) -> bytes:
    """A good archive with one record changed: 0 data.pkl, 1 byteorder, 2 the storage, 3 version."""
    found = records()
    found[index] = found[index]._replace(**changes)  # type: ignore[arg-type]
    return archive(found)


# --- before zip -------------------------------------------------------------------------------------------------------

MAGIC = 0x1950A86A20F9469CFC6C


def legacy(
    pickle: bytes = ONE,
    storages: Mapping[str, bytes] = STORAGES,
    *,
    magic: int = MAGIC,
    protocol: int = 1001,
    little: bytes = b"\x88",
    keys: Sequence[str] | None = None,
) -> bytes:
    listed = list(storages) if keys is None else keys
    parts = [pickled(number(magic)), pickled(number(protocol)), pickled(table({"little_endian": little}))]
    parts.append(pickle.replace(b"tQ", b"NtQ"))  # persistent ids have one more item here
    parts.append(pickled(b"](" + b"".join(map(string, listed)) + b"e"))
    parts.extend(struct.pack("<q", len(data) // 4) + data for data in storages.values())
    return b"".join(parts)
