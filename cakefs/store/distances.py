"""How far tensors were found to be apart, by what they are upstream: so that a comparison outlives the bytes it read.

LMDB; the table is `Catalog`'s. A file that turns out not to be what was published takes its comparisons along.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from cakefs.model import SpanKey
from cakefs.store.rows import identity_hash, span_row

if TYPE_CHECKING:
    from cakefs.store.environment import Environment, Transaction

TABLES = {"distances": False}  # the row of a span in `spans`, then that of another → Distance; there both ways round


class Distance(msgspec.Struct, frozen=True, array_like=True):
    """Attributes:
    equal: Byte for byte.
    max_diff: The largest |a - b| of finite elements; None where there are none, or no values.
    clashes: Elements that are NaN or infinite on a side and not the same on both.
    """

    equal: bool
    max_diff: float | int | None
    clashes: int


class Distances:
    """Part of the catalog."""

    def __init__(self, env: "Environment") -> None:
        self._env = env

    def record(self, found: Iterable[tuple[SpanKey, SpanKey, Distance]]) -> None:
        rows = [(span_row(a), span_row(b), msgspec.msgpack.encode(distance)) for a, b, distance in found]
        table = self._env.table

        def work(txn: "Transaction") -> None:
            for a, b, value in rows:
                txn.put(a + b, value, db=table["distances"])
                txn.put(b + a, value, db=table["distances"])

        if rows:
            self._env.write(work)

    def of(self, a: SpanKey, b: SpanKey) -> Distance | None:
        with self._env.read() as txn:
            value = txn.get(span_row(a) + span_row(b), db=self._env.table["distances"])
            return None if value is None else msgspec.msgpack.decode(value, type=Distance)

    def forget(self, identity: str) -> None:
        """Drops what was found of any part of an upstream file."""
        prefix = identity_hash(identity)

        def work(txn: "Transaction") -> None:
            table = self._env.table["distances"]
            rows = [bytes(key) for key in txn.cursor(table).iternext(values=False)]
            for row in rows:
                if prefix in (row[:20], row[36:56]):
                    txn.delete(row, db=table)

        self._env.write(work)
