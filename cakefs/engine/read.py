"""One read request: pieces of the layout, each from memory, from the store, or from upstream through the fetcher.

The hit path (`FileReader.try_read`) never awaits and never touches the catalog for a span that is already open: a
bisect, a dict look-up and one preadv into a buffer that is used again for the next reply. Everything else is
`FileReader.read`.
"""

import math
from array import array
from collections.abc import Callable
from typing import NamedTuple

import trio

from cakefs.engine.fetch import Fetcher, Priority
from cakefs.engine.local import ContentPool
from cakefs.errors import CakeError, CorruptData
from cakefs.model import CHUNK, MIB, ByteRange, File, Manifest, SpanKey
from cakefs.plan.layout import Kind, Layout, Piece
from cakefs.plan.readahead import Readahead
from cakefs.plan.requests import ChunkRef, span_chunks
from cakefs.store.content import Content, Outcome

ROUNDS = 4  # Fetch, look, fetch again: a chunk that is still not right after that is an error.
REPLY = MIB  # The largest request of the kernel; the reply buffer grows if one is larger.
BLOCKING_READS = 8  # Threads (and their buffers) that wait for the disk at the same time.
ANNOUNCED = 32 * MIB  # How far ahead of a reader a cold disk is told (1.6x; more gained nothing).


class Reply:
    """The reply buffers: one for hits, valid until the next read begins; a few for reads that wait in threads."""

    def __init__(self) -> None:
        self._hit = memoryview(bytearray(REPLY))
        self._free = [memoryview(bytearray(REPLY)) for _ in range(BLOCKING_READS)]
        self.limiter = trio.CapacityLimiter(BLOCKING_READS)

    def hit(self, size: int) -> memoryview:
        if size > len(self._hit):
            self._hit = memoryview(bytearray(size))
        return self._hit[:size]

    def take(self, size: int) -> memoryview:
        buffer = self._free.pop()
        return buffer if size <= len(buffer) else memoryview(bytearray(size))

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
    """What all readers of a process share."""

    def __init__(self, pool: ContentPool, fetcher: Fetcher, *, readahead: bool = True) -> None:
        self.pool = pool
        self.fetcher = fetcher
        self.readahead = readahead
        self.counters = ReadCounters()
        self.reply = Reply()
        self._tell_refuted, self.refuted = trio.open_memory_channel[str](math.inf)
        fetcher.on_refuted = self._drop

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


class OpenFile:
    """One file of one manifest, prepared: layout, literal bytes, the reader's pattern. Shared by all its handles."""

    def __init__(self, manifest: Manifest, file: File, literals: list[bytes]) -> None:
        self.manifest = manifest
        self.layout = Layout.of(file)
        self.literals = literals
        self._keys: dict[int, SpanKey] = {}
        bounds = [self.layout.bounds(i) for i in range(len(self.layout))]
        header = len(bounds) > 1  # Every file of several segments begins with one: safetensors or GGUF.
        self.readahead = Readahead(array("Q", (b.start for b in bounds[header:])), self.layout.size)
        if self.layout.computed:
            from cakefs.plan import compute  # numpy, 0.1 s: only for those who need it

            self.compute = compute

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


