"""The models of a store as the mount sees them: names, manifests, open files, counters."""

import logging
import os
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping
from functools import partial

import trio

from cakefs.engine.read import FileReader
from cakefs.engine.reading import EVERY_SOURCE, OpenFile, Reading
from cakefs.engine.serve.demand import Demand
from cakefs.engine.serve.sizes import Counting
from cakefs.errors import CakeError, NotFound, StoreFull
from cakefs.model import File, Literal, Manifest, Source, leaves, without_query
from cakefs.plan.hubcache import HubPlace, place_of
from cakefs.plan.pullplan import beside_tensors
from cakefs.plan.requests import span_chunks
from cakefs.plan.wish import Wish
from cakefs.store.lease import Lease
from cakefs.store.store import Store

log = logging.getLogger(__name__)

OPEN_FILES = 64  # Prepared files kept after their last handle: disk offload opens one 480 times per forward pass.
RATE_LOOKS = 6  # Looks that a rate is the mean of: ten seconds.
IDLE_S = 30.0  # After the last handle of a file went; loaders close and open again.
LET_GO_S = 2.0  # Between looks for models that were removed: how long gc may have to wait for a mount.
MANIFESTS = 64  # Decoded manifests kept: 35 MB for 90,000 tensors, a few KB for most.


UNHELD = "%s: what is served here is served all the same, but gc may take it once its name is removed"


