"""Sealed bytes: `blobs/ab/<hex>[-N]`, one immutable file (mode 0444) per blob, and how partials become such.

A file is a blob when the catalog has a record of it. One without a record is what a crash left between the link and
the commit: nobody's, to be removed by whoever meets it. Files appear and go only under the lock of names
(`names.lock`), which also makes the choice of a name and its record one step.

Equality is proved, never believed: bytes whose digest is taken are compared with those that have it; other bytes of the
same hash get the digest with `-1`, `-2` … behind it.

A blob may be *borrowed*: its bytes lie in files of somebody else (`foreign.py`), and no file here has its name. Equal
bytes that are sealed for another span are not stored a second time. Those that come for a span that is borrowed already
(`Borrowing.own`) make the blob ours, and borrowed no more.

Sealing leaves the partial as it is until the commit, and gives its data file a second name instead of moving it. So a
kill at any point leaves a whole partial, or a blob, or both.
"""

import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import count
from pathlib import Path
from typing import NamedTuple

from cakefs.model import INLINE_LIMIT, SpanKey
from cakefs.store.borrowed import Place
from cakefs.store.catalog import BlobRecord, Catalog
from cakefs.store.files import (
    SYNC_THREADS,
    Descriptor,
    holds_bytes,
    locked,
    open_file,
    same_bytes,
    sync_directories,
    unlink,
    write_full,
)
from cakefs.store.foreign import open_place
from cakefs.store.hashes import CHUNK_SHIFT, DIGEST_ALGORITHM, DigestHasher, chunk_sum
from cakefs.store.partial import Partial
from cakefs.store.use import claim, touch

_EVICT_BATCH = 256  # Each is held open until all are gone.
_PLACES = 8  # Of one blob; more copies of the same file are of no further use.


class Candidate(NamedTuple):
    """Checked bytes that are to become the blob of a span.

    Attributes:
        inline: The bytes when they are few; else they are in `partial`, or in somebody else's file at `place`.
        synced: Whether the partial's data is on disk.
    """

    key: SpanKey
    digest: str
    sums: bytes
    inline: bytes | None
    partial: Partial | None
    synced: bool = False
    place: Place | None = None

    @classmethod
    def of_bytes(cls, key: SpanKey, data: bytes) -> "Candidate":
        hasher = DigestHasher()
        hasher.update(data)
        return cls(key, hasher.digest(), array("Q", [chunk_sum(data)]).tobytes(), data, None)


class Bytes(NamedTuple):
    """Where the bytes of a blob begin."""

    file: Descriptor
    offset: int


