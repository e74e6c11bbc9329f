"""One transfer process: fetches ranges, writes chunks into the shared store, seals what is complete, confirms whole
files.

It runs beside the serving process, because one busy Python thread in there would cost the mount three quarters of its
throughput. Jobs come on stdin, reports go to stdout (`messages.py`). It owns no state that the store does not have:
killed at any point, its unfinished jobs are simply given to another one. It ends when stdin ends.
"""

import logging
import math
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import msgspec
import trio

from cakefs.buffers import page_aligned
from cakefs.engine.tasks import in_background
from cakefs.engine.transfer import confirm
from cakefs.engine.transfer.confine import confine
from cakefs.engine.transfer.messages import (
    BEAT_S,
    Arrived,
    Beat,
    Confirmed,
    Done,
    FetchJob,
    Idle,
    JobChunk,
    Look,
    Report,
    Request,
    Settings,
    Unframer,
    failure,
    frame,
    job_chunks,
)
from cakefs.engine.transfer.network import Network
from cakefs.engine.transfer.quota import Quota
from cakefs.engine.transfer.repeats import Repeats
from cakefs.errors import CakeError, StoreFull
from cakefs.model import CHUNK, INLINE_LIMIT, ByteRange, SpanKey
from cakefs.remotes.answers import shown
from cakefs.remotes.base import Remote
from cakefs.remotes.received import receive_in_bulk
from cakefs.store.content import Outcome
from cakefs.store.store import Store

log = logging.getLogger(__name__)

SWEPT_LIMIT = 4096
SEAL_BATCH = 256  # Spans sealed in one transaction: bounds how long a finished tensor waits for its neighbours.