class Library:
    """Answers everything that the mount asks without waiting for the network.

    Args:
        demand: Where models come from that nobody has added; None for nowhere.
    """

    def __init__(self, store: Store, reading: Reading, demand: Demand | None = None) -> None:
        self._store = store
        self._demand = demand
        self._reading = reading
        self._manifests: OrderedDict[str, Manifest] = OrderedDict()
        self._files: OrderedDict[tuple[str, str, str], OpenFile] = OrderedDict()
        self._lease = _lease(store)
        self._held: set[str] = set()
        self._open: set[OpenFile] = set()  # with a handle
        self._idle: dict[OpenFile, float] = {}  # without one, since when (monotonic)
        self._handles: Counter[str] = Counter()  # open files, by manifest
        self._doubted: dict[int, Manifest] = {}  # of which a file may have failed its SHA-256, by their place in memory
        self._started = time.time()
        self._rates = deque([self._sample()], RATE_LOOKS)
        self.counting = Counting(store.path)

    def generation(self) -> int:
        return self._store.catalog.models.generation()

    def names(self) -> dict[str, str]:
        return {name: record.manifest for name, record in self._store.catalog.models.all().items()}

    async def watch(self) -> None:
        """Heeds what other processes do: lets go of removed models that nobody has open, so that gc may free them, and
        of bytes that were found to be wrong."""
        seen: int | None = None
        refutations = self._store.catalog.refutations()
        while True:
            self._close_idle()
            self._reading.pool.discard_gone()
            self._reading.stage.let_go()
            try:
                generation = self.generation()
                if generation != seen or self._held:
                    self._let_go(set(self.names().values()))
                seen = generation
                if (found := self._store.catalog.refutations()) != refutations:
                    refutations = found
                    self._reading.drop_all()
                self._ask_for_headers()
            except CakeError as error:  # such as no memory left: what is served goes on
                log.warning("cannot look what other processes did: %s", error.message)
            self._rates.append(self._sample())
            await trio.sleep(LET_GO_S)

    def _let_go(self, named: set[str]) -> None:
        for manifest_id in [m for m in self._held if m not in named and not self._handles[m]]:
            self._held.discard(manifest_id)
            self._lease.release(manifest_id)
            self._manifests.pop(manifest_id, None)
            for key in [k for k in self._files if k[0] == manifest_id]:
                del self._files[key]

    def manifest(self, manifest_id: str) -> Manifest:
        manifest = self._manifests.get(manifest_id)
        if manifest is None:
            self._hold(manifest_id)
            manifest = self._store.catalog.models.manifest(manifest_id)
            self._manifests[manifest_id] = manifest
            if len(self._manifests) > MANIFESTS:
                self._manifests.popitem(last=False)
        else:
            self._manifests.move_to_end(manifest_id)
        return manifest

    def hub_place(self, manifest_id: str) -> HubPlace | None:
        try:
            return place_of(self._store.catalog.models.head(manifest_id))
        except CakeError as error:
            log.warning("not shown among the hub's: %s", error.message)  # the others must not go with it
            return None

    @property
    def on_demand(self) -> bool:
        return self._demand is not None

    async def demand(self, wish: Wish) -> None:
        if self._demand is None:
            raise NotFound(f"{wish.name} is not here")
        await self._demand.get(wish)

    def open(self, manifest_id: str, file: File) -> FileReader:
        key = (manifest_id, file.path, file.view)
        opened = self._files.get(key)
        if opened is None:
            literals = [self._store.literal(s.blob) for s in file.segments if isinstance(s, Literal) and s.size]
            manifest = self.manifest(manifest_id)
            opened = self._files[key] = OpenFile(self._reading, manifest, file, literals)
            self._reading.fetcher.look(_sources(manifest, file))
            self._doubted[id(manifest)] = manifest
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        else:
            self._files.move_to_end(key)
        self._handles[manifest_id] += 1
        opened.handles += 1
        self._open.add(opened)
        self._idle.pop(opened, None)
        return FileReader(opened, partial(self._closed, manifest_id, opened))

    def _closed(self, manifest_id: str, opened: OpenFile) -> None:
        self._handles[manifest_id] -= 1
        if not self._handles[manifest_id]:
            del self._handles[manifest_id]
        opened.handles -= 1
        if not opened.handles:
            self._open.discard(opened)
            self._idle[opened] = time.monotonic()

    def _close_idle(self) -> None:
        """Closes the contents of files that nobody has had open for a while: what is open cannot be evicted, and keeps
        its room on the disk after it was deleted."""
        now = time.monotonic()
        for opened in (opened for opened, since in self._idle.items() if now - since >= LET_GO_S):
            opened.staged.end()
            opened.readahead.forget()  # who comes next may find what was fetched for this one on a cold disk
        closed = [opened for opened, since in self._idle.items() if now - since >= IDLE_S]
        for opened in closed:
            del self._idle[opened]
        used = {key for opened in (*self._open, *self._idle) for key in opened.wanted_keys()} if closed else set()
        for key in {key for opened in closed for key in opened.wanted_keys()} - used:
            self._reading.pool.release(key)

    async def refuted(self) -> str:
        identity = await self._reading.refuted.receive()
        for opened in self._files.values():
            opened.readahead.forget()
            self._doubted[id(opened.manifest)] = opened.manifest
        return identity

    def _ask_for_headers(self) -> None:
        """Wants what is not shown of files that failed their SHA-256: else they would never be complete, and a wrong
        header never be found out. The other models need not be looked at again."""
        for key, manifest in list(self._doubted.items()):
            refuted = [source.identity for source in manifest.sources if self._is_refuted(source)]
            if not refuted or len(self._doubted) > MANIFESTS:
                del self._doubted[key]
            for span in (span for identity in refuted for span in beside_tensors(manifest, identity)):
                if not self._store.has(manifest.key(span)):
                    refs = span_chunks(span, 0, manifest.spans[span].size)
                    self._reading.fetcher.want_ahead(manifest, refs, soon=True)

    def _is_refuted(self, source: Source) -> bool:
        known = self._store.catalog.verified(source.identity)
        return known is not None and not known.ok

    def uses(self, manifest_id: str, file: File, identity: str) -> bool:
        manifest = self.manifest(manifest_id)
        return identity == EVERY_SOURCE or any(s.identity == identity for s in _sources(manifest, file))

    def status(self) -> Mapping[str, object]:
        reads, net = self._reading.counters, self._reading.fetcher.counters
        return {
            "pid": os.getpid(),
            "uptime_s": round(time.time() - self._started, 1),
            "store": str(self._store.path),
            "models": len(self._store.catalog.models.all()),
            "reads": reads.reads,
            "bytes_served": reads.bytes_served,
            "reads_without_waiting": reads.hits,
            "reads_waited": reads.waits,
            "read_errors": reads.errors,
            "bytes_fetched": net.bytes_fetched,
            "requests": net.flights,
            "requests_failed": net.failures,
            "chunks_on_their_way": self._reading.fetcher.on_their_way,
            "worker_deaths": net.worker_deaths,
            "files_confirmed": net.confirmed,
            "files_refuted": net.refuted,
            "added_on_demand": self._demand.granted if self._demand else 0,
            "refused_on_demand": self._demand.refused if self._demand else 0,
            "being_added": self._demand.on_their_way if self._demand else 0,
            **self._live(),
        }

    def _live(self) -> dict[str, object]:
        """What `status` shows that is no counter."""
        reads, (then, now), sizes = self._reading.counters, (self._rates[0], self._sample()), self.counting.latest()
        seconds = max(now[0] - then[0], 1e-3)
        return {
            "hit_rate": round(reads.hits / reads.reads, 4) if reads.reads else None,
            "served_per_s": round((now[1] - then[1]) / seconds),
            "fetched_per_s": round((now[2] - then[2]) / seconds),
            "stored_bytes": sizes and sizes.stored_bytes,
            "saved_bytes": sizes and sizes.saved_bytes,
            "sizes_as_of": sizes and sizes.as_of,
            "per_model": {name: size._asdict() for name, size in sizes.models.items()} if sizes else {},
        }

    def _sample(self) -> tuple[float, int, int]:
        """Time, bytes served, bytes fetched."""
        reading = self._reading
        return time.monotonic(), reading.counters.bytes_served, reading.fetcher.counters.bytes_fetched

    def xattrs(self, manifest_id: str, file: File | None) -> dict[str, bytes]:
        manifest = self.manifest(manifest_id)
        shown = {"model": manifest.name, "origin": manifest.origin, "revision": manifest.revision}
        shown["substituted"] = manifest.substituted
        if file is not None:
            shown |= self._about(manifest, file)
        return {name: value.encode() for name, value in shown.items() if value}

    def statvfs(self) -> os.statvfs_result:
        return os.statvfs(self._store.path)

    def close(self) -> None:
        self._lease.close()

    def _hold(self, manifest_id: str) -> None:
        """What is named or open stays readable: no other process collects it."""
        if manifest_id not in self._held:
            try:
                self._lease.hold(manifest_id)
                self._held.add(manifest_id)
            except StoreFull as error:
                log.warning(UNHELD, error.message)

    def _about(self, manifest: Manifest, file: File) -> dict[str, str]:
        spans = {s.span for segment in file.segments for s in leaves(segment) if s.size}
        sources = {manifest.spans[span].source for span in spans}
        local = self._store.local_bytes(manifest.key(span) for span in spans)
        literal = sum(s.size for s in file.segments if isinstance(s, Literal))
        about = {"size": str(file.size), "local_bytes": str(local + literal)}
        if sources:
            published = not manifest.substituted and all(self._confirmed(manifest.sources[s]) for s in sources)
            about["verified"] = "yes" if published else "no"
        if len(sources) == 1:
            source = manifest.sources[next(iter(sources))]
            identity = "" if literal else without_query(source.identity)
            about |= {"source": without_query(source.locator.url), "digest": identity}
        return about

    def _confirmed(self, source: Source) -> bool:
        known = self._store.catalog.verified(source.identity)
        return known is not None and known.ok


def _lease(store: Store) -> Lease:
    """A full disk must not keep a mount from serving."""
    try:
        return store.lease()
    except StoreFull as error:
        log.warning(UNHELD, error.message)
        return Lease(None)


def _sources(manifest: Manifest, file: File) -> list[Source]:
    """The upstream files that bytes of a file come from."""
    spans = {extent.span for segment in file.segments for extent in leaves(segment) if extent.size}
    return [manifest.sources[i] for i in {manifest.spans[span].source for span in spans}]
