"""The large files of a pull are hashed while they come, and confirmed when their last byte has: then nothing has to be
read again, from the disk where a file is larger than memory."""

import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager

import trio

from cakefs.buffers import page_aligned
from cakefs.engine.tasks import open_flat_nursery
from cakefs.engine.transfer.confirm import Following, confirm_source
from cakefs.model import MIB, Manifest, Source
from cakefs.plan.pullplan import PROVING
from cakefs.plan.ranges import tiling
from cakefs.store.store import Store

log = logging.getLogger(__name__)

FOLLOWED = 16 * MIB  # Of this size on; smaller files are confirmed by who fetches them.
LOOK_S = 0.1
BLOCK = 4 * MIB


class Followed:
    """Of the upstream files that a pull of some spans completes, those that it hashes: numbers of sources.

    Args:
        spans: What the pull is to bring, of the manifest.
    """

    def __init__(self, store: Store, manifest: Manifest, spans: Iterable[int]) -> None:
        self._store = store
        self._manifest = manifest
        self._coming = False
        self._buffer = page_aligned(BLOCK)
        wanted: dict[int, set[tuple[int, int]]] = {}
        for span in (manifest.spans[i] for i in spans):
            wanted.setdefault(span.source, set()).add((span.start, span.stop))
        self._files = {i: self._following(i) for i in sorted(wanted) if self._completes(i, wanted[i])}

    def __contains__(self, source: object) -> bool:
        return source in self._files

    def confirm(self, source: int) -> bool | None:
        """As `confirm_source`, with what was hashed already. In a thread, while nothing is coming."""
        return _confirm(self._store, self._manifest.sources[source], self._files.get(source))

    @asynccontextmanager
    async def coming(self, tell: Callable[[str, bool], None]) -> AsyncIterator[None]:
        """While this is entered, files come.

        Args:
            tell: Called with the identity of a file that was hashed, and whether it is right.
        """
        self._coming = True
        async with open_flat_nursery() as nursery:
            nursery.start_soon(self._follow, tell)
            try:
                yield
            finally:
                self._coming = False
                nursery.cancel_scope.cancel()

    def _following(self, source: int) -> Following:
        file = self._manifest.sources[source]
        return Following(self._store, file.identity, file.locator.size)

    def _completes(self, source: int, wanted: set[tuple[int, int]]) -> bool:
        """Whether it is large, can be confirmed and was not, and is complete with these spans."""
        file = self._manifest.sources[source]
        if file.locator.size < FOLLOWED or not file.identity.startswith(PROVING):
            return False
        known = self._store.catalog.verified(file.identity)
        here = self._store.catalog.spans(file.identity).keys()
        return not (known and known.ok) and tiling(here | wanted, file.locator.size) is not None

    async def _follow(self, tell: Callable[[str, bool], None]) -> None:
        left = dict(self._files)
        while left:
            await trio.sleep(LOOK_S)
            for source, file in list(left.items()):
                ok = await trio.to_thread.run_sync(self._advance, source, file)
                if file.over:
                    del left[source]
                if ok is not None:
                    tell(self._manifest.sources[source].identity, ok)

    def _advance(self, source: int, file: Following) -> bool | None:
        """The verdict, once all of it was hashed. In a thread."""
        file.advance(self._buffer, lambda: self._coming)
        return self.confirm(source) if file.over else None


def _confirm(store: Store, source: Source, following: Following | None) -> bool | None:
    ok = confirm_source(store, source.identity, source.locator.size, following=following)
    if ok is False:
        from cakefs.remotes.answers import shown  # httpx, 0.2 s: only for who has something to tell

        log.error("%s came wrong, and is fetched again", shown(source.locator.url))
    return ok
