"""JSON as strict as serde reads it (the official safetensors parser): no name twice, no NaN, no number out of range.

Everything wrong is a ValueError with a short message, whatever the input's size or depth. For counts, compare the type
with `int`: numbers that are negative or past 64 bits come as floats.
"""

import json
import math
from itertools import pairwise
from typing import Any

MAX_U64 = 2**64 - 1


def decode(text: bytes) -> Any:
    """One JSON value that fills all of `text`."""
    try:
        return _DECODER.decode(text.decode())
    except RecursionError:
        raise ValueError("JSON is nested too deep") from None


def decode_string(text: bytes) -> str:
    """What a JSON string, given with its quotes and known to hold no control character, says."""
    if b"\\" not in text:
        return text[1:-1].decode()
    value: str = json.loads(text)
    value.encode()  # refuses a lone surrogate, which an escape can bring in
    return value


def brief(value: object) -> str:
    """At most 80 printable characters: names and shapes of a hostile file may be as long as they like."""
    text = repr(value[:60] if isinstance(value, str | list | tuple) else value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        names = sorted(name for name, _ in pairs)
        twice = next(a for a, b in pairwise(names) if a == b)
        raise ValueError(f"{brief(twice)} is there twice")
    return members


def _int(text: str) -> int | float:
    if len(text) > 20 or text[0] == "-":
        return _float(text)
    value = int(text)
    return value if value <= MAX_U64 else float(value)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("number out of range")
    return value


def _constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_int, parse_float=_float, parse_constant=_constant)
