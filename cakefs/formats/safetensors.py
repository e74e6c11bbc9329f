"""safetensors headers: strict parser and canonical writer, both pure.

A file is 8 bytes N (little-endian), N bytes of JSON, then data that the tensors tile without hole, overlap or rest.
The parser accepts what the official library (0.8) accepts, and refuses more only where two readers could disagree or
where a few bytes could cost much memory:

- a tensor name, metadata key or field given twice (the library lets the last tensor name win);
- `"__metadata__": null`; a tensor entry written as an array; a dtype written as an object;
- inside an entry, a field we do not know whose value is an array or object, or any string with a `}` in it;
- an entry of more than 1 MiB that is not plain, more than 1,000,000 tensors, more than 100,000 metadata keys.

What a few counts of characters do not show to be plain is decoded an entry at a time, so a hostile header of 100 MB
costs at most some ten times its own size, never what JSON could make of it.

The writer emits exactly the official writer's bytes, given `canonical_order` and at most one metadata key (with more,
the library's own order is random).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from operator import attrgetter
from sys import intern
from typing import Annotated, NamedTuple

import msgspec

from cakefs.errors import InvalidFormat
from cakefs.formats.strictjson import MAX_U64, brief, decode, decode_string

HEADER_LIMIT = 100_000_000
_MAX_ENTRY = 1 << 20
_MAX_TENSORS = 1_000_000
_MAX_METADATA = 100_000
_METADATA = "__metadata__"

_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


class Dtype(NamedTuple):
    """`rank` orders tensors in a canonical file (highest first); `bits` per element."""

    rank: int
    bits: int


DTYPES = {name: Dtype(rank, bits) for rank, (name, bits) in enumerate(_BITS.items())}


class TensorSpec(msgspec.Struct, frozen=True, gc=False):
    """What a header says of a tensor apart from its place."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class TensorEntry(TensorSpec, frozen=True, gc=False):
    """One tensor of a header; `start` and `stop` are relative to the data section."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class Header(NamedTuple):
    """A checked header.

    Attributes:
        entries: By (start, stop), then by place in the JSON.
        metadata: Empty where the file has none.
        size: Offset of the data section, 8 + N.
    """

    entries: tuple[TensorEntry, ...]
    metadata: dict[str, str]
    size: int


def tensor_size(dtype: str, shape: Sequence[int]) -> int:
    """In bytes; raises ValueError when the bits do not fill bytes or pass 64 bits on the way, from left to right."""
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {brief(dtype)}")
    size = 1
    for dim in (*shape, DTYPES[dtype].bits):
        size *= dim
        if size > MAX_U64:
            raise ValueError(f"shape {brief(shape)} overflows")
    if size % 8:
        raise ValueError(f"{size} bits of {dtype} {brief(shape)} do not fill bytes")
    return size // 8


# --- reading --------------------------------------------------------------------------------------------------------


def header_size(prefix: bytes, path: str) -> int:
    """Offset of the data section, from the first 8 bytes of the file `path`: ask it before fetching a header."""
    if len(prefix) < 8:
        raise InvalidFormat(f"header of {path}: {len(prefix)} bytes are too few for a safetensors file")
    length = int.from_bytes(prefix[:8], "little")
    if not 2 <= length <= HEADER_LIMIT:
        raise InvalidFormat(
            f"header of {path}: length {length} is not within 2 to {HEADER_LIMIT}", hint="is this a safetensors file?"
        )
    return 8 + length


def parse_header(data: bytes, file_size: int, path: str) -> Header:
    """Checks a header against the format and the size of its file.

    Args:
        data: The file from its first byte to at least the end of its header.
        file_size: Of the whole file, in bytes.
        path: For messages only.
    """
    size = header_size(data, path)
    if len(data) < size or file_size < size:
        raise InvalidFormat(f"header of {path}: {min(len(data), file_size)} bytes hold no header of {size}")
    parser = _Parser(data, 8, size)
    try:
        parser.parse()
        entries = sorted(parser.tensors.values(), key=attrgetter("start", "stop"))
        _check_tiling(entries, file_size - size)
    except ValueError as error:
        raise InvalidFormat(f"header of {path}: {error}") from error
    return Header(tuple(entries), parser.metadata, size)


def _check_tiling(entries: Iterable[TensorEntry], data_size: int) -> None:
    size_of = lru_cache(maxsize=1000)(tensor_size)  # Layers repeat each other.
    position = 0
    for entry in entries:
        if entry.start != position:
            what = "overlaps the one before" if entry.start < position else "leaves a hole before it"
            raise ValueError(f"tensor {brief(entry.name)} {what}: [{entry.start}, {entry.stop}) after {position}")
        try:
            size = size_of(entry.dtype, entry.shape)
        except ValueError as error:
            raise ValueError(f"tensor {brief(entry.name)}: {error}") from None
        if entry.stop - entry.start != size:
            raise ValueError(
                f"tensor {brief(entry.name)}: [{entry.start}, {entry.stop}) is not {size} bytes, "
                f"as {entry.dtype} {brief(entry.shape)} takes"
            )
        position = entry.stop
    if position != data_size:
        raise ValueError(f"tensors cover {position} of {data_size} bytes of data")


_SPACE = rb"[ \t\n\r]*+"
_STRING = rb'("[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+")'
_AND_NEXT = _SPACE + rb"([,}])" + _SPACE
_OPEN = re.compile(_SPACE + rb"\{" + _SPACE + rb"(\}?)" + _SPACE)
_NAME = re.compile(_STRING + _SPACE + rb":" + _SPACE)
_TENSOR = re.compile(rb"(\{[^}]*\})" + _AND_NEXT)
_TEXT = re.compile(_STRING + _AND_NEXT)
_NEXT = re.compile(_AND_NEXT)
_MINUS = re.compile(rb"[\[,:]" + _SPACE + rb"-")


class _Parser:
    """Walks the JSON text once: a member at a time, or all at once from a tensor on that only plain ones follow.

    Raises ValueError.
    """

    def __init__(self, data: bytes, start: int, stop: int) -> None:
        self._data = data
        self._at = start
        self._stop = stop
        self._shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # equal shapes of thousands of tensors are kept once
        self.tensors: dict[str, TensorEntry] = {}
        self.metadata: dict[str, str] = {}

    def parse(self) -> None:
        seen = False
        more = not self._take(_OPEN, "object")[1]
        while more:
            begin = self._at
            name = decode_string(self._take(_NAME, "name and colon")[1])
            if name != _METADATA:
                rest = memoryview(self._data)[begin : self._stop]
                if not self.tensors and (plain := _plain_tensors(b"".join((b"{", rest)))):
                    self.tensors = {name: self._entry(name, found) for name, found in plain.items()}
                    return
                more = self._tensor(name)
            elif seen:
                raise ValueError(f"{_METADATA} is there twice")
            else:
                seen = True
                self._members()
                more = self._take(_NEXT, "comma or end of object")[1] == b","
        if self._at != self._stop:
            raise ValueError(f"malformed JSON: more at byte {self._at}")

    def _take(self, pattern: re.Pattern[bytes], expected: str) -> re.Match[bytes]:
        match = pattern.match(self._data, self._at, self._stop)
        if match is None:
            raise ValueError(f"malformed JSON: no {expected} at byte {self._at}")
        self._at = match.end()
        return match

    def _members(self) -> None:
        more = not self._take(_OPEN, f"object of {_METADATA}")[1]
        while more:
            key = decode_string(self._take(_NAME, "name and colon")[1])
            if key in self.metadata:
                raise ValueError(f"metadata key {brief(key)} is there twice")
            if len(self.metadata) == _MAX_METADATA:
                raise ValueError(f"more than {_MAX_METADATA} metadata keys")
            value = self._take(_TEXT, f"string in {_METADATA}, then comma or end,")
            self.metadata[key] = decode_string(value[1])
            more = value[2] == b","

    def _tensor(self, name: str) -> bool:
        """Takes the entry of a tensor and what follows; whether that is another member."""
        if name in self.tensors:
            raise ValueError(f"tensor {brief(name)} is there twice")
        if len(self.tensors) == _MAX_TENSORS:
            raise ValueError(f"more than {_MAX_TENSORS} tensors")
        text, then = self._take(_TENSOR, "object of a tensor, then comma or end,").groups()
        try:
            found = _any_entry(text)
        except ValueError as error:
            raise ValueError(f"tensor {brief(name)}: {error}") from error
        self.tensors[name] = self._entry(name, found)
        return then == b","

    def _entry(self, name: str, found: "_Entry") -> TensorEntry:
        if found.dtype not in DTYPES:
            raise ValueError(f"tensor {brief(name)}: unknown dtype {brief(found.dtype)}")
        return TensorEntry(
            name, intern(found.dtype), self._shapes.setdefault(found.shape, found.shape), *found.data_offsets
        )


_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _Entry(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    dtype: str
    shape: tuple[_Count, ...]
    data_offsets: tuple[_Count, _Count]


_PLAIN = msgspec.json.Decoder(dict[str, _Entry])


def _plain_tensors(text: bytes) -> dict[str, _Entry] | None:
    """The tensors of an object as every writer spells them, six times as fast as one by one.

    None when only that can tell. Where as many different names came out as there are ten quotes for each, there is no
    room for a fourth field, or a second time the same; few commas are few dimensions; -0 would pass as a count.
    """
    count, rest = divmod(text.count(b'"'), 10)
    if rest or count > _MAX_TENSORS or text.count(b",") > 8 * count or b"\\" in text:
        return None
    if b"-0" in text and _MINUS.search(text):
        return None
    try:
        found = _PLAIN.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return found if len(found) == count and _METADATA not in found else None


def _any_entry(text: bytes) -> _Entry:
    if len(text) > _MAX_ENTRY:
        raise ValueError(f"entry is longer than {_MAX_ENTRY} bytes")
    fields = decode(text)
    try:
        dtype, shape, offsets = fields.pop("dtype"), fields.pop("shape"), fields.pop("data_offsets")
    except KeyError as error:
        raise ValueError(f"no field {error.args[0]}") from None
    if type(dtype) is not str:
        raise ValueError(f"dtype {brief(dtype)} is not a string")
    if not _is_counts(shape):
        raise ValueError(f"shape {brief(shape)} is not a list of counts")
    if not _is_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"data_offsets {brief(offsets)} are not two counts")
    for name, value in fields.items():
        if type(value) is list:
            raise ValueError(f"unknown field {brief(name)} holds an array")
        f"{name}{value}".encode()  # refuses lone surrogates
    return _Entry(dtype, tuple(shape), (offsets[0], offsets[1]))


def _is_counts(value: object) -> bool:
    return type(value) is list and all(type(item) is int for item in value)


# --- writing --------------------------------------------------------------------------------------------------------


def canonical_key(tensor: TensorSpec) -> tuple[int, str]:
    """Sorts tensors as the official writer lays them out: dtype rank falling, then name by its UTF-8 bytes."""
    return -DTYPES[tensor.dtype].rank, tensor.name  # code points sort as their UTF-8 does


def build_header(tensors: Iterable[TensorSpec], metadata: Mapping[str, str], path: str = "a new file") -> bytes:
    """The header, its 8 length bytes included, of a file with these tensors in this order.

    Raises InvalidFormat, naming `path`, where no reader would accept the result.
    """
    try:
        text = msgspec.json.encode(_members(tensors, metadata))
    except ValueError as error:
        raise InvalidFormat(f"header of {path}: {error}") from error
    padding = -len(text) % 8
    length = len(text) + padding
    if length > HEADER_LIMIT:
        raise InvalidFormat(f"header of {path}: {length} bytes are more than {HEADER_LIMIT}")
    return b"".join((length.to_bytes(8, "little"), text, b" " * padding))


def _members(tensors: Iterable[TensorSpec], metadata: Mapping[str, str]) -> dict[str, object]:
    """What the JSON says, in its order."""
    size_of = lru_cache(maxsize=1000)(tensor_size)
    members: dict[str, object] = {_METADATA: dict(metadata)}
    start = 0
    for tensor in tensors:
        if tensor.name in members:
            raise ValueError(f"tensor {brief(tensor.name)} is there twice")
        stop = start + size_of(tensor.dtype, tensor.shape)
        members[tensor.name] = _Entry(tensor.dtype, tensor.shape, (start, stop))
        start = stop
    if not metadata:
        del members[_METADATA]
    return members
