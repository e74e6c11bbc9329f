"""The store as others see it: content by span, chunks in, spans sealed; safe for any number of processes at once.

    format          "cakefs-store 1"
    catalog/        LMDB (catalog.py)
    blobs/ab/<hex>  sealed bytes (blobs.py)
    partial/        spans in flight (partial.py)
    quarantine/     blobs that a published SHA-256 proved wrong, until gc, or until a limit needs their room
    run/            leases of running processes (lease.py)
    backup/         a copy of the catalog (backup.py)
    *.lock          flocks: names.lock (blobs.py), run.lock (lease.py), gc.lock (`Store.guard`),
                    evict.lock (`Store.evicting`)
    confirm.lock    a lock for each upstream file (`Store.confirming`)

Locks are taken in this order: partials' (by name, where several), names.lock, LMDB's writer.
What a crash leaves is either used again (partials) or removed by `sweep`; opening scans nothing.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from cakefs.errors import CakeError, CorruptData, StoreFull
from cakefs.model import CHUNK, INLINE_LIMIT, Digest, SpanKey
from cakefs.store import backup, upkeep
from cakefs.store import lease as leases
from cakefs.store.blobs import Blobs, Candidate, inspect
from cakefs.store.catalog import BlobRecord, Catalog
from cakefs.store.content import Content
from cakefs.store.environment import MAP_SIZE
from cakefs.store.files import Descriptor, locked, locked_place, translated
from cakefs.store.hashes import CHUNK_SHIFT, DigestHasher, chunk_count, chunk_size, chunk_sum
from cakefs.store.layout import open_layout, sweep_layout
from cakefs.store.lookup import Lookup
from cakefs.store.partial import Partial, data_path, evict_partial, local_size, partial_name
from cakefs.store.use import last_use, touch

# Partials sealed in one transaction; each has two descriptors open, so this stays below the usual limit of 1024.
SEAL_BATCH = 256
# Identity under which literals are kept: followed by the SHA-256 of their bytes.
LITERAL = "literal:"

T = TypeVar("T")

_log = logging.getLogger("cakefs.store")


class Store:
    """Made by `open`. Any thread may use it; no process may use one across a fork.

    Whatever changes the store raises StoreFull when the disk is full, and then has changed nothing.
    """

    def __init__(self, path: Path, catalog: Catalog) -> None:
        self.path = path
        self.catalog = catalog
        self.partial_path = path / "partial"
        self.run_path = path / "run"
        self.blobs = Blobs(path / "blobs", path / "names.lock", path / "quarantine", catalog)
        self._lookup = Lookup(catalog, self.blobs, self.partial_path)

    @classmethod
    def open(cls, path: Path, *, create: bool = True, map_size: int = MAP_SIZE) -> "Store":
        """Raises UserError: no store and not to be made, a newer format, or no access."""
        open_layout(path, create=create)
        backup.check_present(path)
        return cls(path, Catalog.open(path / "catalog", map_size=map_size))

    def close(self) -> None:
        self.keep_copy()
        self.catalog.close()

    def keep_copy(self) -> None:
        """Of the catalog, unless there is a recent one."""
        backup.keep(self.path, self.catalog)

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Reading

    def content(self, key: SpanKey, *, forget: bool = True) -> Content | None:
        """The span's bytes as far as they are here; None when nothing is.

        Args:
            forget: A blob whose file is gone or of the wrong size, so that its spans count as missing.
        """
        with translated(f"open {key} in {self.path}"):
            return self._lookup.content(key, forget=forget)

    def blob(self, digest: Digest) -> Content | None:
        """The bytes of a blob, whichever spans have them; None when it is gone."""
        with translated(f"open blob {digest} in {self.path}"):
            return self._lookup.blob(digest)

    def has(self, key: SpanKey) -> bool:
        """True when the span is sealed."""
        return bool(self.catalog.recorded([key]))

    def local_bytes(self, keys: Iterable[SpanKey]) -> int:
        """How many bytes of these spans are here, sealed or in flight. Opens no blob."""
        wanted = set(keys)
        sealed = self.catalog.recorded(wanted)
        with translated(f"read {self.partial_path}"):
            started = {name.partition(".")[0] for name in os.listdir(self.partial_path)}
            flying = [key for key in wanted - sealed if started and partial_name(key) in started]
            return sum(key.size for key in sealed) + sum(local_size(self.partial_path, key) for key in flying)

    def literal(self, digest: Digest) -> bytes:
        """Raises CorruptData when the bytes are gone or no longer match."""
        record = self.catalog.blob(digest)
        data = b"" if record is None else self._lookup.whole(record)
        hasher = DigestHasher()
        hasher.update(data)
        if not data or hasher.digest() != digest.partition("-")[0]:
            raise CorruptData(f"literal {digest} is gone or damaged in {self.path}", hint="cakefs add the model again")
        return data

    def clonable(self, key: SpanKey) -> Descriptor | None:
        """The immutable file with exactly the bytes of a sealed span; None where they are in no file of their own."""
        record = self.catalog.find(key)
        with translated(f"open {key} in {self.path}"):
            return None if record is None or record.inline is not None else self.blobs.open(record)

    # Writing

    def write_chunk(self, key: SpanKey, chunk: int, data: bytes | bytearray | memoryview) -> bool:
        """Keeps a chunk of the span, unless it is here and good.

        Of a sealed span only a damaged chunk is replaced, by the very bytes that were sealed.

        Returns: True when the span is complete and waits for `seal`.
        Raises: CorruptData: The span is sealed, the chunk damaged, and these bytes are not the ones that were sealed.
        """
        if len(data) != chunk_size(key.size, chunk) or not 0 <= chunk < chunk_count(key.size):
            raise ValueError(f"{len(data)} bytes for chunk {chunk} of {key!r}")
        with translated(f"write to {self.path}"):
            while True:
                record = self._lookup.record(key)
                if record is not None:
                    self._repair(key, record, chunk, data)
                    return False
                with self._lock(key) as partial:
                    # Whoever seals keeps the lock until the record is there.
                    if self._lookup.record(key) is None:
                        return partial.write(chunk, data)
                    partial.discard()

    def seal(self, keys: Iterable[SpanKey]) -> list[SpanKey]:
        """Publishes the complete ones as blobs, many at a time.

        Returns: Those that are sealed now, by us or before. A chunk that does not match its sum becomes missing, and
            its span stays a partial.
        """
        ordered = sorted(set(keys), key=partial_name)  # the order of locks
        sealed: list[SpanKey] = []
        with translated(f"write to {self.path}"):
            for first in range(0, len(ordered), SEAL_BATCH):
                sealed += self._seal_batch(ordered[first : first + SEAL_BATCH])
        return sealed

    def put_span(self, key: SpanKey, data: bytes) -> None:
        self.put_spans([(key, data)])

    def put_spans(self, spans: Iterable[tuple[SpanKey, bytes]]) -> None:
        """Seals whole spans; those that are sealed already are left as they are."""
        small: dict[SpanKey, Candidate] = {}
        large: list[SpanKey] = []
        with translated(f"write to {self.path}"):
            for key, data in spans:
                if len(data) != key.size or not data:
                    raise ValueError(f"{len(data)} bytes for {key!r}")
                if self._lookup.record(key) is not None:
                    continue
                if len(data) <= INLINE_LIMIT:
                    small[key] = Candidate.of_bytes(key, bytes(data))
                else:
                    self._write_whole(key, data)
                    large.append(key)
            if small:
                self.blobs.publish(list(small.values()))
        self.seal(large)

    def bind(self, spans: Sequence[tuple[SpanKey, BlobRecord]]) -> bool:
        """As `Blobs.bind`; what was on its way of the spans is dropped."""
        with translated(f"write to {self.path}"):
            bound = self.blobs.bind(spans)
            if bound:
                self.seal(key for key, _ in spans)
            return bound

    def put_literal(self, data: bytes) -> Digest:
        """Keeps bytes that no upstream file has."""
        key = _literal_key(data)
        self.put_span(key, data)
        record = self.catalog.find(key)
        if record is None:
            raise CakeError(f"literal of {len(data)} bytes vanished from {self.path} at once")
        return record.digest

    def has_literal(self, data: bytes) -> bool:
        return self.has(_literal_key(data))

    # Removing

    def freeing(self, work: Callable[[], T]) -> T:
        """Runs what makes room. On a full disk that needs some itself, to change the catalog: that of its copy, which
        is made again when there is room."""
        try:
            return work()
        except StoreFull:
            if not backup.drop_copy(self.path):
                raise
        return work()  # What failed is no longer held by its exception.

    def drop_span(self, key: SpanKey) -> None:
        """Forgets what is here of the span: its bytes are known to be wrong. A blob nobody else has is put aside."""
        with translated(f"write to {self.path}"):
            self.drop_partial(key)
            self.blobs.quarantine(key)

    def drop_partial(self, key: SpanKey) -> None:
        with translated(f"write to {self.path}"):
            partial = Partial.lock(self.partial_path, key, create=False)
            if partial is not None:
                with partial:
                    partial.discard()

    def delete_blobs(self, digests: Sequence[str]) -> int:
        """Deletes those that no span names (`catalog.forget_spans` comes first). Returns: their bytes."""
        with translated(f"write to {self.path}"):
            return self.freeing(lambda: self.blobs.delete(digests))

    def evict(self, items: Iterable[Digest | SpanKey], *, dry_run: bool = False) -> set[Digest | SpanKey]:
        """Deletes blobs that can be fetched again, and partials of such spans, except those in use; their spans are
        missing then.

        Returns: Those that went, or would go.
        """
        digests: list[Digest] = []
        gone: set[Digest | SpanKey] = set()
        with translated(f"write to {self.path}"):
            for item in items:  # Partials first: on a full disk the catalog needs room to shrink.
                if not isinstance(item, SpanKey):
                    digests.append(item)
                elif evict_partial(self.partial_path, item, dry_run=dry_run):
                    gone.add(item)
            return gone | self.freeing(lambda: self.blobs.evict(digests, dry_run=dry_run)) if digests else gone

    def note_use(self, keys: Iterable[SpanKey], *, ago: float = 0.0) -> None:
        """These spans are used now, or were so many seconds ago: what was used before makes room before them."""
        for key in keys:
            record = self.catalog.find(key)
            if record is None or record.inline is None:
                with suppress(OSError):  # borrowed, gone, not begun or read-only: nothing to be evicted
                    touch(self._file(key if record is None else record.digest), ago)

    def last_use(self, item: Digest | SpanKey) -> float | None:
        """When a blob in a file of its own, or a partial, was used last, in Unix seconds; None when there is no such
        file."""
        return last_use(self._file(item))

    # Upkeep: work that grows with the store

    def partials(self) -> Iterator[tuple[SpanKey, int]]:
        """The spans in flight, with the bytes that each takes on disk."""
        return upkeep.partials(self.partial_path)

    def usage(self) -> upkeep.Usage:
        return upkeep.usage(self.catalog, self.partial_path, self.path / "quarantine")

    def sweep(self) -> int:
        """Removes what nobody will ever use: debris of crashes, quarantined blobs, leases of the dead.

        Safe beside anything that other processes do. Returns: the bytes freed on disk.
        """
        with translated(f"clear up {self.path}"):
            self.leased()
            sweep_layout(self.path)
            backup.sweep(self.path)
            return (
                upkeep.sweep_partials(self.catalog, self.partial_path)
                + upkeep.sweep_blobs(self.catalog, self.blobs)
                + self.empty_quarantine()
            )

    def empty_quarantine(self) -> int:
        """Returns: the bytes freed on disk."""
        with translated(f"clear up {self.path}"):
            return upkeep.sweep_directory(self.path / "quarantine")

    # Processes

    def lease(self) -> leases.Lease:
        """Tells other processes which manifests this one serves."""
        return leases.Lease(None) if self.catalog.readonly else leases.new_lease(self.run_path)

    def leased(self) -> set[str]:
        """Manifests that a living process holds."""
        return leases.leased(self.run_path)

    def guard(self, *, exclusive: bool = False) -> AbstractContextManager[None]:
        """Held by gc (exclusive), and by whoever has stored bytes that no model names yet, such as `add`."""
        return locked(self.path / "gc.lock", shared=not exclusive)

    def evicting(self) -> AbstractContextManager[None]:
        """Held by whoever plans and carries out an eviction."""
        return locked(self.path / "evict.lock")

    @contextmanager
    def confirming(self, identity: str) -> Iterator[None]:
        """Held by whoever hashes a whole upstream file: the others wait, and need not do it again."""
        place = int.from_bytes(hashlib.sha256(identity.encode()).digest()[:7], "little")
        with locked_place(self.path / "confirm.lock", place):
            yield

    # Within

    def _file(self, item: Digest | SpanKey) -> Path:
        """Where the bytes of a blob, or of a partial, lie."""
        return data_path(self.partial_path, item) if isinstance(item, SpanKey) else self.blobs.path(item)

    def _lock(self, key: SpanKey) -> Partial:
        partial = Partial.lock(self.partial_path, key, create=True)
        assert partial is not None
        return partial

    def _write_whole(self, key: SpanKey, data: bytes) -> None:
        view = memoryview(data)
        with self._lock(key) as partial:
            for chunk in range(chunk_count(key.size)):
                partial.write(chunk, view[chunk << CHUNK_SHIFT :][:CHUNK])

    def _seal_batch(self, keys: Sequence[SpanKey]) -> list[SpanKey]:
        sealed: list[SpanKey] = []
        with ExitStack() as locks:
            complete: dict[SpanKey, Partial] = {}
            for key in keys:
                partial = Partial.lock(self.partial_path, key, create=False)
                if partial is not None:
                    locks.enter_context(partial)
                record, ready = self._lookup.record(key), partial is not None and partial.complete
                if record is not None and not (record.places and ready):
                    sealed.append(key)
                    if partial is not None:
                        partial.discard()
                elif partial is not None and ready:
                    complete[key] = partial
            if complete:
                candidates = inspect(list(complete.values()), self.blobs.owns)
                self.blobs.publish(candidates)
                for candidate in candidates:
                    complete[candidate.key].discard()
                    sealed.append(candidate.key)
        return sealed

    def _repair(self, key: SpanKey, record: BlobRecord, chunk: int, data: bytes | bytearray | memoryview) -> None:
        if record.inline is not None:
            return  # checked as a whole by _record
        if chunk_sum(data) != memoryview(record.sums).cast("Q")[chunk]:
            if self._lookup.is_good(key, record, chunk):
                return  # Two processes were sent different bytes: which ones are wrong, the file's hash tells.
            raise CorruptData(f"chunk {chunk} of {key} is not what {record.digest} has", hint="cakefs verify --repair")
        (self.blobs.refuse if record.places else self.blobs.rewrite)(record, chunk, data)


def _literal_key(data: bytes) -> SpanKey:
    return SpanKey(LITERAL + hashlib.sha256(data).hexdigest(), 0, len(data))