class Blobs:
    """The directory of blobs, and the records that mirror it."""

    def __init__(self, root: Path, lock: Path, quarantine: Path, catalog: Catalog) -> None:
        self._root = root
        self._lock = lock
        self._quarantine = quarantine
        self._catalog = catalog

    def names(self) -> AbstractContextManager[None]:
        """The lock of names."""
        return locked(self._lock)

    def path(self, digest: str) -> Path:
        hex = digest.partition(":")[2]
        return self._root / hex[:2] / hex

    def open(self, record: BlobRecord, flags: int = os.O_RDONLY) -> Descriptor | None:
        """The blob's own file. Returns: None when it is gone or has not the size it must have, or never was."""
        try:
            file = open_file(self.path(record.digest), flags)
        except FileNotFoundError:
            return None
        return file if os.fstat(file.fd).st_size == record.size else None

    def usable(self, record: BlobRecord) -> bool:
        """True when the blob can be opened; its chunks are checked when they are touched."""
        if record.inline is not None:
            return array("Q", record.sums) == array("Q", [chunk_sum(record.inline)])
        return self.bytes_of(record) is not None

    def bytes_of(self, record: BlobRecord) -> Bytes | None:
        """Where a blob can be read, whoever's the file is; None for one that is inline."""
        if record.inline is not None:
            return None
        if record.places:
            lent = open_place(record.places)
            return None if lent is None else Bytes(lent.file, lent.place.offset)
        file = self.open(record)
        return None if file is None else Bytes(file, 0)

    def owns(self, digest: str) -> bool:
        """Whether there is a blob of that digest which is not borrowed."""
        record = self._catalog.blob(digest)
        return record is not None and not record.places

    def files(self) -> Iterator[tuple[str, Path]]:
        """What lies in the directory, by digest; with a record or without."""
        for path in sorted(self._root.glob("??/*")):
            yield f"{DIGEST_ALGORITHM}:{path.name}", path

    def publish(self, candidates: Sequence[Candidate]) -> None:
        """Records the candidates, all in one transaction. Their partials are the caller's to drop."""
        with self.names():
            batch = _Batch(self, self._catalog)
            try:
                seals = [(c.key, batch.place(c)) for c in candidates]
                sync_directories(sorted(batch.directories))
                self._catalog.record_seals(seals)
            except BaseException:
                batch.undo()
                raise
            for path in batch.paths:
                os.chmod(path, 0o444)

    def bind(self, spans: Sequence[tuple[SpanKey, BlobRecord]]) -> bool:
        """Says that these spans have the bytes of blobs that are here: the caller has proved it.

        Returns: False, and nothing is changed, when one of the blobs is not what it was any more.
        """
        with self.names():
            if any(key.size != r.size or self._catalog.blob(r.digest) != r for key, r in spans):
                return False
            self._catalog.record_seals(spans)
            return True

    def forget(self, record: BlobRecord) -> None:
        """Drops an unusable blob with every span that names it."""
        with self.names():
            now = self._catalog.blob(record.digest)
            if now is None or self.usable(now):
                return
            if now.places:  # Whatever else was borrowed of the same files is gone, too.
                self._catalog.forget_files([place.stamp for place in now.places])
            else:
                self._catalog.drop_blobs([record.digest])
                unlink(self.path(record.digest))

    def refuse(self, record: BlobRecord, chunk: int, data: bytes | bytearray | memoryview) -> None:
        """Borrows no more from files in which a chunk of a borrowed blob has rotted; `data` is what it must have."""
        offset = chunk << CHUNK_SHIFT
        with self.names():
            rotten = []
            for place in record.places:
                lent = open_place([place])
                if lent is None or not holds_bytes(lent.file.fd, data, place.offset + offset):
                    rotten.append(place.stamp)
            self._catalog.forget_files(rotten)

    def delete(self, digests: Sequence[str]) -> int:
        """Deletes those that no span names. Returns: their bytes."""
        with self.names():
            unused = self._catalog.unreferenced(digests)
            records = [r for r in map(self._catalog.blob, unused) if r is not None]
            self._catalog.drop_blobs(unused)
            for record in records:
                unlink(self.path(record.digest))
            return sum(r.size for r in records if not r.places)

    def evict(self, digests: Sequence[str], *, dry_run: bool) -> set[str]:
        """Deletes blobs with the spans that name them, except those that a process serves from. Returns: which."""
        batches = (digests[first:][:_EVICT_BATCH] for first in range(0, len(digests), _EVICT_BATCH))
        return set().union(*(self._evict(batch, dry_run) for batch in batches))

    def _evict(self, digests: Sequence[str], dry_run: bool) -> set[str]:
        with self.names():
            claimed = {d: file for d in digests if (file := claim(self.path(d))) is not None}
            if not dry_run:
                self._catalog.drop_blobs(claimed)
                for digest in claimed:
                    unlink(self.path(digest))
            return set(claimed)

    def quarantine(self, key: SpanKey) -> None:
        """Forgets the span's blob; puts the file aside unless another span has it."""
        with self.names():
            record = self._catalog.find(key)
            self._catalog.forget_spans([key])
            if record is not None and self._catalog.unreferenced([record.digest]):
                self._catalog.drop_blobs([record.digest])
                path = self.path(record.digest)
                if record.inline is None and path.exists():
                    os.replace(path, self._quarantine / path.name)

    def rewrite(self, record: BlobRecord, chunk: int, data: bytes | bytearray | memoryview) -> None:
        """Puts the bytes that a chunk must have in place of damaged ones; good ones stay untouched.

        In place, so that whoever has the file open sees the repair. What a crash leaves is again a damaged chunk.
        """
        offset, path = chunk << CHUNK_SHIFT, self.path(record.digest)
        with self.names():
            file = self.open(record)
            if file is None or holds_bytes(file.fd, data, offset):
                return
            os.chmod(path, 0o600)
            writable = open_file(path, os.O_RDWR)
            os.fchmod(writable.fd, 0o444)
            write_full(writable.fd, data, offset)
            os.fdatasync(writable.fd)


