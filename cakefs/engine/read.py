"""One read request: pieces of the layout, each from memory, from the store, or from upstream through the fetcher.

The hit path (`FileReader.try_read`) never awaits and never touches the catalog for a span that is already open: a
bisect, a dict look-up and one preadv into a buffer that is used again for the next reply. Everything else is
`FileReader.read`.
"""

import math
from array import array

import trio

from cakefs.engine.fetch import Fetcher, Priority
from cakefs.engine.local import ContentPool
from cakefs.errors import CakeError, CorruptData
from cakefs.model import CHUNK, MIB, ByteRange, File, Manifest, SpanKey
from cakefs.plan.layout import Layout, Piece
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

    def key(self, span: int) -> SpanKey:
        key = self._keys.get(span)
        if key is None:
            key = self._keys[span] = self.manifest.key(span)
        return key


class FileReader:
    """An open handle. `size` is the size of the file in bytes."""

    def __init__(self, shared: Reading, file: OpenFile) -> None:
        self._shared = shared
        self._file = file
        self.size = file.layout.size

    def try_read(self, offset: int, size: int) -> memoryview | None:
        """The bytes `[offset, offset + size)`, cut at the end of the file; None where it would have to wait.

        The buffer is valid until the next call into the engine.
        """
        stop = min(offset + size, self.size)
        if offset >= stop:
            return memoryview(b"")
        buffer = self._shared.reply.hit(stop - offset)
        if self._fill(buffer, offset, wait=False) is not Outcome.DONE:
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
        """Nothing is held by a handle alone."""

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
        outcome = self._fill(buffer, offset, wait=False)
        if outcome is Outcome.WOULD_BLOCK:
            reply = self._shared.reply
            async with reply.limiter:
                owned = reply.take(stop - offset)
                try:
                    buffer = owned[: stop - offset]
                    pieces = [(self._open(p), p) for p in self._file.layout.locate(offset, stop - offset)]
                    outcome = await trio.to_thread.run_sync(self._fill_opened, buffer, pieces)
                finally:
                    reply.give(owned)
        return buffer if outcome is Outcome.DONE else None

    def _fill(self, buffer: memoryview, offset: int, *, wait: bool) -> Outcome:
        pieces = self._file.layout.locate(offset, len(buffer))
        if len(pieces) == 1:
            return self._fill_piece(self._open(pieces[0]), pieces[0], buffer, wait)
        at = 0
        for piece in pieces:
            outcome = self._fill_piece(self._open(piece), piece, buffer[at : at + piece.size], wait)
            if outcome is not Outcome.DONE:
                return outcome
            at += piece.size
        assert at == len(buffer), "the layout has a gap"
        return Outcome.DONE

    def _fill_opened(self, buffer: memoryview, pieces: list[tuple[Content | None, Piece]]) -> Outcome:
        """In a thread: touches neither the pool nor the catalog."""
        at = 0
        for content, piece in pieces:
            outcome = self._fill_piece(content, piece, buffer[at : at + piece.size], True)
            if outcome is not Outcome.DONE:
                return outcome
            at += piece.size
        return Outcome.DONE

    def _open(self, piece: Piece) -> Content | None:
        return None if piece.literal else self._shared.pool.get(self._file.key(piece.ref))

    def _fill_piece(self, content: Content | None, piece: Piece, target: memoryview, wait: bool) -> Outcome:
        if piece.literal:
            target[:] = self._file.literals[piece.ref][piece.start : piece.start + piece.size]
            return Outcome.DONE
        outcome = Outcome.MISSING if content is None else content.read_into(target, piece.start, wait=wait)
        if outcome is Outcome.MISSING and self._shared.fetcher.has_unkept:
            return self._fill_by_chunk(content, piece, target)
        return outcome

    def _fill_by_chunk(self, content: Content | None, piece: Piece, target: memoryview) -> Outcome:
        """The store is full: some chunks are in it, others only in the fetcher's memory, for a while."""
        key, stop = self._file.key(piece.ref), piece.start + piece.size
        for _, chunk in span_chunks(piece.ref, piece.start, stop):
            base = chunk * CHUNK
            first, last = max(piece.start, base), min(stop, base + CHUNK)
            part = target[first - piece.start : last - piece.start]
            data = self._shared.fetcher.unkept(key, chunk)
            if data is not None:
                part[:] = data[first - base : last - base]
            elif content is None or content.read_into(part, first, wait=True) is not Outcome.DONE:
                return Outcome.MISSING
        return Outcome.DONE

    def _missing(self, offset: int, stop: int) -> list[ChunkRef]:
        missing: list[ChunkRef] = []
        for piece in self._file.layout.locate(offset, stop - offset):
            if not piece.literal:
                missing += self._absent(piece, self._open(piece))
        return missing

    def _absent(self, piece: Piece, content: Content | None) -> list[ChunkRef]:
        """The chunks of a piece that are neither in the store nor held by the fetcher."""
        stop = piece.start + piece.size
        if content is None:
            wanted = list(span_chunks(piece.ref, piece.start, stop))
        else:
            wanted = [ChunkRef(piece.ref, chunk) for chunk in content.missing(piece.start, stop)]
        key, fetcher = self._file.key(piece.ref), self._shared.fetcher
        return [ref for ref in wanted if fetcher.unkept(key, ref.chunk) is None] if fetcher.has_unkept else wanted

    def _look_ahead(self, offset: int, size: int) -> None:
        if self._shared.readahead:
            for ahead in self._file.readahead.observe(offset, size):
                self._prefetch(ahead)

    def _prefetch(self, ahead: ByteRange) -> None:
        """Announces what is local to the kernel and asks for what is not, as far as there is capacity to spare."""
        shared, wanted = self._shared, list[ChunkRef]()
        for piece in self._file.layout.locate(ahead.start, ahead.size):
            key = None if piece.literal else self._file.key(piece.ref)
            if key is None or shared.pool.is_sealed(key):
                continue
            wanted += self._absent(piece, shared.pool.get(key))
        if wanted:
            shared.fetcher.want_ahead(self._file.manifest, wanted)
        for piece in self._file.layout.locate(ahead.start, min(ahead.size, ANNOUNCED)):
            content = self._open(piece)
            if content is not None:
                content.willneed(piece.start, piece.start + piece.size)
