"""GGUF files in a manifest: the pieces that a published one is stored in, and the merged one of a split. Pure.

A published file is stored as its header, each tensor with the padding behind it, and whatever follows the last. Padding
belongs to the tensor because it need not be zero upstream and is too small to be fetched alone; nearly every tensor
fills its 32 bytes anyway, so equal tensors are equal pieces in whatever file they are. The long arrays of a header are
pieces of their own: the vocabulary takes megabytes, and all quantizations of a model have the same.

The merged file has the bytes that `llama-gguf-split --merge` writes: all keys of the first part, `split.count` moved to
the end and set to 0; the tensors of all parts in order, trailing dimensions of 1 left out; zero padding. They differ
only where `general.alignment` is not 32: the tool then writes a file that llama.cpp refuses.
"""

import re
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import NamedTuple

from cakefs.errors import InvalidFormat
from cakefs.formats.gguf import Header, Kind, TensorEntry
from cakefs.formats.ggufwrite import TensorSpec, build_header, encode
from cakefs.formats.strictjson import brief
from cakefs.model import ByteRange, Digest, Extent, File, Literal, Segment, View

_PART = re.compile(r"(?P<prefix>.*[^/])-(?P<number>[0-9]{5,})-of-(?P<count>[0-9]{5,})\.gguf", re.DOTALL)
_MAX_PARTS = 65535
_COUNT, _NUMBER, _TENSORS = "split.count", "split.no", "split.tensors.count"


class Part(NamedTuple):
    """A file of a split.

    Attributes:
        extents: Of each tensor of the header, padding or not.
    """

    header: Header
    extents: Sequence[Extent]


def is_gguf(path: str) -> bool:
    """Whether the file may have a GGUF header, which then has to be read to know its tensors."""
    return path.endswith(".gguf")


def header_ranges(header: Header) -> list[ByteRange]:
    """What a header is stored as, without gap: its long arrays, and what is between them."""
    long = [found for found in header.fields.values() if found.is_long]
    cuts = [0, *(at for found in long for at in (found.start, found.stop)), header.size]
    return [ByteRange(start, stop) for start, stop in pairwise(cuts) if start < stop]


def piece_ranges(header: Header, file_size: int) -> list[ByteRange]:
    """What a published file is stored as, without gap: header, each tensor with its padding, what follows the last."""
    ranges = header_ranges(header)
    ranges.extend(ByteRange(t.start, t.start + t.padded) for t in header.tensors)
    if ranges[-1].stop < file_size:
        ranges.append(ByteRange(ranges[-1].stop, file_size))
    return ranges


def split_sets(paths: Collection[str]) -> dict[str, list[str]]:
    """Merged path -> its parts in order, for every split of which all parts and no merged file are among the paths."""
    published = frozenset(paths)
    sets: dict[str, list[str]] = {}
    for path in sorted(published):
        match = _PART.fullmatch(path)
        if match is None or int(match["number"]) != 1 or not 1 <= (count := int(match["count"])) <= _MAX_PARTS:
            continue
        parts = [f"{match['prefix']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
        target = f"{match['prefix']}.gguf"
        if target not in published and target not in sets and published.issuperset(parts):
            sets[target] = parts
    return sets


def merged_file(path: str, parts: Sequence[Part], view: View, put_literal: Callable[[bytes], Digest]) -> File:
    """One file of all parts of a split.

    Raises InvalidFormat, naming the part, where they are not the parts of one split.

    Args:
        parts: All, in order.
        put_literal: Stores the header and the paddings.
    """
    _check_parts(parts)
    first = parts[0].header
    fields = {key: first.raw(key) for key in first.fields if key != _COUNT}
    fields[_COUNT] = encode(Kind.U16, 0)
    tensors = [(tensor, extent) for part in parts for tensor, extent in zip(*_tensors(part), strict=True)]
    layout = build_header(fields, (_spec(tensor) for tensor, _ in tensors), path)
    segments: list[Segment] = [Literal(put_literal(layout.header), len(layout.header))]
    zeros: dict[int, Literal] = {}
    for (tensor, extent), padding in zip(tensors, layout.paddings, strict=True):
        segments.append(Extent(extent.span, extent.start, extent.start + tensor.size))
        while padding:  # by powers of two, so that few literals do whatever a strange alignment asks for
            size = 1 << padding.bit_length() - 1
            if size not in zeros:
                zeros[size] = Literal(put_literal(bytes(size)), size)
            segments.append(zeros[size])
            padding -= size
    return File(path, layout.size, view, tuple(segments))


def _tensors(part: Part) -> tuple[Sequence[TensorEntry], Sequence[Extent]]:
    return part.header.tensors, part.extents


def _spec(tensor: TensorEntry) -> TensorSpec:
    """Dimensions as llama.cpp writes them: at least one, none of 1 behind the last larger one."""
    dims = tensor.dims or (1,)
    while len(dims) > 1 and dims[-1] == 1:
        dims = dims[:-1]
    return TensorSpec(tensor.name, tensor.type_id, dims, tensor.size)


def _check_parts(parts: Sequence[Part]) -> None:
    for number, (header, _) in enumerate(parts):
        for key, expected in ((_NUMBER, number), (_COUNT, len(parts))):
            found = header.get(key)
            if found != expected or header.fields[key].kind is not Kind.U16:
                raise InvalidFormat(
                    f"header of {header.path}: {key} should be {expected} in 16 bits, is {brief(found)}"
                )
    first = parts[0].header
    total = sum(len(part.header.tensors) for part in parts)
    if first.get(_TENSORS) not in (None, total):
        raise InvalidFormat(f"header of {first.path}: {_TENSORS} is {first.get(_TENSORS)}, the parts have {total}")
