"""What follows from a file that was hashed and is right, where it had come wrong before.

A header is believed when its model is added, and proved with the rest of its file. If the file came wrong, that may
have been the header. So once the file is right, the models that show it are composed anew, of what is in the store:
nothing is asked of anybody.
"""

import logging
import time
from collections.abc import Mapping
from functools import partial

from cakefs.engine.local import read_part
from cakefs.errors import CakeError, NotFound
from cakefs.model import ByteRange, Listing, Locator, Manifest, Published, Source, SpanKey, without_query
from cakefs.plan.ranges import tiling
from cakefs.remotes.base import Sink
from cakefs.store.store import Store

log = logging.getLogger(__name__)


def record_right(store: Store, identity: str) -> None:
    """An upstream file was hashed, and is what was published. In a thread."""
    known = store.catalog.verified(identity)
    if known is not None and not known.ok:
        read_headers_again(store, identity)  # First: whoever is killed on the way leaves it to the next.
    store.catalog.set_verified(identity, True, int(time.time()))


def read_headers_again(store: Store, identity: str) -> None:
    """Composes the models anew that show a file of which all is here."""
    made, changed = [], False
    for name, record in store.catalog.models.all().items():
        try:
            head = store.catalog.models.head(record.manifest)
            if not any(source.identity == identity for source in head.sources):
                continue
            if head.stack or head.substituted:
                made.append(name)
            else:
                changed |= _compose_again(store, store.catalog.models.manifest(record.manifest))
        except CakeError as error:
            log.error("%s: a file of it had come wrong, and its headers cannot be read again: %s", name, error.message)
    for name in made if changed else ():
        log.error("%s was made when a header had come wrong: make it again", name)


def _compose_again(store: Store, manifest: Manifest) -> bool:
    """Whether that makes it another."""
    import trio  # with this, 0.2 s: only for those who need it

    from cakefs.engine.index import Indexer

    files = tuple(map(_published, manifest.sources))
    listing = Listing(manifest.origin, manifest.revision, manifest.requested, files, manifest.whole)
    indexer = Indexer(store, _Stored(store, {file.url: file.identity for file in files}))
    with store.guard():
        added = trio.run(partial(indexer.add, listing, manifest.name, update=True))
    if added.changed:
        log.error("%s: a header had come wrong when it was added; what is in it is listed anew", manifest.name)
    return added.changed


def _published(source: Source) -> Published:
    url, size, validator = source.locator.url, source.locator.size, source.locator.validator
    return Published(source.path, size, source.identity, url, source.sha256, validator)


class _Stored:
    """A remote that has what the store has. Args: identities: Of files, by URL."""

    def __init__(self, store: Store, identities: Mapping[str, str]) -> None:
        self._store = store
        self._identities = identities

    async def fetch(self, locator: Locator, span: ByteRange, sink: Sink) -> None:
        identity = self._identities[locator.url]
        pieces = tiling(self._store.catalog.spans(identity), locator.size)
        if pieces is None:
            raise NotFound(f"not all of {without_query(locator.url)} is in the store")
        for start, stop in pieces:
            first, last = max(start, span.start), min(stop, span.stop)
            if first < last:
                sink(read_part(self._store, SpanKey(identity, start, stop), ByteRange(first - start, last - start)))