class FileReader:
    """An open handle. `size` is the size of the file in bytes."""

    def __init__(self, shared: Reading, file: OpenFile, on_close: Callable[[], None]) -> None:
        self._shared = shared
        self._file = file
        self._on_close = on_close
        self.size = file.layout.size

    def try_read(self, offset: int, size: int) -> memoryview | None:
        """The bytes `[offset, offset + size)`, cut at the end of the file; None where it would have to wait.

        The buffer is valid until the next call into the engine.
        """
        stop = min(offset + size, self.size)
        if offset >= stop:
            return memoryview(b"")
        buffer = self._shared.reply.hit(stop - offset)
        if self._fill(buffer, offset) is not Outcome.DONE:
            return None
        counters = self._shared.counters
        counters.reads += 1
        counters.hits += 1
        counters.bytes_served += stop - offset
        self._look_ahead(offset, stop - offset)
        return buffer

    async def read(self, offset: int, size: int) -> memoryview:
        """As `try_read`, but waits for the disk and for upstream.

        Raises:
            CakeError: After the fetcher's bounded retries; CorruptData when the store cannot give what it says it has.
        """
        stop = min(offset + size, self.size)
        counters = self._shared.counters
        counters.reads += 1
        counters.waits += 1
        try:
            buffer = await self._read(offset, stop)
        except CakeError:
            counters.errors += 1
            self._file.readahead.forget()
            raise
        counters.bytes_served += stop - offset
        return buffer

    def close(self) -> None:
        """Once for each reader: what nobody has open may be let go."""
        self._on_close()

    async def _read(self, offset: int, stop: int) -> memoryview:
        for _ in range(ROUNDS):
            missing = self._missing(offset, stop)
            if missing:
                await self._fetch(missing, offset, stop)
            buffer = await self._filled(offset, stop)
            if buffer is not None:
                return buffer
        raise CorruptData(
            f"bytes {offset}-{stop} of {self._file.manifest.name} do not stay what they were in the store",
            hint="cakefs verify --repair",
        )

    async def _fetch(self, missing: list[ChunkRef], offset: int, stop: int) -> None:
        shared, file = self._shared, self._file
        pendings = shared.fetcher.want(file.manifest, missing, Priority.DEMAND)
        self._look_ahead(offset, stop - offset)
        await shared.fetcher.wait(file.manifest, pendings)
        for ref in missing:
            content = shared.pool.get(file.key(ref.span))
            if content is not None and content.missing(ref.chunk * CHUNK, ref.chunk * CHUNK + 1):
                shared.pool.discard(file.key(ref.span))  # Out of date: repaired, or replaced by another process.

    async def _filled(self, offset: int, stop: int) -> memoryview | None:
        """The reply, from a thread where the disk must be waited for; None when something is missing after all."""
        buffer = self._shared.reply.hit(stop - offset)
        outcome = self._fill(buffer, offset)
        if outcome is Outcome.WOULD_BLOCK:
            reply = self._shared.reply
            async with reply.limiter:
                owned = reply.take(stop - offset)
                try:
                    buffer = owned[: stop - offset]
                    pieces = self._file.layout.locate(offset, stop - offset)
                    opened = [(piece, self._opened(piece)) for piece in pieces]
                    outcome = await trio.to_thread.run_sync(self._fill_opened, buffer, opened)
                finally:
                    reply.give(owned)
        return buffer if outcome is Outcome.DONE else None

    def _fill(self, buffer: memoryview, offset: int) -> Outcome:
        """Without waiting for the disk or calculating."""
        at = 0
        for piece in self._file.layout.locate(offset, len(buffer)):
            target = buffer if piece.size == len(buffer) else buffer[at : at + piece.size]
            if piece.kind is Kind.EXTENT:
                content = self._shared.pool.get(self._file.key(piece.ref))
                outcome = self._fill_stored(content, Stored(piece.ref, piece.start, piece.size), target, wait=False)
                if outcome is not Outcome.DONE:
                    return outcome
            elif piece.kind is Kind.LITERAL:
                target[:] = self._file.literals[piece.ref][piece.start : piece.start + piece.size]
            else:
                return Outcome.WOULD_BLOCK
            at += piece.size
        assert at == len(buffer), "the layout has a gap"
        return Outcome.DONE

    def _opened(self, piece: Piece) -> Opened:
        return [(stored, self._shared.pool.get(self._file.key(stored.span))) for stored in self._file.stored(piece)]

    def _fill_opened(self, buffer: memoryview, pieces: list[tuple[Piece, Opened]]) -> Outcome:
        """In a thread: waits for the disk and calculates, but touches neither the pool nor the catalog."""
        at = 0
        for piece, opened in pieces:
            target = buffer[at : at + piece.size]
            if piece.kind is Kind.LITERAL:
                target[:] = self._file.literals[piece.ref][piece.start : piece.start + piece.size]
            outcome = self._fill_from(piece, opened, target)
            if outcome is not Outcome.DONE:
                return outcome
            at += piece.size
        return Outcome.DONE

    def _fill_from(self, piece: Piece, opened: Opened, target: memoryview) -> Outcome:
        computed = piece.kind is Kind.COMPUTED
        inputs = [memoryview(bytearray(stored.size)) if computed else target for stored, _ in opened]
        for (stored, content), buffer in zip(opened, inputs, strict=True):
            outcome = self._fill_stored(content, stored, buffer, wait=True)
            if outcome is not Outcome.DONE:
                return outcome
        if computed:
            node = self._file.layout.computed[piece.ref]
            target[:] = self._file.compute.evaluate(node, piece.start, piece.start + piece.size, inputs)
        return Outcome.DONE

    def _fill_stored(self, content: Content | None, stored: Stored, target: memoryview, *, wait: bool) -> Outcome:
        outcome = Outcome.MISSING if content is None else content.read_into(target, stored.start, wait=wait)
        if outcome is Outcome.MISSING and self._shared.fetcher.has_unkept:
            return self._fill_by_chunk(content, stored, target)
        return outcome

    def _fill_by_chunk(self, content: Content | None, stored: Stored, target: memoryview) -> Outcome:
        """The store is full: some chunks are in it, others only in the fetcher's memory, for a while."""
        key, start, stop = self._file.key(stored.span), stored.start, stored.start + stored.size
        for _, chunk in span_chunks(stored.span, start, stop):
            base = chunk * CHUNK
            first, last = max(start, base), min(stop, base + CHUNK)
            part = target[first - start : last - start]
            data = self._shared.fetcher.unkept(key, chunk)
            if data is not None:
                part[:] = data[first - base : last - base]
            elif content is None or content.read_into(part, first, wait=True) is not Outcome.DONE:
                return Outcome.MISSING
        return Outcome.DONE

    def _missing(self, offset: int, stop: int) -> list[ChunkRef]:
        missing: list[ChunkRef] = []
        for piece in self._file.layout.locate(offset, stop - offset):
            for stored, content in self._opened(piece):
                missing += self._absent(stored, content)
        return missing

    def _absent(self, stored: Stored, content: Content | None) -> list[ChunkRef]:
        """The chunks that are neither in the store nor held by the fetcher."""
        stop = stored.start + stored.size
        if content is None:
            wanted = list(span_chunks(stored.span, stored.start, stop))
        else:
            wanted = [ChunkRef(stored.span, chunk) for chunk in content.missing(stored.start, stop)]
        key, fetcher = self._file.key(stored.span), self._shared.fetcher
        return [ref for ref in wanted if fetcher.unkept(key, ref.chunk) is None] if fetcher.has_unkept else wanted

    def _look_ahead(self, offset: int, size: int) -> None:
        if self._shared.readahead:
            ahead = self._file.readahead.observe(offset, size)
            if ahead.soon:
                self._prefetch(ahead.soon, soon=True)
            if ahead.later:
                self._prefetch(ahead.later, soon=False)

    def _prefetch(self, ranges: list[ByteRange], *, soon: bool) -> None:
        """Asks for what is not local, as far as there is capacity to spare, and announces the rest to the kernel."""
        shared, file = self._shared, self._file
        wanted: list[ChunkRef] = []
        for ahead in ranges:
            for piece in file.layout.locate(ahead.start, ahead.size):
                for stored in file.stored(piece):
                    key = file.key(stored.span)
                    if not shared.pool.is_sealed(key):
                        wanted += self._absent(stored, shared.pool.get(key))
        if wanted:
            shared.fetcher.want_ahead(file.manifest, wanted, soon=soon)
        else:
            self._announce(ranges[0])

    def _announce(self, ahead: ByteRange) -> None:
        for piece in self._file.layout.locate(ahead.start, min(ahead.size, ANNOUNCED)):
            for stored, content in self._opened(piece):
                if content is not None:
                    content.willneed(stored.start, stored.start + stored.size)
