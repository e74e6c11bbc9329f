"""What the readers of a process share, and what those of one file do: made ready when it is opened."""

import math
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import trio

from cakefs.buffers import huge_pages, page_aligned
from cakefs.engine.fetch import Fetcher
from cakefs.engine.local import ContentPool
from cakefs.engine.staged import Part, Stage, Staged
from cakefs.model import INLINE_LIMIT, MIB, ByteRange, File, Manifest, SpanKey
from cakefs.plan.layout import Kind, Layout, Piece, header_segments
from cakefs.plan.readahead import Readahead
from cakefs.store.content import Content

REPLY = MIB  # The largest request of the kernel; the reply buffer grows if one is larger.
BLOCKING_READS = 8  # Threads (and their buffers) that wait for the disk at the same time.
EVERY_SOURCE = "*"  # In the place of an identity.


class Reply:
    """The reply buffers: one for hits, valid until the next read begins; a few for reads that wait in threads."""

    def __init__(self) -> None:
        self._hit = huge_pages(2 * REPLY)
        self._free = [page_aligned(REPLY) for _ in range(BLOCKING_READS)]
        self.limiter = trio.CapacityLimiter(BLOCKING_READS)

    def hit(self, size: int) -> memoryview:
        if size > len(self._hit):
            self._hit = page_aligned(size)
        return self._hit[:size]

    def take(self, size: int) -> memoryview:
        buffer = self._free.pop()
        return buffer if size <= len(buffer) else page_aligned(size)

    def give(self, buffer: memoryview) -> None:
        """Back before the reply is sent: safe, as no other task runs between here and the send."""
        self._free.append(buffer)


class ReadCounters:
    """What `status` shows of reading; only ever grows."""

    def __init__(self) -> None:
        self.reads = 0
        self.bytes_served = 0
        self.hits = 0
        self.waits = 0
        self.errors = 0


class Reading:
    """What all readers of a process share.

    Args:
        readahead: Whether what a reader will most likely come to is fetched ahead of it.
        cached: Whoever reads keeps what was read, as the kernel does for a mount.
    """

    def __init__(self, pool: ContentPool, fetcher: Fetcher, *, readahead: bool = True, cached: bool = False) -> None:
        self.pool = pool
        self.fetcher = fetcher
        self.readahead = readahead
        self.cached = cached
        self.counters = ReadCounters()
        self.reply = Reply()
        self.stage = Stage()
        self._tell_refuted, self.refuted = trio.open_memory_channel[str](math.inf)
        fetcher.on_refuted = self._drop

    def drop_all(self) -> None:
        """Another process found a file to be wrong, and by now it may be right again: which one is not asked."""
        self.pool.discard_all()
        self._tell_refuted.send_nowait(EVERY_SOURCE)

    def _drop(self, identity: str) -> None:
        """A file failed its SHA-256: what is open of it is not served any more, by us or by who remembers it."""
        self.pool.discard_source(identity)
        self._tell_refuted.send_nowait(identity)


class Stored(NamedTuple):
    """Bytes of a span that a piece is made of."""

    span: int
    start: int
    size: int


Opened = list[tuple[Stored, Content | None]]
"""The stored bytes of a piece with what the store has of their spans."""
Prepared = list[tuple[Piece, Opened]]
"""Pieces of a file, opened."""


class OpenFile:
    """One file of one manifest, prepared: layout, literal bytes, the reader's pattern. Shared by all its handles.

    Args:
        literals: The bytes of the file's literals, in their order.
    """

    def __init__(self, reading: Reading, manifest: Manifest, file: File, literals: list[bytes]) -> None:
        self.reading = reading
        self.manifest = manifest
        self.staged = Staged(reading.stage, self._parts, lambda: reading.pool.epoch, cached=reading.cached)
        self.layout = Layout.of(file)
        self.literals = literals
        self.handles = 0
        self._keys: dict[int, SpanKey] = {}
        bounds = [self.layout.bounds(i) for i in range(len(self.layout))]
        header = header_segments(manifest, file)
        self.readahead = Readahead(array("Q", (b.start for b in bounds[header:])), self.layout.size)
        if self.layout.computed:
            from cakefs.plan import compute  # numpy, 0.1 s: only for those who need it

            self.compute = compute

    def wanted_keys(self) -> list[SpanKey]:
        """Of the spans that were asked for so far."""
        return list(self._keys.values())

    def key(self, span: int) -> SpanKey:
        key = self._keys.get(span)
        if key is None:
            key = self._keys[span] = self.manifest.key(span)
        return key

    def stored(self, piece: Piece) -> list[Stored]:
        """What of the store a piece is made of: itself, nothing for a literal, the inputs of a calculation."""
        if piece.kind is Kind.EXTENT:
            return [Stored(piece.ref, piece.start, piece.size)]
        if piece.kind is Kind.LITERAL:
            return []
        needs = self.compute.needs(self.layout.computed[piece.ref], piece.start, piece.start + piece.size)
        return [Stored(need.extent.span, need.start, need.stop - need.start) for need in needs]

    def prepared(self, offset: int, size: int) -> Prepared:
        """What there is of these bytes, so that a thread can read them without the pool or the catalog."""
        return [(piece, self.opened(piece)) for piece in self.layout.locate(offset, size)]

    def opened(self, piece: Piece) -> Opened:
        return [(stored, self.reading.pool.get(self.key(stored.span))) for stored in self.stored(piece)]

    def _parts(self, wanted: Sequence[ByteRange]) -> list[Part]:
        """What of the store is there that may be on the disk."""
        found = []
        for part in wanted:
            place = part.start
            for piece in self.layout.locate(part.start, part.size):
                for (span, start, size), content in self.opened(piece):
                    if content is not None and self.manifest.spans[span].size > INLINE_LIMIT:
                        found.append(Part(span, content, start, start + size, place, piece.kind is Kind.EXTENT))
                place += piece.size
        return found
