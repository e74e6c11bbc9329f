"""One read request: pieces of the layout, each from memory, from the store, or from upstream through the fetcher.

The hit path (`FileReader.try_read`) never awaits and never touches the catalog for a span that is already open. Inside
the segment that was read last it is one preadv into a buffer that is used again for the next reply; elsewhere a bisect
and a dict look-up come before. Everything else is `FileReader.read`.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import trio

from cakefs.buffers import page_aligned
from cakefs.engine.reading import Opened, OpenFile, Prepared, Stored
from cakefs.engine.transfer.flights import Priority
from cakefs.errors import CakeError, CorruptData
from cakefs.model import CHUNK, ByteRange
from cakefs.plan.layout import Kind, Piece
from cakefs.plan.ranges import first
from cakefs.plan.readahead import LOCAL_WINDOW, NOTHING, Ahead
from cakefs.plan.requests import ChunkRef, span_chunks
from cakefs.store.content import Content, Outcome

ROUNDS = 4  # Fetch, look, fetch again: a chunk that is still not right after that is an error.
DONE = Outcome.DONE  # A member of an Enum takes a look-up in its class, here in every read.


class Hot(NamedTuple):
    """The extent that was read last: file bytes `[start, stop)` are those of `content` from `start - shift` on."""

    start: int
    stop: int
    shift: int
    content: Content
    epoch: int


class FileReader:
    """An open handle. `size` is the size of the file in bytes."""

    def __init__(self, file: OpenFile, on_close: Callable[[], None]) -> None:
        self._shared = file.reading
        self._pool = file.reading.pool
        self._counters = file.reading.counters
        self._file = file
        self._staged = file.staged
        self._on_close = on_close
        self._hot: Hot | None = None
        self.size = file.layout.size

    def try_read(self, offset: int, size: int) -> memoryview | None:
        """The bytes `[offset, offset + size)`, cut at the end of the file; None where it would have to wait.

        The buffer is valid until the next call into the engine.
        """
        hot = self._hot
        if not (hot and hot[0] <= offset < hot[1] and hot[4] == self._pool.epoch):
            if offset >= self.size:
                return memoryview(b"")
            hot = self._hot = self._heat(offset)
        if hot and offset + size <= hot[1] and not self._staged.runs:
            buffer = self._shared.reply.hit(size)
            outcome = hot[3].read_into(buffer, offset - hot[2], wait=False)
        else:
            size = min(size, self.size - offset)
            buffer, outcome = self._gathered(offset, size)
        if outcome is not DONE:
            return None
        counters = self._counters
        counters.reads += 1
        counters.hits += 1
        counters.bytes_served += size
        if self._shared.readahead:
            ahead = self._file.readahead.observe(offset, size)
            if ahead is not NOTHING:
                self._prefetch(ahead)
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

    def fill(self, buffer: memoryview, prepared: Prepared) -> Outcome:
        """Waits for the disk and calculates, but touches neither the pool nor the catalog: it may run in a thread.

        Args:
            prepared: By the file that this reads.
        """
        at = 0
        for piece, opened in prepared:
            target = buffer[at : at + piece.size]
            if piece.kind is Kind.LITERAL:
                target[:] = self._file.literals[piece.ref][piece.start : piece.start + piece.size]
            outcome = self._fill_from(piece, opened, target)
            if outcome is not Outcome.DONE:
                return outcome
            at += piece.size
        return Outcome.DONE

    def close(self) -> None:
        """Once for each reader: what nobody has open may be let go."""
        self._on_close()

    async def _read(self, offset: int, stop: int) -> memoryview:
        fetcher, manifest = self._shared.fetcher, self._file.manifest
        for attempt in range(ROUNDS):
            missing = self._missing(offset, stop)
            pendings = fetcher.want(manifest, missing, Priority.DEMAND) if missing else []
            if self._shared.readahead and not attempt:
                self._prefetch(self._file.readahead.observe(offset, stop - offset))
            if missing:
                await fetcher.wait(manifest, pendings)
                self._look_again(missing)
            buffer = await self._filled(offset, stop)
            if buffer is not None:
                return buffer
        raise CorruptData(
            f"bytes {offset}-{stop} of {self._file.manifest.name} do not stay what they were in the store",
            hint="cakefs verify --repair",
        )

    def _look_again(self, arrived: list[ChunkRef]) -> None:
        """Drops what is out of date: repaired, or replaced by another process."""
        for ref in arrived:
            key = self._file.key(ref.span)
            content = self._pool.get(key)
            if content is not None and content.missing(ref.chunk * CHUNK, ref.chunk * CHUNK + 1):
                self._pool.discard(key)

    async def _filled(self, offset: int, stop: int) -> memoryview | None:
        """The reply, from a thread where the disk must be waited for; None when something is missing after all."""
        if self._staged.runs:
            for piece in self._file.layout.locate(offset, stop - offset):
                if piece.kind is Kind.EXTENT:
                    await self._staged.wait(piece.ref, piece.start, piece.start + piece.size)
        buffer, outcome = self._gathered(offset, stop - offset)
        if outcome is Outcome.WOULD_BLOCK:
            if not self._file.readahead.local:
                self._file.readahead.forget()  # What was fetched once lies on a cold disk now: it is asked for anew.
            reply = self._shared.reply
            async with reply.limiter:
                owned = reply.take(stop - offset)
                try:
                    buffer = owned[: stop - offset]
                    prepared = self._file.prepared(offset, stop - offset)
                    outcome = await trio.to_thread.run_sync(self.fill, buffer, prepared)
                finally:
                    reply.give(owned)
        return buffer if outcome is Outcome.DONE else None

    def _gathered(self, offset: int, size: int) -> tuple[memoryview, Outcome]:
        """The reply, without waiting for the disk or calculating; not copied where all of it is staged at one place."""
        pieces = self._file.layout.locate(offset, size)
        if self._staged.runs:
            extents = [piece for piece in pieces if piece.kind is Kind.EXTENT]
            if any(self._staged.on_its_way(p.ref, p.start, p.start + p.size) for p in extents):
                return memoryview(b""), Outcome.WOULD_BLOCK
            if extents == pieces and len(pieces) == 1:
                parts = self._staged.get(pieces[0].ref, pieces[0].start, pieces[0].start + size)
                if parts is not None:
                    return self._joined(parts, size), Outcome.DONE
        buffer = self._shared.reply.hit(size)
        return buffer, self._fill(buffer, pieces)

    def _joined(self, parts: list[memoryview], size: int) -> memoryview:
        if len(parts) == 1:
            return parts[0]
        buffer = self._shared.reply.hit(size)
        _join(parts, buffer)
        return buffer

    def _fill(self, buffer: memoryview, pieces: list[Piece]) -> Outcome:
        at = 0
        for piece in pieces:
            target = buffer if piece.size == len(buffer) else buffer[at : at + piece.size]
            if piece.kind is Kind.EXTENT:
                outcome = self._fill_extent(piece, target)
                if outcome is not Outcome.DONE:
                    return outcome
            elif piece.kind is Kind.LITERAL:
                target[:] = self._file.literals[piece.ref][piece.start : piece.start + piece.size]
            else:
                return Outcome.WOULD_BLOCK
            at += piece.size
        assert at == len(buffer), "the layout has a gap"
        return Outcome.DONE

    def _fill_extent(self, piece: Piece, target: memoryview) -> Outcome:
        if self._staged.runs:
            parts = self._staged.get(piece.ref, piece.start, piece.start + piece.size)
            if parts is not None:
                _join(parts, target)
                return Outcome.DONE
        content = self._pool.get(self._file.key(piece.ref))
        return self._fill_stored(content, Stored(piece.ref, piece.start, piece.size), target, wait=False)

    def _heat(self, offset: int) -> Hot | None:
        """The extent that a byte of the file lies in; None for a byte of no extent, or of one that is not here."""
        found = self._file.layout.extent_at(offset)
        if found is None:
            return None
        start, stop, span, begin = found
        content = self._pool.get(self._file.key(span))
        return None if content is None else Hot(start, stop, start - begin, content, self._pool.epoch)

    def _fill_from(self, piece: Piece, opened: Opened, target: memoryview) -> Outcome:
        computed = piece.kind is Kind.COMPUTED
        inputs = [page_aligned(stored.size) if computed else target for stored, _ in opened]
        for (stored, content), buffer in zip(opened, inputs, strict=True):
            outcome = self._fill_stored(content, stored, buffer, wait=True)
            if outcome is not Outcome.DONE:
                return outcome
            if content is not None and self._shared.cached and not computed:
                with suppress(OSError, ValueError):  # an advice that is not taken does no harm
                    content.wontneed(stored.start, stored.start + stored.size)
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
            for stored, content in self._file.opened(piece):
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

    def _prefetch(self, ahead: Ahead) -> None:
        if ahead.soon:
            self._want(ahead.soon, soon=True)
        if ahead.later:
            self._want(ahead.later, soon=False)

    def _want(self, ranges: list[ByteRange], *, soon: bool) -> None:
        """Asks for what is not local, as far as there is capacity to spare; what is may be read from the disk ahead."""
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
            file.readahead.take_back(file.staged.ask(first(ranges, LOCAL_WINDOW)))
        file.readahead.local = not wanted


def _join(parts: list[memoryview], target: memoryview) -> None:
    at = 0
    for part in parts:
        target[at : at + len(part)] = part
        at += len(part)
