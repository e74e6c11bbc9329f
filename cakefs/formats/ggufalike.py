"""Reading a GGUF header by that of another file: quantizations of a model share a vocabulary of megabytes. Pure.

Only what lies around the long arrays is asked for; each array itself is taken to be that of the other file where it has
as many items and the same beginning and end. So the header that is found tells where everything is, and its long values
are a guess: it is for `Header.outline`, never for `Header.raw`. Who writes a file that only looks alike has it cut into
pieces at other places; it is shown byte for byte all the same.
"""

from itertools import pairwise

from cakefs.errors import InvalidFormat
from cakefs.formats.gguf import Field, Header, Need, parse_header, read_header
from cakefs.formats.steps import Steps
from cakefs.model import KIB, ByteRange

_MARGIN = 4 * KIB  # Bytes of an array that are compared at either end.
_SLACK = 16 * KIB  # Bytes by which a header may be longer behind its arrays than the other one, at no further look.


def read_alike(file_size: int, path: str, like: Header) -> Steps[Header | None]:
    """The header, in two looks or three; None where the file is not like the other one, which has long arrays."""
    (data,) = yield [ByteRange(0, min(_first_look(like), file_size))]
    found = parse_header(data, file_size, path)
    if isinstance(found, Header):
        return found
    arrays = _arrays_from(like, found)
    if not arrays:
        return None
    shift = found.array_start - arrays[0].start
    gaps = [ByteRange(a.stop + shift - _MARGIN, b.start + shift + _MARGIN) for a, b in pairwise(arrays)]
    gaps.append(ByteRange(arrays[-1].stop + shift - _MARGIN, min(like.size + shift + _SLACK, file_size)))
    if gaps[0].start < found.array_start or any(gap.size < _MARGIN or gap.stop > file_size for gap in gaps):
        return None
    pieces = yield gaps
    values = [like.prefix[array.start : array.stop] for array in arrays]
    if not values[0].startswith(data[found.array_start :]):
        return None
    known = bytearray(data[: found.array_start])
    for value, piece, following in zip(values, pieces, [*values[1:], b""], strict=True):
        inner = piece[_MARGIN : len(piece) - _MARGIN] if following else piece[_MARGIN:]
        if value[-_MARGIN:] != piece[:_MARGIN] or (following and following[:_MARGIN] != piece[-_MARGIN:]):
            return None
        known += value + inner
    try:
        return (yield from read_header(file_size, path, data=bytes(known)))
    except InvalidFormat:  # of what is not the file: that is for a reader of all of it to say
        return None


def _first_look(like: Header) -> int:
    """Bytes up to the first long array and some more: what a header counts has to fit, or nothing is said of it."""
    counted = len(like.fields) + len(like.tensors)
    return max(min(found.start for found in like.fields.values() if found.is_long), 32 * counted) + 2 * _MARGIN


def _arrays_from(like: Header, need: Need) -> list[Field]:
    """The long arrays of a header from the one on that another header was cut in."""
    found = like.fields.get(need.array)
    if found is None or not found.is_long:
        return []
    return [field for field in like.fields.values() if field.is_long and field.start >= found.start]