class Assembler:
    """Cuts a stream of bytes into the chunks of a job.

    Args:
        chunks: In the order of their bytes, without gap.
        on_chunk: Called with the index and the bytes of each one as it becomes complete; valid until it returns.
        buffer: Of one chunk. Used again: growing fresh ones took a sixth of the samples of a profile.
    """

    def __init__(self, chunks: list[JobChunk], on_chunk: Callable[[int, memoryview], None], buffer: memoryview) -> None:
        self._chunks = chunks
        self._on_chunk = on_chunk
        self._buffer = buffer
        self._index = 0
        self._filled = 0

    def feed(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            chunk = self._chunks[self._index]
            size = chunk.stop - chunk.start
            take = min(len(view), size - self._filled)
            self._buffer[self._filled : self._filled + take] = view[:take]
            view = view[take:]
            self._filled += take
            if self._filled == size:
                self._index += 1
                self._filled = 0
                self._on_chunk(self._index - 1, self._buffer[:size])


def runs(indices: Iterable[int]) -> list[range]:
    """Rising numbers as ranges of neighbours."""
    found: list[range] = []
    for index in indices:
        if found and found[-1].stop == index:
            found[-1] = range(found[-1].start, index + 1)
        else:
            found.append(range(index, index + 1))
    return found


class Touched(NamedTuple):
    """An upstream file of which something came. Attributes: url: Where from, for the log; empty where nothing did."""

    size: int
    url: str = ""


class Worker:
    """The state of one transfer process: a store, a remote, and what waits to be sealed."""

    def __init__(
        self, store: Store, remote: Remote, report: Callable[[Report], None], quota: Quota | None = None
    ) -> None:
        self._store = store
        self._remote = remote
        self._report = report
        self._quota = quota or Quota(store, 0, 0.0)
        self._to_seal: list[SpanKey] = []
        self._touched: dict[str, Touched] = {}  # by identity, with news since it was last looked at for completeness
        self._swept: set[str] = set()  # identities whose leftovers of earlier processes have been sealed
        self._buffers: list[memoryview] = []  # free ones, as many as there were fetches at once
        self._fetching = Counter[str]()  # jobs, by identity
        self._work = trio.Event()
        self._sealed = trio.Event()
        self._flushing = False

    def use(self, remote: Remote) -> None:
        """For the jobs to come; those under way keep what they have."""
        self._remote = remote

    def start(self, nursery: trio.Nursery, job: FetchJob) -> None:
        """Counts it at once: a flush that comes behind it must wait for it, though its task has not run yet."""
        self._fetching[job.identity] += 1
        nursery.start_soon(self._run, job)

    async def _run(self, job: FetchJob) -> None:
        try:
            await self._fetch(job)
            self._report(Done(job.id))
        except CakeError as error:
            self._report(failure(job.id, error))
        finally:
            self._fetching -= Counter([job.identity])  # which forgets those of which there are none
            if job.confirm:
                self._touched[job.identity] = Touched(job.locator.size, job.locator.url)
            self._work.set()

    async def _fetch(self, job: FetchJob) -> None:
        chunks = job_chunks(job)
        buffer = self._buffers.pop() if self._buffers else page_aligned(CHUNK)
        try:
            for run in runs(self._absent(job, chunks, buffer)):
                async with self._quota.admit(chunks[run.stop - 1].stop - chunks[run.start].start) as keep:
                    await self._fetch_run(job, chunks, run, buffer, keep=keep)
        finally:
            self._buffers.append(buffer)

    def _absent(self, job: FetchJob, chunks: list[JobChunk], buffer: memoryview) -> Iterator[int]:
        """The chunks that no other process brought since the job was planned; reports the others."""
        for key, indices in groupby(range(len(chunks)), lambda i: chunks[i].key):
            content = self._store.content(key)
            for index in indices:
                at = chunks[index].start - key.start
                part = buffer[: chunks[index].stop - chunks[index].start]
                if content is not None and content.read_into(part, at, wait=True) is Outcome.DONE:
                    self._report(Arrived(job.id, index))
                else:
                    yield index

    async def _fetch_run(
        self, job: FetchJob, chunks: list[JobChunk], run: range, buffer: memoryview, *, keep: bool
    ) -> None:
        """Fetches chunks that follow each other, with one request. Args: keep: There is room for them in the store."""
        tiny: list[tuple[int, SpanKey, bytes]] = []

        def on_chunk(position: int, data: memoryview) -> None:
            index = run[position]
            if not keep:
                self._report(Arrived(job.id, index, bytes(data)))
            elif chunks[index].key.size <= INLINE_LIMIT:
                tiny.append((index, chunks[index].key, bytes(data)))
            else:
                self._keep(job.id, index, chunks[index], data)

        wanted = chunks[run.start : run.stop]
        try:
            sink = Assembler(wanted, on_chunk, buffer).feed
            await self._remote.fetch(job.locator, ByteRange(wanted[0].start, wanted[-1].stop), sink)
        finally:
            self._keep_tiny(job.id, tiny)

    def _keep(self, job: int, index: int, chunk: JobChunk, data: memoryview) -> None:
        try:
            complete = self._store.write_chunk(chunk.key, chunk.chunk, data)
        except StoreFull:
            self._report(Arrived(job, index, bytes(data)))
            return
        self._report(Arrived(job, index))
        if complete:
            self._to_seal.append(chunk.key)
            self._work.set()

    def _keep_tiny(self, job: int, tiny: list[tuple[int, SpanKey, bytes]]) -> None:
        if not tiny:
            return
        try:
            self._store.put_spans([(key, data) for _, key, data in tiny])
            kept = True
        except StoreFull:
            kept = False
        for index, _, data in tiny:
            self._report(Arrived(job, index, None if kept else data))

    def look(self, request: Look) -> None:
        if not self._store.catalog.readonly:
            self._touched.setdefault(request.identity, Touched(request.size))
            self._work.set()

    def flush(self) -> None:
        self._flushing = True
        self._work.set()

    async def seal_forever(self) -> None:
        """Seals in batches, in a thread: hashing is C code, and one transaction serves many tensors."""
        while True:
            await self._work.wait()
            self._work = trio.Event()
            await self.seal_pending()
            self._sealed.set()

    async def confirm_forever(self) -> None:
        """Beside the sealing, as a large file takes minutes. A file does not wait for others that are being fetched:
        one that stalls, or a mount that is never idle, must not leave wrong bytes undiscovered."""
        while True:
            await self._sealed.wait()
            self._sealed = trio.Event()
            await self._confirm_complete()
            if self._flushing and not (self._fetching or self._to_seal or self._touched):
                self._flushing = False
                self._report(Idle())

    async def seal_pending(self) -> None:
        while self._to_seal:
            batch = self._to_seal[:SEAL_BATCH]
            try:
                await in_background(self._store.seal, batch)
            except StoreFull as error:
                log.warning("not sealed, still served from its partial: %s", error.message)
            except CakeError as error:
                log.error("cannot seal: %s", error.message)
            del self._to_seal[: len(batch)]

    async def _confirm_complete(self) -> None:
        changing = self._fetching.keys() | {key.identity for key in self._to_seal}
        touched = {identity: file for identity, file in self._touched.items() if identity not in changing}
        for identity in touched:
            del self._touched[identity]
        try:
            await self._seal_leftovers(touched.keys() - self._swept)
            for identity, file in touched.items():
                outcome = await in_background(confirm.confirm_source, self._store, identity, file.size)
                if outcome is False and file.url:
                    log.error("%s came wrong, and is fetched again", shown(file.url))
                if outcome is not None:
                    self._report(Confirmed(identity, outcome))
            if not (self._fetching or self._to_seal):
                await in_background(self._store.keep_copy)
        except CakeError as error:
            log.warning("cannot confirm what was fetched: %s", error.message)

    async def _seal_leftovers(self, identities: set[str]) -> None:
        """What was complete but not sealed when an earlier process ended; once for each file."""
        if identities:
            if len(self._swept) > SWEPT_LIMIT:
                self._swept.clear()  # To look again costs a listing, no more.
            self._swept |= identities
            keys = [key for key, _ in self._store.partials() if key.identity in identities]
            await in_background(self._store.seal, keys)


async def _serve() -> None:
    reader = trio.lowlevel.FdStream(os.dup(sys.stdin.fileno()))
    writer = trio.lowlevel.FdStream(os.dup(sys.stdout.fileno()))
    outbox, reports = trio.open_memory_channel[Report](math.inf)
    decoder = msgspec.msgpack.Decoder(Request)
    unframer = Unframer()
    worker: Worker | None = None
    network = Network()

    async def send() -> None:
        async for report in reports:
            await writer.send_all(frame(report))

    async def beat() -> None:
        while True:
            outbox.send_nowait(Beat())
            await trio.sleep(BEAT_S)

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            nursery.start_soon(beat)
            async for data in reader:
                for body in unframer.feed(data):
                    request = decoder.decode(body)
                    if isinstance(request, Settings) and worker is None:
                        logging.getLogger().setLevel(request.level)
                        store = Store.open(Path(request.store), create=False)
                        confine(store.path)
                        quota = Quota(store, request.limit, request.spared_since)
                        worker = Worker(store, await network.remote(request), outbox.send_nowait, quota)
                        nursery.start_soon(worker.seal_forever)
                        nursery.start_soon(worker.confirm_forever)
                    elif worker is not None and isinstance(request, Settings):
                        worker.use(await network.remote(request))
                    elif worker is not None and isinstance(request, FetchJob):
                        worker.start(nursery, request)
                    elif worker is not None and isinstance(request, Look):
                        worker.look(request)
                    elif worker is not None:
                        worker.flush()
            nursery.cancel_scope.cancel()
    except* trio.BrokenResourceError:
        pass  # The serving process is gone: nobody to report to.
    except* CakeError as group:  # of the store as a whole, such as that it is gone
        for error in group.exceptions:
            log.error("%s", error)
    finally:
        await network.aclose()
    if worker is not None:
        with trio.CancelScope(deadline=trio.current_time() + 10):
            await worker.seal_pending()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which closes our stdin.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger().handlers[0].addFilter(Repeats())
    receive_in_bulk()
    trio.run(_serve)


if __name__ == "__main__":
    main()
