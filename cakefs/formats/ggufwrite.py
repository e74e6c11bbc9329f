"""Header bytes of a GGUF file that cakefs puts together: byte-stable, as llama.cpp's own writer lays them out.

Version 3, little-endian, keys and tensors in the order given, each tensor padded to `general.alignment`. Values that
come from another file are taken over as the bytes they are (`Header.raw`).
"""

import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from cakefs.errors import InvalidFormat
from cakefs.formats.ggml import MAX_DIMS, tensor_size
from cakefs.formats.gguf import (
    ALIGNMENT_KEY,
    DEFAULT_ALIGNMENT,
    FORMATS,
    HEADER_LIMIT,
    VERSION,
    Kind,
    Scalar,
    aligned,
    checked_alignment,
)
from cakefs.formats.strictjson import brief

_MAX_NAME = 63


class TensorSpec(NamedTuple):
    """What a header says of a tensor apart from its place; `size` in bytes, without padding."""

    name: str
    type_id: int
    dims: tuple[int, ...]
    size: int


class Layout(NamedTuple):
    """A header and where the tensors behind it go.

    Attributes:
        header: Padded; the first tensor follows it.
        paddings: Zero bytes behind each tensor.
        size: Of the whole file.
    """

    header: bytes
    paddings: tuple[int, ...]
    size: int


def encode(kind: Kind, value: Scalar | bytes) -> bytes:
    """A single value with its type. Raises ValueError where it does not fit."""
    return struct.pack("<I", kind) + _payload(kind, [value])


def encode_array(kind: Kind, values: Sequence[Scalar | bytes]) -> bytes:
    """An array with its types. Raises ValueError where an item does not fit."""
    return struct.pack("<IIQ", Kind.ARRAY, kind, len(values)) + _payload(kind, values)


def _payload(kind: Kind, values: Sequence[Scalar | bytes]) -> bytes:
    if kind is Kind.STRING:
        texts = [value if isinstance(value, bytes) else str(value).encode() for value in values]
        return b"".join(struct.pack("<Q", len(text)) + text for text in texts)
    try:
        return struct.pack(f"<{len(values)}{FORMATS[kind]}", *values)
    except (struct.error, OverflowError) as error:
        raise ValueError(f"no {kind.name}: {error}") from None


def build_header(fields: Mapping[str, bytes], tensors: Iterable[TensorSpec], path: str = "a new file") -> Layout:
    """Lays out a file with these values, each encoded with its type, and these tensors, both in this order.

    Raises InvalidFormat, naming `path`, where no reader would accept the result.
    """
    specs = list(tensors)
    try:
        alignment = _alignment(fields.get(ALIGNMENT_KEY))
        sizes = [aligned(spec.size, alignment) for spec in specs]
        parts = [struct.pack("<4sIQQ", b"GGUF", VERSION, len(specs), len(fields))]
        parts.extend(_name(key) + value for key, value in fields.items())
        if not all(fields):
            raise ValueError("a key is empty")
        parts.extend(_infos(specs, sizes))
    except ValueError as error:
        raise InvalidFormat(f"header of {path}: {error}") from error
    header = b"".join(parts)
    header += bytes(aligned(len(header), alignment) - len(header))
    if len(header) > HEADER_LIMIT:
        raise InvalidFormat(f"header of {path}: {len(header)} bytes are more than {HEADER_LIMIT}")
    paddings = tuple(padded - spec.size for padded, spec in zip(sizes, specs, strict=True))
    return Layout(header, paddings, len(header) + sum(sizes))


def _name(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _alignment(value: bytes | None) -> int:
    if value is None:
        return DEFAULT_ALIGNMENT
    if len(value) != 8 or value[:4] != struct.pack("<I", Kind.U32):
        raise ValueError(f"{ALIGNMENT_KEY} is not an unsigned number of 32 bits")
    return checked_alignment(int.from_bytes(value[4:], "little"))


def _infos(specs: Sequence[TensorSpec], sizes: Sequence[int]) -> Iterable[bytes]:
    names = sorted(spec.name for spec in specs)
    for name, following in pairwise(names):
        if name == following:
            raise ValueError(f"tensor {brief(name)} is there twice")
    offset = 0
    for spec, padded in zip(specs, sizes, strict=True):
        known = tensor_size(spec.type_id, spec.dims)
        if len(spec.dims) > MAX_DIMS or len(spec.name.encode()) > _MAX_NAME:
            raise ValueError(f"tensor {brief(spec.name)} has too many dimensions or too long a name")
        if known not in (None, spec.size):
            raise ValueError(f"tensor {brief(spec.name)} takes {known} bytes, not {spec.size}")
        yield _name(spec.name) + struct.pack(f"<I{len(spec.dims)}QIQ", len(spec.dims), *spec.dims, spec.type_id, offset)
        offset += padded
