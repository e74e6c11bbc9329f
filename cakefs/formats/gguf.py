"""GGUF headers: strict parser, pure and incremental.

A file is magic, version, counts, key-value pairs, tensor infos, padding to `general.alignment`, then the tensors in the
order of their infos, each padded. The verdict is that of llama.cpp's own reader, with these differences:

- stricter: a key or tensor name that is no UTF-8; a tensor that the file is too short for; a header of more than
  64 MiB, 100,000 keys or 250,000 tensors; a key or an alignment of more than 64 KiB;
- laxer: a tensor of a type that we do not know, whose size is the distance to the next tensor. New types appear more
  often than cakefs does, and serving bytes takes no knowledge of them.

Values are not decoded until asked for, so a hostile header costs what its bytes cost, and a count that the rest of the
file cannot hold is refused before anything is made of it. Big-endian files are refused by name; version 1 and the
ancestors of GGUF are for the caller to recognise (`ancestor`) and to serve as they are.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import NamedTuple

from cakefs.errors import InvalidFormat
from cakefs.formats.ggml import MAX_DIMS, tensor_size, type_name
from cakefs.formats.steps import Steps
from cakefs.formats.strictjson import brief
from cakefs.model import KIB, MIB, ByteRange

HEADER_LIMIT = 64 * MIB  # The largest vocabularies of today take 14 MiB.
FIRST_LOOK = 64 * KIB
_MOST_AT_ONCE = 16  # A look goes so many times as far as the one before, if nothing but a guess says so.
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
VERSION = 3
_MAX_FIELDS = 100_000
_MAX_TENSORS = 250_000
_MAX_KEY = 64 * KIB
_MAX_ALIGNMENT = 64 * KIB
_MAX_NAME = 63
_LONG = 64 * KIB  # Bytes of an array from which on it is worth its own piece of the file.
_MIN_FIELD = 8 + 1 + 4 + 1
_MIN_TENSOR = 8 + 4 + 4 + 8
_FIXED = struct.Struct("<4sIQQ")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_ANCESTORS = {b"lmgg": "GGML", b"fmgg": "GGMF", b"tjgg": "GGJT", b"algg": "GGLA"}


class Kind(IntEnum):
    """Types of values."""

    U8 = 0
    I8 = 1
    U16 = 2
    I16 = 3
    U32 = 4
    I32 = 5
    F32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    U64 = 10
    I64 = 11
    F64 = 12


FORMATS: dict[Kind, str] = dict(
    zip((k for k in Kind if k not in (Kind.STRING, Kind.ARRAY)), "BbHhIif?Qqd", strict=True)
)
Scalar = int | float | bool | str


class Need(NamedTuple):
    """The prefix is too short: nothing can be said before it has at least `size` bytes, which the file does have.

    Attributes:
        likely: Bytes up to the end of what it ends in, by what is known of that; at least `size`.
        array: Key of the array that it ends in, empty where it ends elsewhere; `array_start` as `Field.start`.
    """

    size: int
    likely: int
    array: str = ""
    array_start: int = 0


class Field(NamedTuple):
    """Where the value of a key lies.

    Attributes:
        kind: Of the value, or of the items of an array.
        length: Items of an array; None for a single value.
        start: Of its type in the header; the value ends at `stop`.
    """

    kind: Kind
    length: int | None
    start: int
    stop: int

    @property
    def is_long(self) -> bool:
        """Whether it is an array such as a vocabulary, which other files have, too."""
        return self.length is not None and self.stop - self.start >= _LONG


class TensorEntry(NamedTuple):
    """One tensor.

    Attributes:
        type_id: Of ggml; see `ggml.TYPES`.
        dims: Fastest first, as in the file.
        start: Offset in the file.
        size: In bytes; for an unknown type as far as the next tensor.
        padded: Bytes as far as the next tensor, or the end of the file: what is stored as one.
    """

    name: str
    type_id: int
    dims: tuple[int, ...]
    start: int
    size: int
    padded: int

    @property
    def dtype(self) -> str:
        return type_name(self.type_id)

    @property
    def shape(self) -> tuple[int, ...]:
        """Slowest first, as torch and safetensors have it."""
        return self.dims[::-1]


@dataclass(frozen=True)
class Header:
    """A checked header.

    Attributes:
        fields: By key, in the order of the file.
        tensors: In the order of the file, which is that of their offsets.
        prefix: The file up to its first tensor; empty in an outline.
        size: Offset of the first tensor.
        path: For messages.
    """

    version: int
    alignment: int
    fields: dict[str, Field] = field(repr=False)
    tensors: tuple[TensorEntry, ...] = field(repr=False)
    prefix: bytes = field(repr=False)
    size: int
    path: str

    def outline(self) -> "Header":
        """Where long arrays and tensors are, without any values: kilobytes instead of megabytes."""
        return replace(self, fields={key: at for key, at in self.fields.items() if at.is_long}, prefix=b"")

    def raw(self, key: str) -> bytes:
        """A value with its type, as `build_header` takes it."""
        return self.prefix[self.fields[key].start : self.fields[key].stop]

    def get(self, key: str) -> Scalar | None:
        """A single value, None when the key is not there. Raises InvalidFormat for an array."""
        found = self.fields.get(key)
        if found is None:
            return None
        if found.length is not None:
            raise InvalidFormat(f"header of {self.path}: {key} is an array")
        return self._items(found, 1)[0]

    def array(self, key: str) -> Sequence[Scalar]:
        """The items of an array, none when the key is not there. Raises InvalidFormat for a single value."""
        found = self.fields.get(key)
        if found is None:
            return ()
        if found.length is None:
            raise InvalidFormat(f"header of {self.path}: {key} is not an array")
        return self._items(found, found.length)

    def _items(self, found: Field, count: int) -> Sequence[Scalar]:
        at = found.start + (4 if found.length is None else 16)
        if found.kind is not Kind.STRING:
            return struct.unpack_from(f"<{count}{FORMATS[found.kind]}", self.prefix, at)
        items = []
        for _ in range(count):
            start = at + 8
            at = start + _U64.unpack_from(self.prefix, at)[0]
            items.append(self.prefix[start:at].decode(errors="replace"))
        return items


def ancestor(prefix: bytes) -> str:
    """Name of the format before GGUF, which no loader of today reads, from the first 8 bytes; empty for all else."""
    magic, version = prefix[:4], int.from_bytes(prefix[4:8], "little")
    if magic == b"GGUF":
        return "GGUF v1" if version == 1 else ""
    name = _ANCESTORS.get(magic, "")
    return f"{name} v{version}" if name and name != "GGML" else name


def read_header(file_size: int, path: str, first: int = FIRST_LOOK, data: bytes = b"") -> Steps[Header]:
    """Reads a header in few looks, from behind `data` on: as far as seems enough, or else twice as far as before."""
    stop = min(max(first, len(data)), file_size)
    while True:
        if stop > len(data):
            (more,) = yield [ByteRange(len(data), stop)]
            data += more
        found = parse_header(data, file_size, path)
        if isinstance(found, Header):
            return found
        enough = found.likely + found.likely // 8 if found.likely > found.size else 2 * len(data)
        stop = min(max(found.size, min(enough, _MOST_AT_ONCE * len(data)), len(data) * 5 // 4), file_size)


def parse_header(data: bytes, file_size: int, path: str) -> Header | Need:
    """Checks a header against the format and the size of its file.

    Args:
        data: The file from its first byte as far as it is known.
        file_size: Of the whole file, in bytes.
        path: For messages only.
    """
    parser = _Parser(data, file_size, path)
    try:
        return parser.parse()
    except _Short as short:
        if short.size > file_size:
            raise InvalidFormat(f"header of {path}: file of {file_size} bytes ends before {short.what}") from None
        if short.size > HEADER_LIMIT:
            raise InvalidFormat(f"header of {path}: more than {HEADER_LIMIT} bytes up to {short.what}") from None
        return Need(short.size, min(max(short.size, short.likely), HEADER_LIMIT, file_size), *parser.array)
    except ValueError as error:
        raise InvalidFormat(f"header of {path}: {error}") from error


class _Short(Exception):
    def __init__(self, size: int, what: str, likely: int = 0) -> None:
        self.size, self.what, self.likely = size, what, likely


class _Parser:
    """Walks the header once. Raises ValueError, and _Short where data ends first."""

    def __init__(self, data: bytes, file_size: int, path: str) -> None:
        self._data = data
        self._file_size = file_size
        self._path = path
        self._at = 0
        self.array = "", 0  # The one that is being read: its key, and where its type is.

    def parse(self) -> Header:
        at = self._take(_FIXED.size, "its counts")
        magic, version, tensor_count, field_count = _FIXED.unpack_from(self._data, at)
        _check_version(magic, version, self._data)
        if field_count > _MAX_FIELDS or tensor_count > _MAX_TENSORS:
            raise ValueError(f"{field_count} keys and {tensor_count} tensors are more than it may have")
        self._require(field_count * _MIN_FIELD + tensor_count * _MIN_TENSOR, "its keys and tensors")
        fields: dict[str, Field] = {}
        for _ in range(field_count):
            self._field(fields)
        alignment = self._alignment(fields.get(ALIGNMENT_KEY))
        infos: dict[str, tuple[int, tuple[int, ...], int]] = {}
        for left in range(tensor_count, 0, -1):
            self._require(left * _MIN_TENSOR, "its tensors")
            self._info(infos)
        start = aligned(self._at, alignment)
        start = start if tensor_count else min(start, self._file_size)
        self._require(start - self._at, "its first tensor")
        tensors = tuple(_lay_out(infos, start, alignment, self._file_size))
        return Header(version, alignment, fields, tensors, bytes(self._data[:start]), start, self._path)

    def _require(self, size: int, what: str) -> None:
        if self._at + size > len(self._data):
            raise _Short(self._at + size, what)

    def _take(self, size: int, what: str) -> int:
        """Where the next `size` bytes are, which are then behind."""
        self._require(size, what)
        at = self._at
        self._at += size
        return at

    def _u32(self, what: str) -> int:
        return int(_U32.unpack_from(self._data, self._take(4, what))[0])

    def _u64(self, what: str) -> int:
        return int(_U64.unpack_from(self._data, self._take(8, what))[0])

    def _text(self, limit: int, what: str) -> str:
        size = self._u64(what)
        if size > limit:
            raise ValueError(f"{what} of {size} bytes")
        at = self._take(size, what)
        return bytes(self._data[at : at + size]).decode()

    def _field(self, fields: dict[str, Field]) -> None:
        key = self._text(_MAX_KEY, "a key")
        if not key or key in fields:
            raise ValueError(f"key {brief(key)} is there twice" if key else "a key is empty")
        start, count = self._at, None
        kind = self._kind(key)
        if kind is Kind.ARRAY:
            kind = self._kind(key)
            count = self._u64(f"the value of {brief(key)}")
            if kind is Kind.ARRAY:
                raise ValueError(f"key {brief(key)} is an array of arrays")
            self.array = key, start
        self._skip(kind, 1 if count is None else count, f"the value of {brief(key)}")
        fields[key] = Field(kind, count, start, self._at)
        self.array = "", 0

    def _kind(self, key: str) -> Kind:
        value = self._u32(f"the value of {brief(key)}")
        if value > max(Kind):
            raise ValueError(f"key {brief(key)} has a value of unknown type {value}")
        return Kind(value)

    def _skip(self, kind: Kind, count: int, what: str) -> None:
        if kind is not Kind.STRING:
            self._take(count * struct.calcsize(f"<{FORMATS[kind]}"), what)
            return
        if self._at + 8 * count > self._file_size:
            raise _Short(self._at + 8 * count, what)
        at, data, stop, unpack = self._at, self._data, len(self._data), _U64.unpack_from
        for left in range(count, 0, -1):
            after = at + 8
            if after <= stop:
                after += unpack(data, at)[0]
            if after > stop:
                seen = count - left
                likely = at + (at - self._at) * left // seen if seen else 0
                raise _Short(after + 8 * (left - 1), what, likely)
            at = after
        self._at = at

    def _alignment(self, found: Field | None) -> int:
        if found is None:
            return DEFAULT_ALIGNMENT
        if found.length is not None or found.kind is not Kind.U32:
            raise ValueError(f"{ALIGNMENT_KEY} is not an unsigned number of 32 bits")
        return checked_alignment(int(_U32.unpack_from(self._data, found.start + 4)[0]))

    def _info(self, infos: dict[str, tuple[int, tuple[int, ...], int]]) -> None:
        name = self._text(_MAX_NAME, "the name of a tensor")
        if name in infos:
            raise ValueError(f"tensor {brief(name)} is there twice")
        what = f"tensor {brief(name)}"
        dim_count = self._u32(what)
        if dim_count > MAX_DIMS:
            raise ValueError(f"{what} has {dim_count} dimensions")
        dims = tuple(self._u64(what) for _ in range(dim_count))
        type_id = self._u32(what)
        infos[name] = type_id, dims, self._u64(what)


def _check_version(magic: bytes, version: int, data: bytes) -> None:
    old = ancestor(data)
    if old:
        raise ValueError(f"{old} is older than what any loader of today reads")
    if magic != b"GGUF":
        raise ValueError(f"{brief(magic)} is not how a GGUF file begins")
    if version & 0xFFFF == 0 and version:
        raise ValueError(f"big-endian GGUF (version {int.from_bytes(data[4:8], 'big')}) is not supported")
    if not 2 <= version <= VERSION:
        raise ValueError(f"GGUF version {version} is not 2 or {VERSION}")


def checked_alignment(value: int) -> int:
    """Raises ValueError unless it is a power of two, and no larger than a page ever is."""
    if value <= 0 or value & (value - 1) or value > _MAX_ALIGNMENT:
        raise ValueError(f"alignment {value} is not a power of two up to {_MAX_ALIGNMENT}")
    return value


def aligned(size: int, alignment: int) -> int:
    """The next multiple of a power of two."""
    return (size + alignment - 1) & -alignment


def _lay_out(
    infos: dict[str, tuple[int, tuple[int, ...], int]], start: int, alignment: int, file_size: int
) -> list[TensorEntry]:
    """Tensors with their places, each where the one before ended, padded."""
    room = file_size - start
    offsets = [*(offset for _, _, offset in infos.values()), room][1:]
    tensors, expected = [], 0
    for (name, (type_id, dims, offset)), following in zip(infos.items(), offsets, strict=True):
        if offset != expected:
            raise ValueError(f"tensor {brief(name)} is at offset {offset}, not at {expected} behind the one before")
        try:
            known = tensor_size(type_id, dims)
        except ValueError as error:
            raise ValueError(f"tensor {brief(name)}: {error}") from None
        size = following - offset if known is None else known
        if not 0 <= size <= room - offset:
            raise ValueError(f"tensor {brief(name)}: file of {file_size} bytes ends before {start + offset + size}")
        expected = offset + aligned(size, alignment)
        tensors.append(TensorEntry(name, type_id, dims, start + offset, size, min(expected, room) - offset))
    return tensors
