"""What follows from a file that was hashed and is right, where it had come wrong before.

A header is believed when its model is added, and proved with the rest of its file. If the file came wrong, that may
have been the header. So once the file is right, its header is held against what its models say is in it, and those that
say something else are composed anew: all of what is in the store, nothing is asked of anybody.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial

from cakefs.engine.local import read_part
from cakefs.errors import CakeError, CorruptData, NotFound
from cakefs.model import (
    ByteRange,
    Listing,
    Locator,
    Manifest,
    Published,
    Source,
    SpanKey,
    TensorInfo,
    leaves,
    without_query,
)
from cakefs.plan.ranges import tiling
from cakefs.remotes.base import Sink
from cakefs.store.store import Store

log = logging.getLogger(__name__)


def record_right(store: Store, identity: str) -> bool:
    """An upstream file was hashed, and is what was published. In a thread.

    Returns: False where that is not recorded: what a model says is in it is wrong, and could not be mended.
    """
    known = store.catalog.verified(identity)
    if known is not None and not known.ok and not _read_headers_again(store, identity):
        return False
    store.catalog.set_verified(identity, True, int(time.time()))
    return True


def _read_headers_again(store: Store, identity: str) -> bool:
    """Before the file counts as right: whoever is killed on the way leaves it to the next."""
    made, mended, left = [], False, False
    for name, record in store.catalog.models.all().items():
        try:
            head = store.catalog.models.head(record.manifest)
            if not any(source.identity == identity for source in head.sources):
                continue
            if head.stack or head.substituted:
                made.append(name)
                continue
            with store.guard():
                mended |= _mend(store, record.manifest, identity)
        except CakeError as error:
            log.error(
                "%s: a file had come wrong; what is in it cannot be read again, add it anew: %s", name, error.message
            )
            left |= isinstance(error, NotFound | CorruptData)
    for name in made if mended else ():
        log.error("%s was made when a header had come wrong: make it again", name)
    return not left


def _mend(store: Store, manifest_id: str, identity: str) -> bool:
    """Whether there was something to mend. Raises NotFound where another header is needed, and not here."""
    manifest = store.catalog.models.manifest(manifest_id)
    files = tuple(map(_published, manifest.sources))
    alone = _composed(store, manifest, [file for file in files if file.identity == identity][:1])
    if _said_of(alone, identity) == _said_of(manifest, identity):
        return False
    from cakefs.engine.known.naming import same_model
    from cakefs.engine.known.shown import Shown, put_model

    anew = _composed(store, manifest, files)
    if same_model(manifest, anew):
        return False  # read alone it says less, such as a shard without its index
    if not put_model(store, anew, Shown.of(anew), instead_of=manifest_id):
        return False  # somebody else made another model of it meanwhile
    log.error("%s: a header had come wrong when it was added; what is in it is listed anew", manifest.name)
    return True


def _composed(store: Store, manifest: Manifest, files: Sequence[Published]) -> Manifest:
    """The model with some of its files, out of what is in the store."""
    import trio  # with the other, 0.2 s: only for those who need it

    from cakefs.engine.index import Indexer

    listing = Listing(manifest.origin, manifest.revision, manifest.requested, tuple(files), manifest.whole)
    indexer = Indexer(store, _Stored(store, {file.url: file.identity for file in files}))
    return trio.run(partial(indexer.compose, listing, manifest.name))


def _said_of(manifest: Manifest, identity: str) -> tuple[set[ByteRange], set[object]]:
    """What a manifest says is in a file: its pieces, and of tensors name, dtype, shape and place."""
    sources = manifest.sources
    spans = {
        i: ByteRange(s.start, s.stop) for i, s in enumerate(manifest.spans) if sources[s.source].identity == identity
    }

    def place(tensor: TensorInfo) -> tuple[object, ...]:
        parts = leaves(tensor.data) if tensor.data is not None else ()
        return spans.get(tensor.span), *((spans.get(part.span), part.start, part.stop) for part in parts)

    tensors = ((t.name, t.dtype, t.shape, place(t)) for t in manifest.tensors)
    return set(spans.values()), {tensor for tensor in tensors if any(tensor[3])}


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
