"""Spans and blobs -> their bytes, as far as these are here; a blob that cannot be used is forgotten."""

import logging
from functools import partial as bind
from pathlib import Path

from cakefs.errors import CakeError
from cakefs.model import CHUNK, Digest, SpanKey
from cakefs.store.blobs import Blobs
from cakefs.store.catalog import BlobRecord, Catalog
from cakefs.store.content import Content, FileContent, InlineContent, Outcome
from cakefs.store.files import read_full, scratch
from cakefs.store.foreign import BorrowedContent, is_gone, open_place, report_gone
from cakefs.store.hashes import CHUNK_SHIFT, chunk_size
from cakefs.store.partial import open_partial

_log = logging.getLogger("cakefs.store")


class Lookup:
    """Raises OSError, and what the catalog raises."""

    def __init__(self, catalog: Catalog, blobs: Blobs, partial_path: Path) -> None:
        self._catalog = catalog
        self._blobs = blobs
        self._partial_path = partial_path

    def content(self, key: SpanKey, *, forget: bool) -> Content | None:
        """As `Store.content`."""
        while True:
            record = self._catalog.find(key)
            if record is not None:
                if (content := self._blob_content(key, record)) is not None:
                    return content
                if not forget:
                    return None
                self._forget(record)
            partial = self._partial_content(key)
            # Sealed between the two looks: then there is another record now.
            if partial is not None or self._catalog.find(key) in (None, record):
                return partial

    def blob(self, digest: Digest) -> Content | None:
        """As `Store.blob`."""
        record = self._catalog.blob(digest)
        return None if record is None else self._blob_content(SpanKey(digest, 0, record.size), record)

    def record(self, key: SpanKey) -> BlobRecord | None:
        """The record of the span's blob, if that can be used; else the blob is forgotten, unless that may pass."""
        record = self._catalog.find(key)
        if record is None or self._blobs.usable(record):
            return record
        self._forget(record)
        return None

    def whole(self, record: BlobRecord) -> bytes:
        """All bytes of a blob; fewer when the disk has fewer."""
        if record.inline is not None:
            return record.inline
        file = self._blobs.open(record)
        if file is None:
            return b""
        data = bytearray(record.size)
        return bytes(data[: read_full(file.fd, memoryview(data), 0)])

    def is_good(self, key: SpanKey, record: BlobRecord, chunk: int) -> bool:
        """Whether a chunk of a blob has the bytes that were sealed."""
        content, at = self._blob_content(key, record), chunk << CHUNK_SHIFT
        size = chunk_size(record.size, chunk)
        return content is not None and content.read_into(scratch(size), at, wait=True) is Outcome.DONE

    def _forget(self, record: BlobRecord) -> None:
        stamps = [place.stamp for place in record.places]
        if stamps and not all(map(is_gone, stamps)):
            _log.warning("%s cannot be read: what is needed of it is fetched", " and ".join(map(str, stamps)))
            return
        if stamps:
            report_gone(*stamps)
        else:
            _log.warning("blob %s is gone or damaged as a whole: it will be fetched again", record.digest)
        if not self._catalog.readonly:
            try:
                self._blobs.forget(record)
            except (CakeError, OSError) as error:  # a full disk must not fail a read
                _log.warning("%s", error)

    def _blob_content(self, key: SpanKey, record: BlobRecord) -> Content | None:
        if record.inline is not None:
            return InlineContent(record.inline) if self._blobs.usable(record) else None
        sums = memoryview(record.sums).cast("Q")
        if record.places:
            lent = open_place(record.places)
            return None if lent is None else BorrowedContent(lent, record.size, sums, bind(_report, key), report_gone)
        file = self._blobs.open(record)
        return None if file is None else FileContent(file, record.size, sums, bind(_report, key))

    def _partial_content(self, key: SpanKey) -> Content | None:
        found = open_partial(self._partial_path, key)
        return None if found is None else FileContent(found.data, key.size, found.sums, bind(_report, key))


def _report(key: SpanKey, chunk: int) -> None:
    start = key.start + (chunk << CHUNK_SHIFT)
    damaged = SpanKey(key.identity, start, min(key.stop, start + CHUNK))
    _log.warning("%s do not match their recorded sum: to be fetched again", damaged)
