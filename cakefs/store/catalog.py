"""What the store knows: models, manifests, and which span has which bytes. LMDB; the meaning of each table is below.

Every change is one transaction, durable when the call returns. A span's row names a digest only while that digest has a
row: dropping a digest takes the spans along, so that the name can stand for other bytes later.

Rows of `blobs` mirror files: the calls that add or drop them are made by `Store`, under its lock of names.
"""

import struct
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from cakefs.model import SpanKey
from cakefs.store import distances
from cakefs.store.borrowed import TABLES as _BORROWED_TABLES
from cakefs.store.borrowed import Borrowed, Place, Stamp
from cakefs.store.environment import MAP_SIZE, Environment
from cakefs.store.models import TABLES as _MODELS_TABLES
from cakefs.store.models import Models
from cakefs.store.numbers import REFUTATIONS, Numbers
from cakefs.store.rows import BOUNDS
from cakefs.store.rows import identity_hash as _hash
from cakefs.store.rows import scan as _scan
from cakefs.store.rows import span_row as _row
from cakefs.store.sha256 import TABLES as _SHA256_TABLES
from cakefs.store.sha256 import Sha256s

if TYPE_CHECKING:
    from cakefs.store.environment import Transaction

# name → whether a key has many values
TABLES = {
    "meta": False,  # the numbers of `numbers.py`
    **_MODELS_TABLES,
    "identities": False,  # first 20 bytes of the SHA-256 of a source identity → the identity
    "spans": False,  # those 20 bytes, start, stop (u64 BE each) → digest
    "refs": True,  # digest → keys of the rows in `spans` that name it
    "blobs": False,  # digest → size (u64 LE), number of sums (u32 LE), the sums, the bytes if they are kept inline
    "verified": False,  # those 20 bytes of an identity → Verified
    **_SHA256_TABLES,
    **_BORROWED_TABLES,
    **distances.TABLES,
}
REQUIRED = ("meta", "models", "manifests", "identities", "spans", "refs", "blobs", "verified")

_BLOB = struct.Struct("<QI")


class BlobRecord(NamedTuple):
    """Attributes:
    sums: Of its chunks (`hashes.chunk_sum`), 8 bytes little-endian each.
    inline: The bytes themselves where they are few; else they are in a file.
    places: In files of somebody else, where they are borrowed; else the file is ours.
    """

    digest: str
    size: int
    sums: bytes
    inline: bytes | None = None
    places: tuple[Place, ...] = ()


class Verified(msgspec.Struct, frozen=True, array_like=True):
    """Outcome of the last check of a whole upstream file against its published SHA-256; `when` in Unix seconds."""

    ok: bool
    when: int