class _Batch:
    """The names given in one `publish`; under the lock of names."""

    def __init__(self, blobs: Blobs, catalog: Catalog) -> None:
        self._blobs = blobs
        self._catalog = catalog
        self._taken: dict[str, Candidate] = {}
        self.paths: list[Path] = []
        self.directories: set[Path] = set()

    def place(self, new: Candidate) -> BlobRecord:
        """Finds the blob with exactly these bytes, or makes it."""
        for n in count():
            digest = f"{new.digest}-{n}" if n else new.digest
            if digest in self._taken:
                taken = self._taken[digest]
                if taken.key.size == new.key.size and _same(new, taken.inline, _bytes_of(taken)):
                    return _record(digest, taken)
                continue
            record = self._catalog.blob(digest)
            if record is not None and not self._blobs.usable(record):
                self._catalog.drop_blobs([digest])
                record = None
            if record is None:
                self._take(digest, new)
                return _record(digest, new)
            if record.size == new.key.size and _same(new, record.inline, self._blobs.bytes_of(record)):
                return self._joined(record, new)
        raise AssertionError("count() ends")

    def undo(self) -> None:
        """Removes the files made; the partials still have the bytes."""
        for path in self.paths:
            unlink(path)

    def _joined(self, record: BlobRecord, new: Candidate) -> BlobRecord:
        """The blob that is here, and has the new bytes."""
        if not record.places and record.inline is None:
            touch(self._blobs.path(record.digest))
        if not record.places:
            return record
        if new.place is None:
            if self._catalog.find(new.key) != record:
                return record
            self._take(record.digest, new)
            return record._replace(places=())
        if new.place in record.places:
            return record
        return record._replace(places=(*record.places, new.place)[-_PLACES:])

    def _take(self, digest: str, new: Candidate) -> None:
        self._taken[digest] = new
        if new.partial is None:
            return
        if not new.synced:
            os.fdatasync(new.partial.data.fd)
        path = self._blobs.path(digest)
        if not path.parent.is_dir():
            path.parent.mkdir(mode=0o700)
            self.directories.add(path.parent.parent)
        unlink(path)  # without a record it is nobody's
        os.link(new.partial.data_path, path)
        self.paths.append(path)
        self.directories.add(path.parent)


def _same(new: Candidate, inline: bytes | None, where: Bytes | None) -> bool:
    """True when the candidate has the bytes that are inline, or there."""
    own = _bytes_of(new)
    if own is None or where is None:
        return new.inline is not None and new.inline == inline
    return same_bytes(where.file.fd, own.file.fd, new.key.size, where.offset, own.offset)


def _bytes_of(candidate: Candidate) -> Bytes | None:
    if candidate.partial is not None:
        return Bytes(candidate.partial.data, 0)
    lent = open_place([candidate.place]) if candidate.place else None
    return None if lent is None else Bytes(lent.file, lent.place.offset)


def _record(digest: str, candidate: Candidate) -> BlobRecord:
    places = () if candidate.place is None else (candidate.place,)
    return BlobRecord(digest, candidate.key.size, candidate.sums, candidate.inline, places)


def inspect(partials: Sequence[Partial], here: Callable[[str], bool]) -> list[Candidate]:
    """Reads complete partials through, checks every chunk, and syncs those that may become files.

    Args:
        here: Whether there is a blob of that digest. Bytes that will most likely be dropped are not worth a sync.

    Returns: The good ones. In the others the bad chunks are missing now.
    """
    found: list[Candidate] = []
    syncs: list[Future[None]] = []
    with ThreadPoolExecutor(SYNC_THREADS) as pool:
        for candidate in map(_inspect_one, partials):
            if candidate is None:
                continue
            if candidate.partial is not None and not here(candidate.digest):
                syncs.append(pool.submit(os.fdatasync, candidate.partial.data.fd))  # while we hash the next
                candidate = candidate._replace(synced=True)
            found.append(candidate)
        for sync in syncs:
            sync.result()
    return found


def _inspect_one(partial: Partial) -> Candidate | None:
    hasher = DigestHasher()
    good, data = True, memoryview(b"")
    for chunk, expected in enumerate(partial.sums):
        data = partial.read(chunk)
        if chunk_sum(data) == expected:
            hasher.update(data)
        else:
            partial.clear(chunk)
            good = False
    if not good:
        return None
    inline = bytes(data) if partial.size <= INLINE_LIMIT else None
    return Candidate(partial.key, hasher.digest(), partial.sums.tobytes(), inline, None if inline else partial)
