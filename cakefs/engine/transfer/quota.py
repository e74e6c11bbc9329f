"""The limit of the store as one transfer process keeps it: room is made before bytes are fetched.

What the store takes is counted anew now and then, since other processes fill it, too; in between, what this process
fetches is added up. Where no room can be made, bytes are fetched and served all the same, but not kept.
"""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from cakefs.engine.tasks import in_background
from cakefs.model import MIB
from cakefs.plan.requests import REQUEST_LIMIT
from cakefs.store.store import Store

# Counted anew, and room made, by this part of the limit: evicting has to look at all that is there. As much, or a whole
# request, is left free for what another process has been admitted and has not written yet.
PART = 50
PART_LIMIT = 256 * MIB
PAUSE_S = 1.0  # Between two attempts to make room when there was none.


def left_free(limit: int) -> int:
    """What transfers may leave free of that limit, at most."""
    return max(min(limit // PART, PART_LIMIT), REQUEST_LIMIT)


class Quota:
    """Args:
    limit: Bytes; 0 for none.
    spared_since: As in `messages.Settings`.
    """

    def __init__(self, store: Store, limit: int, spared_since: float) -> None:
        self._store = store
        self._limit = limit
        self._spared_since = spared_since
        self._part = min(limit // PART, PART_LIMIT)
        self._free = 0  # Bytes that may still be fetched before the store is counted anew.
        self._coming = 0  # Admitted and not all written.
        self._again_at = 0.0
        self._changed = trio.Condition()

    @asynccontextmanager
    async def admit(self, size: int) -> AsyncIterator[bool]:
        """For as long as bytes come: makes room for them before. Yields False when they cannot be kept."""
        kept = not self._limit or await self._reserve(size)
        try:
            yield kept
        finally:
            if self._limit and kept:
                with trio.CancelScope(shield=True):
                    await self._release(size)

    async def _reserve(self, size: int) -> bool:
        async with self._changed:
            while self._coming and self._coming + size > self._part:
                await self._changed.wait()
            if self._free < size and time.monotonic() >= self._again_at:
                await self._count(size)
            if self._free < size:
                return False
            self._free -= size
            self._coming += size
            return True

    async def _release(self, size: int) -> None:
        async with self._changed:
            self._coming -= size
            self._changed.notify_all()

    async def _count(self, size: int) -> None:
        from cakefs.engine.evict import make_room  # 0.05 s: only for a store with a limit

        part, spare = max(size, self._part), left_free(self._limit)
        wanted = part + spare + self._coming
        free = await in_background(make_room, self._store, wanted, self._limit, spared_since=self._spared_since)
        self._free = min(free - spare - self._coming, part)
        if self._free < size:
            self._again_at = time.monotonic() + PAUSE_S
