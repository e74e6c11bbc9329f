"""Borrowed blobs: bytes that stay in a file of somebody else (the Hub cache, an Ollama store, a directory). LMDB; the
tables are `Catalog`'s.

A file is known by its *stamp*: path, size, time of modification, inode. The bytes of a stamp never change: a file that
has another stamp now is another file, and what was borrowed of the first is gone. A blob may be in several files, so
that losing one of them loses nothing. The device is no part of the stamp: its number changes with the next boot.
"""

import hashlib
import os
import stat
import struct
from collections.abc import Callable, Collection, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import msgspec

if TYPE_CHECKING:
    from cakefs.store.environment import Environment, Transaction

TABLES = {
    "files": False,  # first 20 bytes of the SHA-256 of a stamp → the stamp and what the whole file was found to be
    "borrowed": False,  # digest of a blob → where it is: those 20 bytes of the file, offset (u64 LE), for each place
}

_PLACE = struct.Struct("<20sQ")


class Stamp(NamedTuple):
    """A file as it was when its bytes were hashed. `path` has no links in it."""

    path: bytes
    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: bytes, status: os.stat_result) -> "Stamp":
        return cls(path, status.st_size, status.st_mtime_ns, status.st_ino)

    def matches(self, status: os.stat_result) -> bool:
        """False for a file that was changed, replaced or deleted."""
        return (
            status.st_mtime_ns == self.mtime_ns
            and status.st_size == self.size
            and status.st_ino == self.inode
            and status.st_nlink > 0
            and stat.S_ISREG(status.st_mode)
        )

    def __str__(self) -> str:
        return os.fsdecode(self.path)


class Place(NamedTuple):
    """Where the bytes of a blob begin."""

    stamp: Stamp
    offset: int


class _File(msgspec.Struct, frozen=True, array_like=True):
    stamp: Stamp
    identities: tuple[str, ...]


class Borrowed:
    """Part of the catalog."""

    def __init__(self, env: "Environment") -> None:
        self._env = env

    # Files

    def note(self, files: Iterable[tuple[Stamp, Collection[str]]]) -> None:
        """Says what files were found to be: `sha256:…`, `git:…`."""
        batch = [(stamp, set(identities)) for stamp, identities in files]

        def work(txn: "Transaction") -> None:
            for stamp, identities in batch:
                known = self._file(txn, _key(stamp))
                everything = tuple(sorted(identities.union(known.identities if known else ())))
                txn.put(_key(stamp), msgspec.msgpack.encode(_File(stamp, everything)), db=self._env.table["files"])

        if batch:
            self._env.write(work)

    def identities(self, stamp: Stamp) -> tuple[str, ...]:
        """What this very file was found to be before; empty for one that was not hashed."""
        with self._env.read() as txn:
            file = self._file(txn, _key(stamp))
            return file.identities if file else ()

    def files(self) -> list[Stamp]:
        """All that were hashed or lend bytes."""
        with self._env.read() as txn:
            rows = txn.cursor(self._env.table["files"])
            return [msgspec.msgpack.decode(value, type=_File).stamp for _, value in rows]

    def digests(self) -> set[str]:
        """The blobs that are borrowed."""
        with self._env.read() as txn:
            return {str(k, "ascii") for k in txn.cursor(self._env.table["borrowed"]).iternext(values=False)}

    def lent_by(self, stamps: Collection[Stamp]) -> tuple[set[str], set[Stamp]]:
        """The blobs that are in no other file than these, and which of these lend any blob."""
        files = {_key(stamp): stamp for stamp in stamps}
        blobs: set[str] = set()
        lenders: set[Stamp] = set()
        with self._env.read() as txn:
            for digest, value in txn.cursor(self._env.table["borrowed"]) if files else ():
                found = [files.get(key) for key, _ in _PLACE.iter_unpack(value)]
                lenders.update(filter(None, found))
                if all(found):
                    blobs.add(str(digest, "ascii"))
        return blobs, lenders

    def forget(self, stamps: Collection[Stamp], drop_blob: "Callable[[Transaction, bytes], None]") -> set[Stamp]:
        """Forgets files, and with `drop_blob` every blob that is in no other one.

        Returns: Those of the files that had lent something.
        """
        lost = {_key(stamp): stamp for stamp in stamps}

        def work(txn: "Transaction") -> set[Stamp]:
            lenders: set[Stamp] = set()
            for key in lost:
                txn.delete(key, db=self._env.table["files"])
            rows = [(bytes(k), bytes(v)) for k, v in txn.cursor(self._env.table["borrowed"])]
            for digest, value in rows:
                left = [place for place in _PLACE.iter_unpack(value) if place[0] not in lost]
                if len(left) * _PLACE.size == len(value):
                    continue
                lenders.update(lost[key] for key, _ in _PLACE.iter_unpack(value) if key in lost)
                if left:
                    txn.put(digest, b"".join(_PLACE.pack(*p) for p in left), db=self._env.table["borrowed"])
                else:
                    drop_blob(txn, digest)
            return lenders

        return self._env.write(work) if lost else set()

    # Within a transaction of the catalog

    def places(self, txn: "Transaction", digest: bytes) -> tuple[Place, ...]:
        value = txn.get(digest, db=self._env.table["borrowed"])
        if value is None:
            return ()
        found = ((self._file(txn, key), offset) for key, offset in _PLACE.iter_unpack(value))
        return tuple(Place(file.stamp, offset) for file, offset in found if file is not None)

    def put(self, txn: "Transaction", digest: bytes, places: Collection[Place]) -> None:
        """Says where the blob's bytes are; without places they are our own."""
        if not places:
            self.drop(txn, digest)
            return
        for place in places:
            row = msgspec.msgpack.encode(_File(place.stamp, ()))
            txn.put(_key(place.stamp), row, db=self._env.table["files"], overwrite=False)
        value = b"".join(_PLACE.pack(_key(place.stamp), place.offset) for place in places)
        txn.put(digest, value, db=self._env.table["borrowed"])

    def drop(self, txn: "Transaction", digest: bytes) -> None:
        txn.delete(digest, db=self._env.table["borrowed"])

    def _file(self, txn: "Transaction", key: bytes) -> _File | None:
        value = txn.get(key, db=self._env.table["files"])
        return None if value is None else msgspec.msgpack.decode(value, type=_File)


@lru_cache(64)
def _key(stamp: Stamp) -> bytes:
    return hashlib.sha256(msgspec.msgpack.encode(stamp)).digest()[:20]
