"""Sealed bytes: `blobs/ab/<hex>[-N]`, one immutable file (mode 0444) per blob, and how partials become such.

A file is a blob when the catalog has a record of it. One without a record is what a crash left between the link and
the commit: nobody's, to be removed by whoever meets it. Files appear and go only under the lock of names
(`names.lock`), which also makes the choice of a name and its record one step.

Equality is proved, never believed: bytes whose digest is taken are compared with those that have it; other bytes of the
same hash get the digest with `-1`, `-2` … behind it.

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
from cakefs.store.hashes import CHUNK_SHIFT, DIGEST_ALGORITHM, DigestHasher, chunk_sum
from cakefs.store.partial import Partial


class Candidate(NamedTuple):
    """Checked bytes that are to become the blob of a span.

    Attributes:
        inline: The bytes when they are few; else they are in `partial`.
        synced: Whether the partial's data is on disk.
    """

    key: SpanKey
    digest: str
    sums: bytes
    inline: bytes | None
    partial: Partial | None
    synced: bool = False

    @classmethod
    def of_bytes(cls, key: SpanKey, data: bytes) -> "Candidate":
        hasher = DigestHasher()
        hasher.update(data)
        return cls(key, hasher.digest(), array("Q", [chunk_sum(data)]).tobytes(), data, None)


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
        """Returns: None when the file is gone or has not the size it must have."""
        try:
            file = open_file(self.path(record.digest), flags)
        except FileNotFoundError:
            return None
        return file if os.fstat(file.fd).st_size == record.size else None

    def usable(self, record: BlobRecord) -> bool:
        """True when the blob can be opened; its chunks are checked when they are touched."""
        if record.inline is not None:
            return array("Q", record.sums) == array("Q", [chunk_sum(record.inline)])
        return self.open(record) is not None

    def known(self, digest: str) -> bool:
        return self._catalog.blob(digest) is not None

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

    def forget(self, record: BlobRecord) -> None:
        """Drops an unusable blob with every span that names it."""
        with self.names():
            now = self._catalog.blob(record.digest)
            if now is not None and not self.usable(now):
                self._catalog.drop_blobs([record.digest])
                unlink(self.path(record.digest))

    def delete(self, digests: Sequence[str]) -> int:
        """Deletes those that no span names. Returns: their bytes."""
        with self.names():
            unused = self._catalog.unreferenced(digests)
            records = [r for r in map(self._catalog.blob, unused) if r is not None]
            self._catalog.drop_blobs(unused)
            for record in records:
                unlink(self.path(record.digest))
            return sum(r.size for r in records)

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
                if _equal(new, self._taken[digest]):
                    return _record(digest, new)
                continue
            record = self._catalog.blob(digest)
            if record is not None and not self._blobs.usable(record):
                self._catalog.drop_blobs([digest])
                record = None
            if record is None:
                self._take(digest, new)
                return _record(digest, new)
            if self._holds(record, new):
                return record
        raise AssertionError("count() ends")

    def undo(self) -> None:
        """Removes the files made; the partials still have the bytes."""
        for path in self.paths:
            unlink(path)

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

    def _holds(self, record: BlobRecord, new: Candidate) -> bool:
        if new.partial is None:
            return record.inline is not None and record.inline == new.inline
        if record.size != new.key.size:
            return False
        file = self._blobs.open(record)
        return file is not None and same_bytes(file.fd, new.partial.data.fd, record.size)


def _equal(one: Candidate, other: Candidate) -> bool:
    if one.partial is None or other.partial is None:
        return one.inline is not None and one.inline == other.inline
    return one.key.size == other.key.size and same_bytes(one.partial.data.fd, other.partial.data.fd, one.key.size)


def _record(digest: str, candidate: Candidate) -> BlobRecord:
    return BlobRecord(digest, candidate.key.size, candidate.sums, candidate.inline)


def inspect(partials: Sequence[Partial], known: Callable[[str], bool]) -> list[Candidate]:
    """Reads complete partials through, checks every chunk, and syncs those that may become files.

    Args:
        known: Whether there is a blob of that digest. Bytes that will most likely be dropped are not worth a sync.

    Returns: The good ones. In the others the bad chunks are missing now.
    """
    found: list[Candidate] = []
    syncs: list[Future[None]] = []
    with ThreadPoolExecutor(SYNC_THREADS) as pool:
        for candidate in map(_inspect_one, partials):
            if candidate is None:
                continue
            if candidate.partial is not None and not known(candidate.digest):
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
