"""The few numbers of a whole store, in the catalog's table `meta`: u64 little-endian by name, 0 where there is none."""

import struct
from typing import TYPE_CHECKING

from cakefs.store.environment import Environment

if TYPE_CHECKING:
    from cakefs.store.environment import Transaction

GENERATION = b"generation"  # How often the table of models has changed.
REFUTATIONS = b"refutations"  # How often a file turned out not to have its published hash.
_LIMIT = b"limit"
_RATE = b"rate"
_U64 = struct.Struct("<Q")


class Numbers:
    """Of the environment that has the table."""

    def __init__(self, env: Environment) -> None:
        self._env = env

    def of(self, txn: "Transaction", name: bytes) -> int:
        value = txn.get(name, db=self._env.table["meta"])
        return 0 if value is None else int(_U64.unpack(value)[0])

    def count(self, txn: "Transaction", name: bytes) -> None:
        """One more."""
        txn.put(name, _U64.pack(self.of(txn, name) + 1), db=self._env.table["meta"])

    def get(self, name: bytes) -> int:
        with self._env.read() as txn:
            return self.of(txn, name)

    def limit(self) -> int:
        """Bytes that the store may take, for every process that has not been told otherwise; 0: no limit."""
        return self.get(_LIMIT)

    def set_limit(self, limit: int) -> None:
        if limit != self.limit() and not self._env.readonly:
            self._put(_LIMIT, limit)

    def rate(self) -> int:
        """Bytes per second that the latest long transfer came with; 0 while none was measured."""
        return self.get(_RATE)

    def set_rate(self, rate: int) -> None:
        self._put(_RATE, rate)

    def _put(self, name: bytes, value: int) -> None:
        self._env.write(lambda txn: txn.put(name, _U64.pack(value), db=self._env.table["meta"]))
