"""What is local, opened: a bounded pool of the store's contents, and reading one of them from end to end."""

from collections import OrderedDict
from collections.abc import Iterator

from cakefs.errors import CorruptData
from cakefs.model import ByteRange, Digest, SpanKey
from cakefs.store.content import Content, Outcome
from cakefs.store.store import Store


class ContentPool:
    """Open contents by span, least recently used dropped first, so that file descriptors stay bounded.

    What has been checked at its first touch is remembered by the open content, and checked again after it was
    dropped. Dropping closes by reference count, not by call: a thread may still be reading from it.

    Args:
        cached: Whoever reads keeps what he got: what is read for him from a cold disk is what he asked for and no more.

    Attributes:
        epoch: Grows with every discard: a content that was got before may be out of date.
    """

    def __init__(self, store: Store, limit: int, *, cached: bool = False) -> None:
        self._store = store
        self._cached = cached
        self._limit = limit
        self.epoch = 0
        self._open: OrderedDict[SpanKey, Content] = OrderedDict()

    def get(self, key: SpanKey) -> Content | None:
        """The content of a span, opened if anything of it is in the store."""
        content = self._open.get(key)
        if content is not None:
            self._open.move_to_end(key)
            return content
        content = self._store.content(key)
        if content is not None:
            content.note_use()
            if self._cached:
                content.expect_jumps()
            self._open[key] = content
            if len(self._open) > self._limit:
                self._open.popitem(last=False)
        return content

    def discard(self, key: SpanKey) -> None:
        """Drops a content that may be out of date; the next `get` looks at the store again."""
        self._open.pop(key, None)
        self.epoch += 1

    def release(self, key: SpanKey) -> None:
        """Closes what nobody needs now; nothing is out of date."""
        self._open.pop(key, None)

    def is_sealed(self, key: SpanKey) -> bool:
        """Whether all of a span is local, asked without opening it."""
        content = self._open.get(key)
        return content.complete if content is not None else self._store.has(key)

    def discard_all(self) -> None:
        self._open.clear()
        self.epoch += 1

    def discard_gone(self) -> None:
        """Closes what was borrowed from files that are gone: their owner wants the room on the disk."""
        for key in [key for key, content in self._open.items() if content.gone]:
            self.discard(key)

    def discard_source(self, identity: str) -> None:
        for key in [k for k in self._open if k.identity == identity]:
            self.discard(key)
        self.epoch += 1  # Some may have been read before they were dropped for others.

    def close(self) -> None:
        self._open.clear()


def stream(store: Store, key: SpanKey, buffer: memoryview, *, forget: bool = True) -> Iterator[memoryview]:
    """The bytes of a complete span through `buffer`, each chunk checked on the way.

    Args:
        forget: As `Store.content`.

    Raises:
        CorruptData: A chunk is missing or does not match its sum.
    """
    content = store.content(key, forget=forget)
    if content is None and key.size:
        raise CorruptData(f"{key} is not in the store")
    if content is not None:
        yield from _stream(content, str(key), buffer)


def stream_blob(store: Store, digest: Digest, buffer: memoryview) -> Iterator[memoryview]:
    """As `stream`, the bytes of a blob, whichever spans have them."""
    content = store.blob(digest)
    if content is None:
        raise CorruptData(f"blob {digest} is gone")
    yield from _stream(content, f"blob {digest}", buffer)


def read_part(store: Store, key: SpanKey, part: ByteRange) -> bytes:
    """Bytes of a span, counted from its beginning. Raises CorruptData, as `stream`."""
    content = store.content(key)
    data = bytearray(part.size)
    try:
        if content is None or content.read_into(memoryview(data), part.start, wait=True) is not Outcome.DONE:
            raise CorruptData(f"{key} is not in the store")
        return bytes(data)
    finally:
        if content is not None:
            content.close()


def _stream(content: Content, what: str, buffer: memoryview) -> Iterator[memoryview]:
    try:
        for offset in range(0, content.size, len(buffer)):
            piece = buffer[: min(len(buffer), content.size - offset)]
            if content.read_into(piece, offset, wait=True) is not Outcome.DONE:
                raise CorruptData(f"{what} no longer matches its digest", hint="cakefs verify --repair")
            yield piece
    finally:
        content.close()
