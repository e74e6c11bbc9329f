"""The pieces of a SentencePiece model (`tokenizer.model`, a protobuf message): text, score and type of each. Pure.

Only what a vocabulary needs is read; other fields are stepped over, so that newer models can be read as well.
"""

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

from cakefs.errors import InvalidFormat

MAX_PIECES = 4_000_000
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT = 10  # bytes


class PieceType(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_FLOAT = struct.Struct("<f")
_TYPES = {int(kind): kind for kind in PieceType}


class Algorithm(IntEnum):
    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


class Piece(NamedTuple):
    text: bytes
    score: float
    type: PieceType


class Model(NamedTuple):
    """Attributes:
    pieces: By id.
    verbatim: Text is taken as it is: no table of characters to change, no spaces to drop.
    """

    algorithm: Algorithm
    pieces: list[Piece]
    verbatim: bool


def parse_model(data: bytes, path: str) -> Model:
    """Raises InvalidFormat, naming `path`, for bytes that are no SentencePiece model."""
    pieces, algorithm = list[Piece](), Algorithm.UNIGRAM
    table, drops_spaces = False, True
    try:
        for number, value in _fields(data):
            if number == 1 and isinstance(value, bytes):
                pieces.append(_plain_piece(value))
                if len(pieces) > MAX_PIECES:
                    raise ValueError(f"more than {MAX_PIECES} pieces")
            elif number == 2 and isinstance(value, bytes):
                for inner, setting in _fields(value):
                    algorithm = Algorithm(setting) if inner == 3 and isinstance(setting, int) else algorithm
            elif number == 3 and isinstance(value, bytes):
                for inner, setting in _fields(value):
                    table = bool(setting) if inner == 2 else table
                    drops_spaces = bool(setting) if inner == 4 else drops_spaces
        if not pieces:
            raise ValueError("no pieces")
    except (LookupError, ValueError) as error:
        raise InvalidFormat(f"{path} is no SentencePiece model: {error}") from error
    return Model(algorithm, pieces, not table and not drops_spaces)


def _piece(data: bytes) -> Piece:
    text, score, kind = b"", 0.0, PieceType.NORMAL
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value
            text.decode()
        elif number == 2 and isinstance(value, float):
            score = value
        elif number == 3 and isinstance(value, int):
            kind = PieceType(value)
    return Piece(text, score, kind)


def _plain_piece(data: bytes) -> Piece:
    """As `_piece`, five times as fast for the form that every trainer writes: short text, score, maybe a type."""
    size = data[1] if len(data) > 7 else 0
    stop = size + 7  # of the score
    if stop > len(data) or data[:1] != b"\x0a" or size > 0x7F or data[size + 2 : size + 3] != b"\x15":
        return _piece(data)
    rest = data[stop:]
    if rest and (len(rest) != 2 or rest[0] != 0x18):
        return _piece(data)
    text = data[2 : size + 2]
    text.decode()
    return Piece(text, _FLOAT.unpack_from(data, size + 3)[0], _TYPES[rest[1]] if rest else PieceType.NORMAL)


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int | float]]:
    """Numbers and values of a message's fields. Raises ValueError."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        size = {_FIXED64: 8, _FIXED32: 4}.get(wire)
        if wire == _BYTES:
            size, at = _varint(data, at)
        if size is None or at + size > len(data):
            raise ValueError(f"a field of wire type {wire} that does not fit at byte {at}")
        content = data[at : at + size]
        at += size
        yield tag >> 3, struct.unpack("<f", content)[0] if wire == _FIXED32 else content


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number there, and where the next byte is."""
    value = 0
    for i, byte in enumerate(data[at : at + _MAX_VARINT]):
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, at + i + 1
    raise ValueError(f"an endless number at byte {at}")
