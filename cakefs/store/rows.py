"""Keys of the catalog's rows about spans: 20 bytes of the identity's SHA-256, then start and stop."""

import hashlib
import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from cakefs.model import SpanKey

if TYPE_CHECKING:
    from cakefs.store.environment import Table, Transaction

BOUNDS = struct.Struct(">QQ")  # Big-endian, so that rows of one file are in the order of its bytes.


@lru_cache(1024)
def identity_hash(identity: str) -> bytes:
    return hashlib.sha256(identity.encode()).digest()[:20]


def span_row(key: SpanKey) -> bytes:
    return identity_hash(key.identity) + BOUNDS.pack(key.start, key.stop)


def scan(
    txn: "Transaction", table: "Table", identity: str, begin: int = 0
) -> Iterator[tuple[tuple[int, int], memoryview]]:
    """Start and stop, and the value, of the rows of one upstream file whose start is `begin` or later."""
    prefix = identity_hash(identity)
    rows = txn.cursor(table)
    if rows.set_range(prefix + BOUNDS.pack(begin, 0)):
        for row, value in rows:
            if row[:20] != prefix:
                return
            yield BOUNDS.unpack_from(row, 20), value
