"""Single-flight fetching of chunks: joins or starts flights, feeds them to the transfer processes, wakes who waits.

A *flight* is one job on its way. Every chunk is in at most one; a flight outlives the readers that wait for it. Jobs
that a reader waits for go first; readahead and pull use what is left, and always leave room for the next demand.
"""

import itertools
import logging
import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Container, Iterable, Sequence
from copy import copy

import msgspec
import trio

from cakefs.engine.transfer.flights import Counters, Failures, Flight, Pending, Priority
from cakefs.engine.transfer.messages import (
    SPARE_CONNECTIONS,
    Arrived,
    Confirmed,
    Done,
    Failed,
    FetchJob,
    JobChunk,
    Report,
    Settings,
    error_of,
)
from cakefs.engine.transfer.workers import WorkerProcess
from cakefs.errors import CakeError, RemoteChanged, RemoteUnavailable
from cakefs.model import CHUNK, MIB, Manifest, Source, SpanKey
from cakefs.plan.requests import ChunkRef, range_requests
from cakefs.remotes.files import HINT, file_path

log = logging.getLogger(__name__)

DEMAND_RESERVE = 2  # Requests that readahead leaves free for the next reader.
MAX_DEATHS = 3  # A job that outlives this many processes is held to be what kills them.
UNKEPT_LIMIT = 64 * MIB  # Chunks held in memory because the store is full.
FULL_S = 5.0  # How long after a chunk that could not be kept nothing is fetched ahead.
MOVED_LIMIT = 4096  # Files of which it is known when something came.
READER_MARGIN_S = 5.0  # Beyond the budget of a job, for queueing.


