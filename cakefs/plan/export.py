"""Which bytes of a file can share blocks with the store's blobs, and the layout with which most of them can.

A clone shares whole blocks of a file system: it begins at a multiple of the block in both files. The format allows
spaces behind the header but no hole between tensors. So the header is padded to a block, the tensors that fill blocks
come first, and all others behind them; only the first of those begins at a block again, so that is the largest. Names,
dtypes, shapes, values and metadata are those of the file; its order, and so its SHA-256, is not.
"""

from collections.abc import Iterator
from typing import NamedTuple

from cakefs.errors import InvalidFormat
from cakefs.formats.safetensors import HEADER_LIMIT, Header, TensorEntry, build_header
from cakefs.model import INLINE_LIMIT, Extent, File, Literal, Manifest, Segment, Source

_WIDEST = 8  # Bytes of an element at most: behind a tensor of a multiple of it, all others lie as well as before.


class Shared(NamedTuple):
    """`size` bytes at `offset` of a file that may be clones of those in `spans[span]` from `start` on."""

    offset: int
    span: int
    start: int
    size: int


def upstream_of(manifest: Manifest, file: File) -> Source | None:
    """The published file that has exactly these bytes, if one has."""
    position, sources = 0, set()
    for segment in file.segments:
        if not isinstance(segment, Extent):
            return None
        span = manifest.spans[segment.span]
        if segment.size and span.start + segment.start != position:
            return None
        position += segment.size
        sources.add(span.source)
    if len(sources) != 1:
        return None
    source = manifest.sources[sources.pop()]
    return source if source.locator.size == file.size else None


def shareable(manifest: Manifest, file: File, block: int) -> Iterator[Shared]:
    """In the order of the file. A last block that is not full may be shared at the end of both."""
    offset = 0
    for segment in file.segments:
        if isinstance(segment, Extent) and offset % block == 0 and _has_blocks(manifest, segment, block):
            at_ends = segment.stop == manifest.spans[segment.span].size and offset + segment.size == file.size
            size = segment.size if at_ends else segment.size // block * block
            yield Shared(offset, segment.span, segment.start, size)
        offset += segment.size


def _has_blocks(manifest: Manifest, segment: Segment, block: int) -> bool:
    return (
        isinstance(segment, Extent)
        and segment.size >= block
        and segment.start % block == 0
        and manifest.spans[segment.span].size > INLINE_LIMIT
    )


def aligned(manifest: Manifest, file: File, header: Header, block: int) -> tuple[File, bytes] | None:
    """The same tensors laid out for sharing, and the new header: what the first segment, a literal, stands for.

    Args:
        header: What the file has now.

    Returns:
        None where the segments are not one for each tensor, or the header would become too long.
    """
    pairs = list(zip(header.entries, file.segments[1:], strict=False))
    if len(file.segments) != len(header.entries) + 1 or any(e.size != s.size for e, s in pairs):
        return None
    pairs = _ordered(manifest, pairs, block)
    try:
        data = _padded(build_header((entry for entry, _ in pairs), header.metadata, file.path), block)
    except InvalidFormat:
        return None
    segments = (Literal("", len(data)), *(segment for _, segment in pairs))
    return File(file.path, sum(s.size for s in segments), file.view, segments), data


def _ordered(
    manifest: Manifest, pairs: list[tuple[TensorEntry, Segment]], block: int
) -> list[tuple[TensorEntry, Segment]]:
    full = [p for p in pairs if p[1].size % block == 0 and _has_blocks(manifest, p[1], block)]
    chosen = {entry.name for entry, _ in full}
    rest = [p for p in pairs if p[0].name not in chosen]
    partly = [p for p in rest if p[1].size % _WIDEST == 0 and _has_blocks(manifest, p[1], block)]
    if partly:
        first = max(partly, key=lambda p: p[1].size)
        rest.remove(first)
        rest.insert(0, first)
    return full + rest


def _padded(header: bytes, block: int) -> bytes:
    """Raises InvalidFormat where no reader would take it any more."""
    padding = -len(header) % block
    length = len(header) - 8 + padding
    if length > HEADER_LIMIT:
        raise InvalidFormat(f"a header of {length} bytes")
    return length.to_bytes(8, "little") + header[8:] + b" " * padding
