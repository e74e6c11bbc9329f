"""Borrowing from files of somebody else: from scanned files to blobs, from borrowed blobs to our own, and back to
nothing when such a file is gone.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

from cakefs.model import INLINE_LIMIT, MIB, SpanKey
from cakefs.store.blobs import Candidate
from cakefs.store.borrowed import Place, Stamp
from cakefs.store.files import read_full, translated
from cakefs.store.foreign import exists, is_gone, open_place, open_stamped, report_gone
from cakefs.store.partial import Partial
from cakefs.store.scan import Scan
from cakefs.store.store import Store

# What is recorded while the lock of names is held once. The bytes count where they are compared with what is here.
_BATCH_SPANS = 2048
_BATCH_BYTES = 512 * MIB


class Borrowing:
    """Raises StoreFull when the disk is full; what was recorded before stays."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def borrow(self, scans: Sequence[tuple[str, Scan]]) -> None:
        """Says that what was scanned is the content of upstream files, each named by its identity.

        Bytes that are here stay where they are, small ranges are copied, the rest is borrowed. A span that had other
        bytes until now gets these: whoever scanned has hashed the whole file.
        """
        store = self._store
        with translated(f"write to {store.path}"):
            found: dict[SpanKey, Candidate] = {}
            for identity, scan in scans:
                found |= self._candidates(identity, scan)
            for batch in _by_size(found):
                store.blobs.publish([found[key] for key in batch])
            store.catalog.borrowed.note((scan.stamp, scan.identities) for _, scan in scans)

    def own(self, keys: Iterable[SpanKey]) -> int:
        """Copies what is borrowed of these spans; where the file system can share blocks, it does.

        Returns: The bytes copied. What fails its sums on the way stays borrowed.
        """
        copied = 0
        with translated(f"write to {self._store.path}"):
            for batch in _by_size(keys):
                copied += sum(map(self._copy, batch))
                self._store.seal(batch)
        return copied

    def forget_lost(self) -> list[Stamp]:
        """Looks at all files that lend something: what cannot be had of them counts as missing from now on, and is
        fetched. Returns: Those files."""
        return self._forget(lambda stamp: not exists(stamp))

    def forget_gone(self) -> list[Stamp]:
        """As `forget_lost`, but not what may be had again: where a disk fails, or a directory may not be searched."""
        return self._forget(is_gone)

    def lost(self) -> set[str]:
        """Blobs that are in no file any more, or in none that can be looked at; those files are told to the log.

        Nothing is forgotten: who only looks must not lose what was found of files on a disk that is away for a while.
        """
        borrowed = self._store.catalog.borrowed
        blobs, lenders = borrowed.lent_by([stamp for stamp in borrowed.files() if not exists(stamp)])
        report_gone(*sorted(lenders))
        return blobs

    def bytes(self) -> int:
        """Of all that is borrowed."""
        borrowed = self._store.catalog.borrowed.digests()
        return sum(size for digest, size, _ in self._store.catalog.blobs() if digest in borrowed) if borrowed else 0

    def bytes_of(self, keys: Iterable[SpanKey]) -> int:
        """Of what is borrowed of these spans, each blob once."""
        records = {r.digest: r for r in map(self._store.catalog.find, keys) if r is not None and r.places}
        return sum(record.size for record in records.values())

    def _forget(self, is_lost: Callable[[Stamp], bool]) -> list[Stamp]:
        store = self._store
        lost = [] if store.catalog.readonly else [s for s in store.catalog.borrowed.files() if is_lost(s)]
        if not lost:
            return []
        with translated(f"write to {store.path}"), store.blobs.names():
            lenders = sorted(store.catalog.forget_files(lost))
        report_gone(*lenders)
        return lenders

    def _copy(self, key: SpanKey) -> int:
        record = self._store.catalog.find(key)
        lent = open_place(record.places) if record is not None else None
        if record is None or lent is None:
            return 0
        partial = Partial.lock(self._store.partial_path, key, create=True)
        assert partial is not None
        with partial:
            partial.copy(lent.file.fd, lent.place.offset, record.sums)
        return key.size

    def _candidates(self, identity: str, scan: Scan) -> dict[SpanKey, Candidate]:
        """The scanned ranges, but those known to be there; nothing of a file that has changed since."""
        file = open_stamped(scan.stamp)
        if file is None:
            return {}
        pieces = {SpanKey(identity, *piece.range): piece for piece in scan.pieces}
        found: dict[SpanKey, Candidate] = {}
        known = self._store.catalog.recorded(pieces)
        for key, piece in pieces.items():
            place, record = Place(scan.stamp, key.start), self._store.catalog.find(key) if key in known else None
            if record is not None and place in record.places:
                continue
            if key.size > INLINE_LIMIT:
                found[key] = Candidate(key, piece.digest, piece.sums, None, None, place=place)
                continue
            data = bytearray(key.size)
            read_full(file.fd, memoryview(data), key.start)
            candidate = Candidate.of_bytes(key, bytes(data))
            if candidate.digest == piece.digest:  # else it is changing under our hands
                found[key] = candidate
        return found


def _by_size(keys: Iterable[SpanKey]) -> Iterator[list[SpanKey]]:
    batch: list[SpanKey] = []
    size = 0
    for key in keys:
        batch.append(key)
        size += key.size
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_SPANS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
