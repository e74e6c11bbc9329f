"""Missing chunks -> the ranges to ask upstream for. Pure; `plan` shows exactly what `pull` would request."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from cakefs.model import CHUNK, MIB, Manifest

REQUEST_LIMIT = (
    4 * MIB
)  # Large against the 0.7 ms of CPU that a request costs, small enough that 8 share a link evenly.


class ChunkRef(NamedTuple):
    """Chunk `chunk` of `manifest.spans[span]`."""

    span: int
    chunk: int


class RangeRequest(NamedTuple):
    """`[start, stop)` of `manifest.sources[source]`, and the spans `(start, stop)` that it falls into, rising."""

    source: int
    start: int
    stop: int
    spans: tuple[tuple[int, int], ...]


def span_chunks(span: int, start: int, stop: int) -> Iterator[ChunkRef]:
    """The chunks that hold the bytes `[start, stop)` of a span."""
    return (ChunkRef(span, chunk) for chunk in range(start // CHUNK, -(-stop // CHUNK)))


def range_requests(manifest: Manifest, refs: Iterable[ChunkRef], limit: int = REQUEST_LIMIT) -> Iterator[RangeRequest]:
    """Joins chunks that follow each other in an upstream file into requests of at most `limit` bytes (or one chunk)."""
    current: RangeRequest | None = None
    for source, start, stop, index in sorted({_place(manifest, ref) for ref in refs}):
        span = (manifest.spans[index].start, manifest.spans[index].stop)
        if current and current.source == source and current.stop == start and stop - current.start <= limit:
            spans = current.spans if current.spans[-1] == span else (*current.spans, span)
            current = RangeRequest(source, current.start, stop, spans)
            continue
        if current:
            yield current
        current = RangeRequest(source, start, stop, (span,))
    if current:
        yield current


def _place(manifest: Manifest, ref: ChunkRef) -> tuple[int, int, int, int]:
    """source, start and stop of a chunk in it, span."""
    span = manifest.spans[ref.span]
    start = span.start + ref.chunk * CHUNK
    return span.source, start, min(start + CHUNK, span.stop), ref.span
