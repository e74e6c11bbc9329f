"""Missing chunks -> the ranges to ask upstream for. Pure; `plan` shows exactly what `pull` would request."""

from collections.abc import Iterable, Iterator, Sequence, Set
from typing import NamedTuple

from cakefs.model import CHUNK, KIB, MIB, Manifest

REQUEST_LIMIT = (
    4 * MIB
)  # Large against the 0.7 ms of CPU that a request costs, small enough that 8 share a link evenly.

GAP_LIMIT = 4 * KIB  # The members of a torch archive are some dozen to some hundred bytes apart.
BATCH_BYTES = 64 * MIB  # Asked for at once by pull: enough to coalesce, little enough that the progress bar moves.
BATCH_CHUNKS = 4096  # The same for many small tensors.


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


def span_chunks(span: int, start: int, stop: int) -> list[ChunkRef]:
    """The chunks that hold the bytes `[start, stop)` of a span."""
    return [ChunkRef(span, chunk) for chunk in range(start // CHUNK, -(-stop // CHUNK))]


def gaps(manifest: Manifest, spans: Set[int]) -> set[int]:
    """Small spans that lie between two of these.

    Fetched with them, they make one request of many, and complete the file, so that its hash can be confirmed.
    """
    places = manifest.spans
    small = [i for i, s in enumerate(places) if i not in spans and 0 < s.stop - s.start <= GAP_LIMIT]
    if not small:
        return set()
    starts = {(places[i].source, places[i].start) for i in spans}
    stops = {(places[i].source, places[i].stop) for i in spans}
    return {
        i
        for i in small
        if (places[i].source, places[i].stop) in starts and (places[i].source, places[i].start) in stops
    }


def chunks_size(manifest: Manifest, refs: Sequence[ChunkRef]) -> int:
    """Bytes of rising chunks of one span."""
    if not refs:
        return 0
    index, last = refs[-1]
    span = manifest.spans[index]
    return (len(refs) - 1) * CHUNK + min(CHUNK, span.stop - span.start - last * CHUNK)


def batches(manifest: Manifest, missing: Iterable[Sequence[ChunkRef]]) -> Iterator[list[ChunkRef]]:
    """What a pull wants at once: ranges are joined within a batch. `plan` cuts at the same places.

    Args:
        missing: Of each span, in the order of the pull; looked at only when its turn has come.
    """
    batch: list[ChunkRef] = []
    size = 0
    for refs in missing:
        batch += refs
        size += chunks_size(manifest, refs)
        if size >= BATCH_BYTES or len(batch) >= BATCH_CHUNKS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def pull_requests(manifest: Manifest, missing: Iterable[Sequence[ChunkRef]]) -> Iterator[RangeRequest]:
    """The very requests that a pull makes for these chunks."""
    for batch in batches(manifest, missing):
        yield from range_requests(manifest, batch)


def range_requests(manifest: Manifest, refs: Iterable[ChunkRef], limit: int = REQUEST_LIMIT) -> Iterator[RangeRequest]:
    """Joins chunks that follow each other in an upstream file into requests of at most `limit` bytes (or one chunk)."""
    places = iter(sorted({_place(manifest, ref) for ref in refs}))
    first = next(places, None)
    if first is None:
        return
    source, begin, end, index = first
    joined = [index]
    for place in places:
        if place[0] == source and place[1] == end and place[2] - begin <= limit:
            _, _, end, index = place
            if index != joined[-1]:
                joined.append(index)
        else:
            yield _request(manifest, source, begin, end, joined)
            source, begin, end, index = place
            joined = [index]
    yield _request(manifest, source, begin, end, joined)


def _request(manifest: Manifest, source: int, start: int, stop: int, indices: Sequence[int]) -> RangeRequest:
    spans = (manifest.spans[index] for index in indices)
    return RangeRequest(source, start, stop, tuple((span.start, span.stop) for span in spans))


def _place(manifest: Manifest, ref: ChunkRef) -> tuple[int, int, int, int]:
    """source, start and stop of a chunk in it, span."""
    span = manifest.spans[ref.span]
    start = span.start + ref.chunk * CHUNK
    return span.source, start, min(start + CHUNK, span.stop), ref.span