class Catalog:
    """Made by `open`; any thread may use it. Raises StoreFull from any change when the disk is full."""

    def __init__(self, env: Environment) -> None:
        self._env = env
        self._read = env.read
        self.numbers = Numbers(env)
        self.models = Models(env, self.numbers)
        self.sha256 = Sha256s(env)
        self.borrowed = Borrowed(env)
        self.distances = distances.Distances(env)

    @classmethod
    def open(cls, directory: Path, *, map_size: int = MAP_SIZE) -> "Catalog":
        return cls(Environment.open(directory, TABLES, REQUIRED, map_size=map_size))

    def close(self) -> None:
        self._env.close()

    @property
    def readonly(self) -> bool:
        return self._env.readonly

    @property
    def changed(self) -> bool:
        """Since it was opened, by anybody."""
        return self._env.changed

    @property
    def used_bytes(self) -> int:
        return self._env.used_bytes

    def copy(self, directory: Path) -> None:
        """Into an empty directory."""
        self._env.copy(directory)

    def walk(self) -> None:
        """Touches every row, and makes sense of those that all else hangs on. Raises CorruptData."""
        self._env.walk()
        self.listing()
        self.blobs()
        self.models.walk()

    def digest(self) -> bytes:
        """Of all rows."""
        return self._env.digest()

    def copy_file(self, directory: Path) -> None:
        """As `Environment.copy_file`."""
        self._env.copy_file(directory)

    def rewrite(self) -> None:
        """As `Environment.rewrite`."""
        self._env.rewrite()

    # Spans and blobs

    def find(self, key: SpanKey) -> BlobRecord | None:
        with self._read() as txn:
            digest = txn.get(_row(key), db=self._env.table["spans"])
            return None if digest is None else self._blob(txn, bytes(digest))

    def recorded(self, keys: Iterable[SpanKey]) -> set[SpanKey]:
        """Which of these are sealed."""
        with self._read() as txn:
            spans = self._env.table["spans"]
            return {key for key in keys if txn.get(_row(key), db=spans) is not None}

    def spans(self, identity: str) -> dict[tuple[int, int], str]:
        """Digests of the sealed spans of one upstream file, by start and stop."""
        with self._read() as txn:
            return {span: str(digest, "ascii") for span, digest in _scan(txn, self._env.table["spans"], identity)}

    def span_at(self, identity: str, start: int) -> tuple[int, str] | None:
        """Stop and digest of a sealed span, not empty, that begins there."""
        with self._read() as txn:
            for (begin, stop), digest in _scan(txn, self._env.table["spans"], identity, start):
                if begin > start:
                    return None
                if stop > start:
                    return stop, str(digest, "ascii")
        return None

    def sealed(self) -> dict[str, dict[tuple[int, int], str]]:
        """All sealed spans with their digests, by identity, start and stop."""
        found: dict[bytes, dict[tuple[int, int], str]] = {}
        with self._read() as txn:
            for row, digest in txn.cursor(self._env.table["spans"]):
                found.setdefault(bytes(row[:20]), {})[BOUNDS.unpack_from(row, 20)] = str(digest, "ascii")
            identities = {bytes(k): str(v, "utf-8") for k, v in txn.cursor(self._env.table["identities"])}
            return {identities[hash]: spans for hash, spans in found.items()}

    def listing(self) -> list[tuple[SpanKey, str]]:
        """The same, one by one."""
        return [(SpanKey(i, *bounds), d) for i, spans in self.sealed().items() for bounds, d in spans.items()]

    def record_seals(self, seals: Iterable[tuple[SpanKey, BlobRecord]]) -> None:
        """Says where these spans' bytes are, in one transaction; a span that was elsewhere moves."""
        batch = list(seals)

        def work(txn: "Transaction") -> None:
            table = self._env.table
            for key, record in batch:
                row, digest = _row(key), record.digest.encode()
                if bytes(txn.get(row, db=table["spans"]) or b"") != digest:
                    self._unlink_row(txn, row)
                txn.put(row[:20], key.identity.encode(), db=table["identities"], overwrite=False)
                txn.put(digest, _pack(record), db=table["blobs"], overwrite=False)
                self.borrowed.put(txn, digest, record.places)
                txn.put(row, digest, db=table["spans"])
                txn.put(digest, row, db=table["refs"])

        if batch:
            self._env.write(work)

    def forget_spans(self, keys: Iterable[SpanKey]) -> None:
        """Forgets where these are; their blobs stay, perhaps without a span that names them."""
        rows = [_row(key) for key in keys]

        def work(txn: "Transaction") -> None:
            for row in rows:
                self._unlink_row(txn, row)

        if rows:
            self._env.write(work)

    def blob(self, digest: str) -> BlobRecord | None:
        with self._read() as txn:
            return self._blob(txn, digest.encode())

    def blobs(self) -> list[tuple[str, int, bool]]:
        """Digest, size, and whether the bytes are inline, of every blob."""
        with self._read() as txn:
            rows = txn.cursor(self._env.table["blobs"])
            return [(str(k, "ascii"), *_size_and_inline(v)) for k, v in rows]

    def unreferenced(self, digests: Collection[str]) -> list[str]:
        """Which of these no span names."""
        with self._read() as txn:
            refs = self._env.table["refs"]
            return [d for d in digests if txn.get(d.encode(), db=refs) is None]

    def drop_blobs(self, digests: Collection[str]) -> None:
        """Forgets these and every span that names one."""

        def work(txn: "Transaction") -> None:
            for digest in digests:
                self._drop_blob(txn, digest.encode())

        if digests:
            self._env.write(work)

    def forget_files(self, stamps: Collection[Stamp]) -> set[Stamp]:
        """Forgets files of somebody else, with what was borrowed of them. Returns: those that had lent something."""
        return self.borrowed.forget(stamps, self._drop_blob)

    # Whole-file checks

    def set_verified(self, identity: str, ok: bool, when: int) -> None:
        value = msgspec.msgpack.encode(Verified(ok, when))

        def work(txn: "Transaction") -> None:
            txn.put(_hash(identity), value, db=self._env.table["verified"])
            if not ok:
                self.numbers.count(txn, REFUTATIONS)

        self._env.write(work)

    def refutations(self) -> int:
        """Grows whenever a file turns out not to have its published hash, whichever process finds it."""
        return self.numbers.get(REFUTATIONS)

    def verified(self, identity: str) -> Verified | None:
        with self._read() as txn:
            value = txn.get(_hash(identity), db=self._env.table["verified"])
            return None if value is None else msgspec.msgpack.decode(value, type=Verified)

    def keep_files(self, identities: Iterable[str]) -> None:
        """Forgets what was found of all other whole upstream files, and the names of those of which nothing is here."""
        kept = set(map(_hash, identities))

        def work(txn: "Transaction") -> None:
            table = self._env.table
            here = {bytes(row[:20]) for row in txn.cursor(table["spans"]).iternext(values=False)}
            for name, alive in (("verified", kept), ("identities", here)):
                rows = [bytes(row) for row in txn.cursor(table[name]).iternext(values=False)]
                for row in rows:
                    if row not in alive:
                        txn.delete(row, db=table[name])

        self._env.write(work)

    # Within a transaction

    def _blob(self, txn: "Transaction", digest: bytes) -> BlobRecord | None:
        value = txn.get(digest, db=self._env.table["blobs"])
        if value is None:
            return None
        record = _unpack(digest.decode(), value)
        return record if record.inline is not None else record._replace(places=self.borrowed.places(txn, digest))

    def _drop_blob(self, txn: "Transaction", digest: bytes) -> None:
        table = self._env.table
        for row in list(self._referring(txn, digest)):
            txn.delete(row, db=table["spans"])
            self._doubt(txn, row[:20])
        txn.delete(digest, db=table["refs"])
        txn.delete(digest, db=table["blobs"])
        self.sha256.drop(txn, digest)
        self.borrowed.drop(txn, digest)

    def _unlink_row(self, txn: "Transaction", row: bytes) -> None:
        digest = txn.pop(row, db=self._env.table["spans"])
        if digest is not None:
            txn.delete(bytes(digest), row, db=self._env.table["refs"])
            self._doubt(txn, row[:20])

    def _doubt(self, txn: "Transaction", identity: bytes) -> None:
        """A file that lost a span is not known to be right any more: what comes instead is to be hashed again."""
        known = txn.get(identity, db=self._env.table["verified"])
        if known is not None and msgspec.msgpack.decode(known, type=Verified).ok:
            txn.delete(identity, db=self._env.table["verified"])

    def _referring(self, txn: "Transaction", digest: bytes) -> Iterator[bytes]:
        refs = txn.cursor(self._env.table["refs"])
        if refs.set_key(digest):
            yield from map(bytes, refs.iternext_dup())


def _pack(record: BlobRecord) -> bytes:
    return _BLOB.pack(record.size, len(record.sums) // 8) + record.sums + (record.inline or b"")


def _unpack(digest: str, value: memoryview) -> BlobRecord:
    size, sums = _BLOB.unpack_from(value)
    start = _BLOB.size + 8 * sums
    inline = bytes(value[start:]) or None
    return BlobRecord(digest, size, bytes(value[_BLOB.size : start]), inline)


def _size_and_inline(value: memoryview) -> tuple[int, bool]:
    size, sums = _BLOB.unpack_from(value)
    return size, len(value) > _BLOB.size + 8 * sums
