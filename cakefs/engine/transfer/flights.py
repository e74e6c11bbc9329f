"""What is on its way: a *flight* is one job, and every chunk is in at most one; and what did not come a moment ago."""

import math
from collections import OrderedDict
from copy import copy
from enum import IntEnum
from typing import NamedTuple

import trio

from cakefs.engine.transfer.messages import FetchJob, JobChunk, job_chunks
from cakefs.errors import CakeError
from cakefs.model import SpanKey

FAILED_LIMIT = 10_000  # Chunks of which it is remembered why they did not come.
AGAIN_S = 5.0  # How long a reader waits for a chunk that another waited for in vain, at first
LEAST_AGAIN_S = 2.0  # and after a few more.


class Priority(IntEnum):
    """What goes first; within one, what was wanted first."""

    DEMAND = 0  # Somebody waits for it.
    SOON = 1  # A reader will most likely come to it next.
    AHEAD = 2


class Pending:
    """A chunk on its way, or that came, or that did not because of `error`."""

    __slots__ = ("chunk", "error", "event", "flight", "settled")

    def __init__(self, flight: "Flight", chunk: JobChunk) -> None:
        self.flight = flight
        self.chunk = chunk
        self.event: trio.Event | None = None
        self.settled = False
        self.error: CakeError | None = None

    @property
    def size(self) -> int:
        return self.chunk.stop - self.chunk.start

    def settle(self, error: CakeError | None) -> None:
        self.settled, self.error = True, error
        if self.event is not None:
            self.event.set()

    async def wait(self, until: float = math.inf) -> bool:
        """Until it came: False where it did not by a time of trio's clock. Raises what the flight failed with."""
        if not self.settled:
            self.event = trio.Event() if self.event is None else self.event
            with trio.move_on_at(until):
                await self.event.wait()
        if self.error is not None:
            raise copy(self.error)
        return self.settled


class Flight:
    """A job and what of it has not arrived yet."""

    __slots__ = ("chunks", "deaths", "job", "left", "priority", "queued")

    def __init__(self, job: FetchJob, priority: Priority) -> None:
        self.job = job
        self.chunks: list[JobChunk] = job_chunks(job)
        self.left = set(range(len(self.chunks)))
        self.priority = priority
        self.queued = True
        self.deaths = 0


class Counters:
    """What `status` shows of the network; only ever grows."""

    def __init__(self) -> None:
        self.bytes_fetched = 0
        self.flights = 0
        self.failures = 0
        self.worker_deaths = 0
        self.confirmed = 0
        self.refuted = 0


class Failure(NamedTuple):
    """Attributes: patience_s: How long the next may wait who asks for it."""

    when: float
    error: CakeError
    patience_s: float


class Failures:
    """Why chunks did not come, for some seconds after somebody last waited for them in vain.

    The kernel lets those who want the same page ask one after the other, and each twice: so who asks again is told
    soon, and the sooner the more asked before.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._failed: OrderedDict[tuple[SpanKey, int], Failure] = OrderedDict()

    def remember(self, chunk: JobChunk, error: CakeError) -> None:
        earlier = self.earlier(chunk)
        patience_s = max(LEAST_AGAIN_S, earlier.patience_s / 2) if earlier else AGAIN_S
        self._failed[chunk.key, chunk.chunk] = Failure(trio.current_time(), error, patience_s)
        while len(self._failed) > FAILED_LIMIT:
            self._failed.popitem(last=False)

    def forget(self, chunk: JobChunk) -> None:
        self._failed.pop((chunk.key, chunk.chunk), None)

    def earlier(self, chunk: JobChunk) -> Failure | None:
        failure = self._failed.get((chunk.key, chunk.chunk))
        return failure if failure is not None and trio.current_time() - failure.when < self._seconds else None
