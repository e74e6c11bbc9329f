"""What `add` reads of upstream files: small ones whole, of large ones the header; from the store what it has of them.

Every file is a stranger's. What breaks its format is an `Unreadable`, told apart from a remote that fails, and no file
makes us ask for more than `MOST_BYTES` in `MOST_REQUESTS`, or hold more than that in memory.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sized
from functools import partial
from itertools import islice
from typing import TypeVar

import trio

from cakefs.buffers import page_aligned
from cakefs.engine.local import read_part, stream
from cakefs.engine.tasks import open_flat_nursery
from cakefs.errors import CorruptData, InvalidFormat
from cakefs.formats import gguf, safetensors
from cakefs.formats.ggufalike import read_alike
from cakefs.formats.steps import Steps
from cakefs.formats.torchckpt import Checkpoint, read_checkpoint
from cakefs.model import KIB, MIB, ByteRange, Locator, Published, SpanKey
from cakefs.plan.compose import piece_ranges
from cakefs.plan.ranges import coalesce, subtract
from cakefs.remotes.base import Remote, read
from cakefs.store.content import Outcome
from cakefs.store.store import Store

AT_ONCE = 16  # Requests for headers and small files on their way together.
LARGE_AT_ONCE = 3  # GGUF and torch files that are read together: each may take MOST_BYTES of memory.
MOST_TENSORS = 500_000  # Of all GGUF and torch files of a model: 200 quantizations of the largest models of today.
MOST_TOGETHER = 1024 * MIB  # Fetched of all of them.
MOST_BYTES = 96 * MIB  # Fetched of one file; a GGUF header may have 64 MiB, pickle and directory of an archive 80.
MOST_REQUESTS = 20_000  # One for each storage of a checkpoint, where they are far apart.
GGUF_LOOK = 256 * KIB  # Bytes of the first look: a small vocabulary fits.
AROUND = 512  # Bytes taken with each range of a checkpoint, so that what is between two storages is here as a whole.
BRIDGED = 64 * KIB  # Between two ranges: fetched with them, as that is cheaper than another request.
LOOKS = 16  # Pieces that a stored GGUF header may have.
DONE = Outcome.DONE
_ENDLESS = 1 << 63

T = TypeVar("T")
H = TypeVar("H", gguf.Header, Checkpoint, gguf.Header | None)


class Unreadable(InvalidFormat):
    """The file breaks its format; nothing is wrong with the way to it."""


class Upstream:
    """Reads upstream files for a manifest, and keeps what it reads.

    Args:
        remote: Already bounded in retries and concurrency.

    Attributes:
        fetched: Bytes that came over the network.
        looked: Bytes that GGUF and torch files took of that, or would have taken.
    """

    def __init__(self, store: Store, remote: Remote) -> None:
        self._store = store
        self._remote = remote
        self._limit = trio.CapacityLimiter(AT_ONCE)
        self._large = trio.CapacityLimiter(LARGE_AT_ONCE)
        self._like: gguf.Header | None = None  # the last that was read from end to end and has long arrays
        self._tensors = 0
        self.looked = 0
        self.fetched = 0

    async def whole(self, published: Published) -> bytes:
        """A small file, checked against its published hash where there is one."""
        key = SpanKey(published.identity, 0, published.size)
        if published.size == 0:
            return b""
        known = self._known(key)
        if known is not None:
            return known
        data = await self.fetch(published, 0, published.size)
        check_published(published, data)
        self._store.put_span(key, data)
        return data

    async def safetensors_header(self, published: Published, guess: int) -> safetensors.Header:
        """The header of a safetensors file, in one request when `guess` bytes are enough, else in two.

        Raises Unreadable.
        """
        known = self._known_safetensors(published)
        if known is not None:
            return known
        if published.size < 8:
            raise Unreadable(f"{published.path}: {published.size} bytes is too short for safetensors")
        data = await self.fetch(published, 0, min(max(guess, 8), published.size))
        size = _checked(lambda: safetensors.header_size(data[:8], published.path))
        if size > published.size:
            raise Unreadable(f"{published.path}: header of {size} bytes in a file of {published.size}")
        if size > len(data):
            data += await self.fetch(published, len(data), size)
        header = _checked(lambda: safetensors.parse_header(data[:size], published.size, published.path))
        self._store.put_span(SpanKey(published.identity, 0, size), data[:size])
        return header

    def _known_safetensors(self, published: Published) -> safetensors.Header | None:
        """The header of the same file in another model."""
        for start, stop in self._store.catalog.spans(published.identity):
            if start == 0 and (data := self._known(SpanKey(published.identity, 0, stop), safetensors.HEADER_LIMIT)):
                try:
                    return safetensors.parse_header(data, published.size, published.path)
                except InvalidFormat:
                    continue
        return None

    async def gguf_header(self, published: Published, *, whole: bool) -> gguf.Header:
        """The header of a GGUF file, or its outline. Raises Unreadable.

        Args:
            whole: With all values; else long arrays may be taken to be those of a file that was read before.
        """
        async with self._large:
            looks = _Looks(self, self._store, published, around=0)
            found = await self._gguf_header(looks, published, whole)
        self._count(published, found.tensors)
        return found if whole else found.outline()

    async def _gguf_header(self, looks: "_Looks", published: Published, whole: bool) -> gguf.Header:
        known = _checked(lambda: self._known_gguf(looks, published))
        if known is None and self._like is not None and not whole:
            alike = await looks.run(read_alike(published.size, published.path, self._like))
            if alike is not None:
                return alike
        steps = gguf.read_header(published.size, published.path, GGUF_LOOK)
        found = known if known is not None else await looks.run(steps)
        if found.outline().fields:
            self._like = found
        return found

    def _count(self, published: Published, tensors: Sized) -> None:
        self._tensors += len(tensors)
        if self._tensors > MOST_TENSORS:
            raise Unreadable(f"{published.path}: it and the files beside it have more than {MOST_TENSORS} tensors")

    def _known_gguf(self, looks: "_Looks", published: Published) -> gguf.Header | None:
        data = b""
        for piece in islice(looks.known_from_start(), LOOKS):
            data += piece
            found = gguf.parse_header(data, published.size, published.path)
            if isinstance(found, gguf.Header):
                return found
        return None

    async def checkpoint(self, published: Published) -> Checkpoint:
        """Where the tensors of a torch checkpoint are. Raises Unreadable."""
        async with self._large:
            looks = _Looks(self, self._store, published, around=AROUND)
            found = await looks.run(read_checkpoint(published.size, published.path))
            self._count(published, found.tensors)
            return found

    def _known(self, key: SpanKey, limit: int = 64 * MIB) -> bytes | None:
        if key.size > limit or not self._store.has(key):
            return None
        try:
            return b"".join(bytes(piece) for piece in stream(self._store, key, page_aligned(MIB)))
        except CorruptData:
            self._store.drop_span(key)
            return None

    async def fetch(self, published: Published, start: int, stop: int) -> bytes:
        locator = Locator(published.url, published.size, published.validator)
        async with self._limit:
            data = await read(self._remote, locator, ByteRange(start, stop))
        self.fetched += len(data)
        return data


class _Looks:
    """Runs a reader of one file on what the store has of it, and on ranges that are fetched.

    Args:
        around: Bytes to fetch before and behind each range that is asked for.
    """

    def __init__(self, upstream: Upstream, store: Store, published: Published, around: int) -> None:
        self._upstream = upstream
        self._store = store
        self._published = published
        self._around = around
        self._requests = 0
        self._bytes = 0
        self._blocks: dict[int, bytes] = {}  # offset in the file -> what is there; none overlap
        self._starts: list[int] = []  # of the blocks, rising
        self._spans = _disjoint(store.catalog.spans(published.identity))

    async def run(self, steps: Steps[H]) -> H:
        """Raises Unreadable."""
        wanted = _checked(lambda: next(steps))
        while True:
            await self._get(wanted)
            data = [self._cut(part) for part in wanted]
            try:
                wanted = _checked(partial(steps.send, data))
            except StopIteration as done:
                found: H = done.value
                if found is not None:
                    self._keep(found)
                return found

    def known_from_start(self) -> Iterator[bytes]:
        """What the store has of the beginning of the file, as far as a header may reach."""
        at = 0
        for start, stop in self._spans:
            data = self._stored(start, stop, start, min(stop, gguf.HEADER_LIMIT)) if start == at else None
            if data is None:
                return
            yield data
            at = stop

    async def _get(self, wanted: Iterable[ByteRange]) -> None:
        """Makes blocks of what is not in one yet."""
        wanted = coalesce(wanted)
        for part in subtract(wanted, self._taken()):
            self._take_stored(part)
        missing = subtract(wanted, self._taken())
        wide = (ByteRange(max(0, part.start - self._around), part.stop + self._around) for part in missing)
        parts = subtract(coalesce(wide, BRIDGED), [*self._taken(), ByteRange(self._published.size, _ENDLESS)])
        self._requests += len(parts)
        size = sum(part.size for part in parts)
        self._bytes += size
        self._upstream.looked += size
        if self._upstream.looked > MOST_TOGETHER:
            raise Unreadable(f"{self._published.path}: the headers of the files beside it have {MOST_TOGETHER} bytes")
        if self._requests > MOST_REQUESTS or self._bytes > MOST_BYTES:
            cost = f"{self._requests} requests for {self._bytes} bytes"
            raise Unreadable(f"{self._published.path}: it takes {cost} to learn where its tensors are")

        async def fetch(part: ByteRange) -> None:
            self._blocks[part.start] = await self._upstream.fetch(self._published, *part)

        async with open_flat_nursery() as nursery:
            for part in parts:
                nursery.start_soon(fetch, part)
        self._starts = sorted(self._blocks)

    def _taken(self) -> list[ByteRange]:
        return [ByteRange(start, start + len(block)) for start, block in self._blocks.items()]

    def _take_stored(self, part: ByteRange) -> None:
        for start, stop in self._spans[max(0, bisect_right(self._spans, part) - 1) :]:
            if start >= part.stop:
                return
            first, last = max(start, part.start), min(stop, part.stop)
            if first < last and (data := self._stored(start, stop, first, last)) is not None:
                self._blocks[first] = data

    def _stored(self, start: int, stop: int, first: int, last: int) -> bytes | None:
        """Bytes `[first, last)` of the file, out of its span `[start, stop)`."""
        try:
            part = ByteRange(first - start, last - start)
            return read_part(self._store, SpanKey(self._published.identity, start, stop), part)
        except CorruptData:
            return None

    def _cut(self, part: ByteRange) -> bytes:
        data, at = [], bisect_right(self._starts, part.start) - 1
        for start in self._starts[at:]:
            if start >= part.stop:
                break
            block = self._blocks[start]
            data.append(block[max(0, part.start - start) : part.stop - start])
        whole = b"".join(data)
        assert len(whole) == part.size, "a block is missing"
        return whole

    def _keep(self, found: gguf.Header | Checkpoint) -> None:
        """Stores the pieces of the file that came whole."""
        identity, kept = self._published.identity, coalesce(self._taken())
        starts = [part.start for part in kept]
        spans = []
        for piece in piece_ranges(found, self._published.size):
            at = bisect_right(starts, piece.start) - 1
            if piece.size and at >= 0 and piece.stop <= kept[at].stop:
                spans.append((SpanKey(identity, *piece), self._cut(piece)))
        self._store.put_spans(spans)


def _disjoint(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those that do not overlap an earlier one; the longest of several with the same start."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(spans, key=lambda span: (span[0], -span[1])):
        if not found or start >= found[-1][1]:
            found.append((start, stop))
    return found


def _checked(parse: Callable[[], T]) -> T:
    """Marks what a parser refuses."""
    try:
        return parse()
    except InvalidFormat as error:
        raise Unreadable(error.message, hint=error.hint) from error


def check_published(published: Published, data: bytes) -> None:
    """Raises CorruptData where whole-file bytes do not have the hash that the listing names them by."""
    algorithm, _, expected = published.identity.partition(":")
    if algorithm == "git":
        actual = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    elif published.sha256:
        expected, actual = published.sha256, hashlib.sha256(data).hexdigest()
    else:
        return
    if actual != expected:
        raise CorruptData(f"{published.path}: the bytes that came do not have the published hash", hint="try again")