class Fetcher:
    """Owns the transfer processes and all flights. One per process; lives in one nursery (`run`).

    Args:
        settings: For the transfer processes.
        workers: How many of them.
        offline: Refuse instead of asking the network.
    """

    def __init__(self, settings: Settings, workers: int, *, offline: bool) -> None:
        self._settings = settings
        self._offline = offline
        self._workers = [WorkerProcess(settings, self._on_report, self._on_death) for _ in range(workers)]
        self._flights: dict[int, Flight] = {}
        self._pending: dict[tuple[SpanKey, int], Pending] = {}
        self._queues: dict[Priority, deque[Flight]] = {priority: deque() for priority in Priority}
        self._running_ahead = 0
        self._ids = itertools.count(1)
        self._unkept: OrderedDict[tuple[SpanKey, int], bytes] = OrderedDict()
        self._failures = Failures(settings.read_timeout_s)
        self._moved: OrderedDict[str, float] = OrderedDict()  # By identity: when something of that file came last.
        self._full_until = -math.inf
        self._room = trio.Condition()
        self._idle: dict[WorkerProcess, trio.Event] = {}
        self._nursery: trio.Nursery | None = None
        self.counters = Counters()
        self.find_tokens: Callable[[], dict[str, str]] = dict  # Asked for when the transfer processes start.
        self.on_refuted: Callable[[str], None] = lambda identity: None  # Called when bytes failed their SHA-256.

    # -- life ------------------------------------------------------------------------------------------------------

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Holds the transfer processes; they start with the first job or `start`, and end when this is cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    def use_tokens(self, tokens: dict[str, str]) -> None:
        """The user logged in, or out: the transfers to come are made with these."""
        if tokens != self._settings.tokens:
            self._settings = msgspec.structs.replace(self._settings, tokens=tokens)
            for worker in self._workers:
                worker.use(self._settings)

    def start(self) -> None:
        """Starts the transfer processes now rather than with the first job (0.5 s of imports)."""
        if self._nursery is None or self._idle or self._offline:
            return
        self.use_tokens(self.find_tokens())
        for worker in self._workers:
            self._idle[worker] = trio.Event()
            self._nursery.start_soon(worker.supervise)

    # -- wanting ---------------------------------------------------------------------------------------------------

    def want(
        self,
        manifest: Manifest,
        refs: Iterable[ChunkRef],
        priority: Priority,
        *,
        confirmed_elsewhere: Container[int] = (),
    ) -> list[Pending]:
        """Joins the flights of chunks that are on their way and starts flights for the others.

        Args:
            confirmed_elsewhere: Sources that the transfer processes need not confirm once they are complete.

        Raises:
            RemoteUnavailable: Offline.
        """
        pendings, new = [], []
        for ref in refs:
            pending = self._pending.get((manifest.key(ref.span), ref.chunk))
            if pending is None:
                new.append(ref)
                continue
            if priority < pending.flight.priority:
                self._promote(pending.flight, priority)
            pendings.append(pending)
        if new:
            if self._offline:
                source = manifest.sources[manifest.spans[new[0].span].source]
                if (path := file_path(source.locator.url)) is not None:
                    raise RemoteChanged(f"{path} is gone or has changed since it became {manifest.name}", hint=HINT)
                raise RemoteUnavailable(f"{source.path} of {manifest.name} is not all local, and cakefs is offline")
            pendings += self._depart(manifest, new, priority, confirmed_elsewhere)
        return pendings

    def want_ahead(self, manifest: Manifest, refs: Sequence[ChunkRef], *, soon: bool) -> None:
        """Asks for what nobody waits for yet; nothing happens offline, nor while what comes cannot be kept: it would
        push out of memory what somebody does wait for."""
        if not self._offline and trio.current_time() >= self._full_until:
            self.want(manifest, refs, Priority.SOON if soon else Priority.AHEAD)

    async def wait(self, manifest: Manifest, pendings: Sequence[Pending]) -> None:
        """Waits until the chunks have arrived, as long as anything of their files comes.

        Raises:
            CakeError: The first failure among their flights; RemoteUnavailable when they take too long.
        """
        earlier = next(filter(None, (self._failures.earlier(pending.chunk) for pending in pendings)), None)
        patience_s = self._settings.read_timeout_s + READER_MARGIN_S
        if earlier is not None:
            patience_s = min(patience_s, earlier.patience_s)
        began = trio.current_time()
        for pending in pendings:
            while not await pending.wait(self._last_move(pending, began) + patience_s):
                if trio.current_time() >= self._last_move(pending, began) + patience_s:
                    late: CakeError = RemoteUnavailable(f"nothing of {manifest.name} came for {patience_s:.0f} s")
                    raise self._in_vain(pendings, late if earlier is None else earlier.error)

    def _last_move(self, pending: Pending, began: float) -> float:
        """When something of its file came last, if that was after it began to be waited for."""
        return max(began, self._moved.get(pending.chunk.key.identity, began))

    def _in_vain(self, pendings: Sequence[Pending], error: CakeError) -> CakeError:
        """For who waited; those who come after him wait less, also where a flight has begun just now."""
        for pending in pendings:
            if not pending.settled:
                self._failures.remember(pending.chunk, error)
        return copy(error)

    async def wait_for_room(self, ahead: int) -> None:
        """Waits until at most `ahead` flights are queued behind the running ones."""
        async with self._room:
            while len(self._queues[Priority.AHEAD]) > ahead:
                await self._room.wait()

    async def flush(self) -> None:
        """Waits until everything that arrived is sealed and complete files are confirmed."""
        for worker in self._workers:
            if worker.pid is not None:
                worker.flush()
                await self._idle[worker].wait()

    @property
    def limit(self) -> int:
        """Bytes that the store may take; 0 for no limit."""
        return self._settings.limit

    def look(self, sources: Iterable[Source]) -> None:
        """Has what an earlier process left undone of upstream files sealed and confirmed, if any process runs."""
        if self._idle:
            for source in sources:
                self._workers[0].look(source.identity, source.locator.size)

    def note_confirmed(self, identity: str, ok: bool) -> None:
        """A whole upstream file was hashed."""
        if ok:
            self.counters.confirmed += 1
        else:
            self.counters.refuted += 1
            self.on_refuted(identity)

    def pids(self) -> list[int]:
        """Of the transfer processes that run now."""
        return [worker.pid for worker in self._workers if worker.pid is not None]

    def unkept(self, key: SpanKey, chunk: int) -> bytes | None:
        """A chunk that came but found no room in the store."""
        return self._unkept.get((key, chunk))

    @property
    def has_unkept(self) -> bool:
        return bool(self._unkept)

    @property
    def on_their_way(self) -> int:
        return len(self._pending)

    def _depart(
        self, manifest: Manifest, refs: list[ChunkRef], priority: Priority, elsewhere: Container[int]
    ) -> list[Pending]:
        pendings, flights = [], []
        for source, start, stop, spans in range_requests(manifest, refs):
            upstream = manifest.sources[source]
            confirm = source not in elsewhere
            job = FetchJob(next(self._ids), upstream.locator, upstream.identity, start, stop, spans, confirm)
            flight = Flight(job, priority)
            self._flights[job.id] = flight
            flights.append(flight)
            for chunk in flight.chunks:
                pending = self._pending[chunk.key, chunk.chunk] = Pending(flight, chunk)
                pendings.append(pending)
        self._queues[priority].extend(flights)
        self._dispatch()
        return pendings

    # -- dispatch --------------------------------------------------------------------------------------------------

    def _promote(self, flight: Flight, priority: Priority) -> None:
        """A reader comes near to what was only readahead, or waits for it."""
        if flight.queued:
            self._queues[flight.priority].remove(flight)
            self._queues[priority].append(flight)
        elif priority is Priority.DEMAND:
            self._running_ahead -= 1
        flight.priority = priority
        self._dispatch()

    def _dispatch(self) -> None:
        """Gives queued flights to the processes, while there is room."""
        self.start()
        while (flight := self._next()) is not None:
            self._queues[flight.priority].remove(flight)
            flight.queued = False
            self._running_ahead += flight.priority is not Priority.DEMAND
            self.counters.flights += 1
            self._best_for(flight.job).submit(flight.job)

    def _best_for(self, job: FetchJob) -> WorkerProcess:
        """One that was sent to that file before, unless it is busy: another first has to ask where the bytes are."""
        most = self._settings.connections
        return min(
            self._workers,
            key=lambda w: (not w.alive, len(w.jobs) >= most, job.identity not in w.knows, len(w.jobs)),
        )

    def _next(self) -> Flight | None:
        """Demand first, whatever is fetched ahead. No file gets all connections, and one with a waiting reader gets its
        first beyond them if need be: files that stall do not block another."""
        jobs = [job for worker in self._workers for job in worker.jobs.values()]
        running = Counter(job.identity for job in jobs)
        demanded = Counter(job.identity for job in jobs if self._flights[job.id].priority is Priority.DEMAND)
        slots = self._settings.connections * len(self._workers)
        most, free = max(1, slots - DEMAND_RESERVE), slots - running.total()
        share = most if free > 0 else 1 if free > -SPARE_CONNECTIONS else 0
        for priority, queue in self._queues.items():
            if priority is not Priority.DEMAND and not (free > 0 and self._running_ahead < most):
                break
            counted = demanded if priority is Priority.DEMAND and free > 0 else running
            if (flight := next((f for f in queue if counted[f.job.identity] < share), None)) is not None:
                return flight
        return None

    # -- reports ---------------------------------------------------------------------------------------------------

    def _on_report(self, worker: WorkerProcess, report: Report) -> None:
        if isinstance(report, Arrived):
            self._arrived(report)
        elif isinstance(report, Done):
            self._landed(worker, report.job, None)
        elif isinstance(report, Failed):
            self._landed(worker, report.job, error_of(report))
        elif isinstance(report, Confirmed):
            self.note_confirmed(report.identity, report.ok)
        else:
            self._idle[worker].set()
            self._idle[worker] = trio.Event()

    def _arrived(self, report: Arrived) -> None:
        flight = self._flights.get(report.job)
        if flight is None or report.index not in flight.left:
            return
        flight.left.discard(report.index)
        chunk = flight.chunks[report.index]
        self._failures.forget(chunk)
        self._moved[chunk.key.identity] = trio.current_time()
        self._moved.move_to_end(chunk.key.identity)
        if len(self._moved) > MOVED_LIMIT:
            self._moved.popitem(last=False)
        self.counters.bytes_fetched += chunk.stop - chunk.start
        if report.data is not None:
            self._hold(chunk, report.data)
        self._settle(chunk, None)

    def _hold(self, chunk: JobChunk, data: bytes) -> None:
        """The store is full: readers are served from memory, which is said once."""
        self._full_until = trio.current_time() + FULL_S
        if not self._unkept:
            log.warning("the store is full: what does not fit is fetched, served and not kept")
        self._unkept[chunk.key, chunk.chunk] = data
        while len(self._unkept) * CHUNK > UNKEPT_LIMIT:
            self._unkept.popitem(last=False)

    def _landed(self, worker: WorkerProcess, job: int, error: CakeError | None) -> None:
        worker.jobs.pop(job, None)
        flight = self._flights.pop(job, None)
        if flight is not None:
            self._finish(flight, error)
        self._dispatch()
        if self._nursery is not None:
            self._nursery.start_soon(self._tell_room)

    async def _tell_room(self) -> None:
        async with self._room:
            self._room.notify_all()

    def _finish(self, flight: Flight, error: CakeError | None) -> None:
        if flight.priority is not Priority.DEMAND and not flight.queued:
            self._running_ahead -= 1
        if error is None and flight.left:
            error = RemoteUnavailable(f"{_words(flight.job)} ended before all of it came")
        if error is not None:
            self.counters.failures += 1
            # Retries that were in vain name the range by themselves.
            what = "" if isinstance(error, RemoteUnavailable) else f"{_words(flight.job)}: "
            log.warning("%s%s", what, error)
        for index in flight.left:
            self._settle(flight.chunks[index], error)
            if isinstance(error, RemoteUnavailable):
                self._failures.remember(flight.chunks[index], error)

    def _settle(self, chunk: JobChunk, error: CakeError | None) -> None:
        pending = self._pending.pop((chunk.key, chunk.chunk), None)
        if pending is not None:
            pending.settle(error)

    def _on_death(self, worker: WorkerProcess, lost: list[FetchJob]) -> None:
        """The jobs of a process that died go to another; what it wrote is in the store already."""
        self.counters.worker_deaths += 1
        self._idle[worker].set()
        self._idle[worker] = trio.Event()
        for job in lost:
            flight = self._flights[job.id]
            flight.deaths += not worker.hung
            if flight.priority is not Priority.DEMAND:
                self._running_ahead -= 1
            flight.queued = True
            if flight.deaths >= MAX_DEATHS:
                del self._flights[job.id]
                self._finish(flight, RemoteUnavailable(f"{_words(job)} ended {MAX_DEATHS} transfer processes"))
            else:
                self._queues[flight.priority].appendleft(flight)
        self._dispatch()


def _words(job: FetchJob) -> str:
    from cakefs.remotes.answers import shown  # httpx, 0.2 s: only for who has something to tell

    return f"bytes {job.start}-{job.stop} of {shown(job.locator.url)}"
