"""Confirming an upstream file: once all its bytes are local, they must have the hash that was published.

Until then trust is TLS + length + validator. A file that fails is *quarantined*: none of its spans counts as local
any more, so they are fetched again; what another file proved stays.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial as bind
from typing import NamedTuple

from cakefs.buffers import page_aligned
from cakefs.engine.local import stream, stream_blob
from cakefs.engine.models.again import record_right
from cakefs.errors import CakeError, CorruptData
from cakefs.model import MIB, SpanKey
from cakefs.plan.pullplan import PROVING
from cakefs.plan.ranges import tiling
from cakefs.store.borrowing import Borrowing
from cakefs.store.store import Store

log = logging.getLogger(__name__)

_Stream = Callable[[memoryview], Iterator[memoryview]]


class Following:
    """The hash of the beginning of an upstream file, as far as it is sealed without gap. For one thread at a time.

    Attributes:
        over: There is nothing more to do here: all of it was hashed, or it cannot be.
    """

    def __init__(self, store: Store, identity: str, size: int) -> None:
        self._store = store
        self._identity = identity
        self._size = size
        self._digest = _hasher(identity.partition(":")[0], size)
        self._pieces: dict[tuple[int, int], str] = {}
        self._stop = 0
        self.over = False

    def advance(self, buffer: memoryview, going: Callable[[], bool]) -> None:
        """Takes in what was sealed meanwhile, through the buffer. Args: going: False ends it soon."""
        try:
            while not self.over and going() and (found := self._store.catalog.span_at(self._identity, self._stop)):
                stop, blob = found
                for _ in self.through(self._stop, stop, blob, stream_blob(self._store, blob, buffer)):
                    if not going():
                        return
        except CakeError:
            self.over = True  # Whoever confirms the file will meet it again, and say so.

    def through(self, start: int, stop: int, blob: str, pieces: Iterable[memoryview]) -> Iterator[memoryview]:
        """Hands the pieces of a sealed span on; takes it in, once that was all, where it goes on from the last one."""
        if self.over or start != self._stop:
            yield from pieces
            return
        digest = self._digest.copy()
        for piece in pieces:
            digest.update(piece)
            yield piece
        self._pieces[start, stop] = blob
        self._digest, self._stop = digest, stop
        self.over = stop == self._size

    def rest(self, spans: Mapping[tuple[int, int], str]) -> "_Rest | None":
        """What is left to be hashed; None where these spans, with their blobs, are not what was hashed so far."""
        pieces = tiling(spans, self._size, self._stop)
        if pieces is None or any(spans.get(piece) != blob for piece, blob in self._pieces.items()):
            return None
        return _Rest(self._digest.copy(), pieces)


class _Rest(NamedTuple):
    """A hash that has been begun, and the spans that it takes in next."""

    digest: "hashlib._Hash"
    pieces: list[tuple[int, int]]


def confirm_source(
    store: Store, identity: str, size: int, *, again: bool = False, following: Following | None = None
) -> bool | None:
    """Hashes a whole upstream file of `size` bytes from the store, if it is complete and was not confirmed before.

    Args:
        again: Hash it even if it was confirmed before.
        following: What was hashed of it already.

    Returns:
        True or False for a file that was hashed; None when it is incomplete, has no published hash, or needs none.
    """
    if _all_of_it(store, identity, size, again) is None:
        return None
    with store.confirming(identity):
        return _confirm(store, identity, size, again, following)


def complete(store: Store, identity: str, size: int) -> list[SpanKey]:
    """The spans, one behind the other, of a file that is all here and has a published hash; none of another one."""
    whole = _all_of_it(store, identity, size, again=True)
    return [SpanKey(identity, *piece) for piece in whole.pieces] if whole else []


def _all_of_it(store: Store, identity: str, size: int, again: bool) -> _Rest | None:
    """What is to be hashed; None when that cannot or need not be done."""
    if identity.partition(":")[0] not in ("sha256", "git"):
        return None
    known = store.catalog.verified(identity)
    if known is not None and known.ok and not again:
        return None
    lost = Borrowing(store).lost()
    pieces = tiling({piece for piece, blob in store.catalog.spans(identity).items() if blob not in lost}, size)
    return _Rest(_hasher(identity.partition(":")[0], size), pieces) if pieces is not None else None


def _confirm(store: Store, identity: str, size: int, again: bool, following: Following | None) -> bool | None:
    """Under its lock: another process may have been here in the meantime."""
    whole = _all_of_it(store, identity, size, again)
    if whole is None:
        return None
    expected = identity.partition(":")[2]
    rest = following.rest(store.catalog.spans(identity)) if following else None
    actual = _hash_spans(store, identity, rest) if rest else None
    if actual != expected:
        actual = _hash_spans(store, identity, whole)
    if actual is None:
        return None
    if actual == expected:
        return True if record_right(store, identity) else None
    store.catalog.set_verified(identity, False, int(time.time()))
    log.error("%s: the bytes do not have the published hash; they will be fetched again", identity)
    store.catalog.distances.forget(identity)
    for start, stop in store.catalog.spans(identity):
        store.drop_span(SpanKey(identity, start, stop))
    return False


def prove(store: Store, identity: str, size: int, guesses: Mapping[tuple[int, int], str]) -> bool | None:
    """Fills gaps of an upstream file with blobs that may be the right ones, if the file then has its published SHA-256.

    Args:
        guesses: Blob by start and stop. They are bound to the file only by the proof, and only those that it needed.

    Returns:
        True when they were bound; False when the file has another hash with them, so that one of them, or a byte that
        came, is wrong; None when that could not be found out. Nothing is dropped.
    """
    with store.confirming(identity):
        sealed = store.catalog.spans(identity)
        pieces = tiling(sealed.keys() | guesses.keys(), size)
        if pieces is None or not identity.startswith(PROVING):
            return None
        records = {p: store.catalog.blob(guesses[p]) for p in pieces if p not in sealed}
        streams = [
            bind(stream_blob, store, guesses[p]) if p in records else bind(stream, store, SpanKey(identity, *p))
            for p in pieces
        ]
        actual = _hash(hashlib.sha256(), streams)
        if actual is None:
            return None
        if actual != identity.removeprefix(PROVING):
            return False
        proved = [(SpanKey(identity, *p), record) for p, record in records.items() if record is not None]
        if len(proved) < len(records) or not store.bind(proved):
            return None
        record_right(store, identity)
        return True


def _hash_spans(store: Store, identity: str, rest: _Rest) -> str | None:
    return _hash(rest.digest, [bind(stream, store, SpanKey(identity, *piece)) for piece in rest.pieces])


def _hasher(algorithm: str, size: int) -> "hashlib._Hash":
    """SHA-256 of an LFS file, or git's name of a blob: a SHA-1 that begins with the size."""
    if algorithm == "sha256":
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def _hash(digest: "hashlib._Hash", streams: Iterable[_Stream]) -> str | None:
    """None when a span went away or is damaged here: that says nothing about what came."""
    buffer = page_aligned(4 * MIB)
    for open_stream in streams:
        try:
            for piece in open_stream(buffer):
                digest.update(piece)
        except CorruptData as error:
            log.warning("%s", error.message)
            return None
    return digest.hexdigest()
