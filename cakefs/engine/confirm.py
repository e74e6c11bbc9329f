"""Confirming an upstream file: once all its bytes are local, they must have the hash that was published.

Until then trust is TLS + length + validator. A file that fails is *quarantined*: none of its spans counts as local
any more, so they are fetched again; what another file proved stays.
"""

import hashlib
import logging
import time
from collections.abc import Iterable

from cakefs.engine.local import stream
from cakefs.errors import CorruptData
from cakefs.model import MIB, SpanKey
from cakefs.store.store import Store

log = logging.getLogger(__name__)


def tiling(spans: Iterable[tuple[int, int]], size: int) -> list[tuple[int, int]] | None:
    """Spans that follow each other from 0 to `size` without gap; None when there is a gap.

    Where spans overlap (a header and the whole file, say), the longer one that begins at the needed place is taken.
    """
    longest: dict[int, int] = {}
    for start, stop in spans:
        longest[start] = max(stop, longest.get(start, 0))
    position, chosen = 0, []
    while longest.get(position, position) > position:
        chosen.append((position, longest[position]))
        position = longest[position]
    return chosen if position == size else None


def confirm_source(store: Store, identity: str, size: int, *, again: bool = False) -> bool | None:
    """Hashes a whole upstream file of `size` bytes from the store, if it is complete and was not confirmed before.

    Args:
        again: Hash it even if it was confirmed before.

    Returns:
        True or False for a file that was hashed; None when it is incomplete, has no published hash, or needs none.
    """
    if identity.partition(":")[0] not in ("sha256", "git") or _pieces(store, identity, size, again) is None:
        return None
    with store.confirming(identity):
        return _confirm(store, identity, size, again)


def _pieces(store: Store, identity: str, size: int, again: bool) -> list[tuple[int, int]] | None:
    """What is to be hashed; None when that cannot or need not be done."""
    known = store.catalog.verified(identity)
    if known is not None and known.ok and not again:
        return None
    return tiling(store.catalog.spans(identity), size)


def _confirm(store: Store, identity: str, size: int, again: bool) -> bool | None:
    """Under its lock: another process may have been here in the meantime."""
    pieces = _pieces(store, identity, size, again)
    if pieces is None:
        return None
    algorithm, _, expected = identity.partition(":")
    actual = _hash(store, _hasher(algorithm, size), [SpanKey(identity, *piece) for piece in pieces])
    if actual is None:
        return None
    ok = actual == expected
    store.catalog.set_verified(identity, ok, int(time.time()))
    if not ok:
        log.error("%s: the bytes do not have the published hash; they will be fetched again", identity)
        for start, stop in store.catalog.spans(identity):
            store.drop_span(SpanKey(identity, start, stop))
    return ok


def _hasher(algorithm: str, size: int) -> "hashlib._Hash":
    """SHA-256 of an LFS file, or git's name of a blob: a SHA-1 that begins with the size."""
    if algorithm == "sha256":
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def _hash(store: Store, digest: "hashlib._Hash", keys: list[SpanKey]) -> str | None:
    """None when a span went away or is damaged here: that says nothing about what came."""
    buffer = memoryview(bytearray(4 * MIB))
    for key in keys:
        try:
            for piece in stream(store, key, buffer):
                digest.update(piece)
        except CorruptData as error:
            log.warning("%s", error.message)
            return None
    return digest.hexdigest()
