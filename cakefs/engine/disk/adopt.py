"""Adoption: files on this machine become the content of upstream files, without a copy and without a transfer.

One pass over a file gives all that is needed: what the whole file is, and digest and sums of each span that the
manifest cuts it into. The manifest comes first, since only it knows the spans; where nothing names a file's content yet
it is composed under a provisional identity, which the pass then replaces. The name of a blob in a cache is a claim:
only what was hashed here counts, and a file that is not what its name says is left alone.

What was recorded stays, whatever becomes of the rest: a later run does not hash that file again.
"""

import logging
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
import trio

from cakefs.engine.disk.found import Found, Skipped
from cakefs.engine.disk.meter import Meter
from cakefs.engine.evict import job_is_done, make_room, prepare_room
from cakefs.engine.index import Added, Indexer
from cakefs.engine.models.again import record_right
from cakefs.engine.tasks import open_flat_nursery
from cakefs.errors import CakeError, CorruptData
from cakefs.model import MIB, SMALL_FILE_LIMIT, ByteRange, Locator, Manifest, Published, SpanKey
from cakefs.plan.gguf_compose import is_gguf
from cakefs.plan.present import is_safetensors
from cakefs.plan.ranges import tiling
from cakefs.remotes.base import Remote
from cakefs.remotes.files import Files, is_file
from cakefs.store.borrowed import Stamp
from cakefs.store.borrowing import Borrowing
from cakefs.store.foreign import open_stamped, stamp_of
from cakefs.store.scan import Scan, identities_of, scan
from cakefs.store.store import Store

log = logging.getLogger(__name__)

BATCH_PIECES = 2048  # Recorded in one transaction, from as many files as it takes,
BATCH_S = 2.0  # or whatever there is after this time.
SMALL_BATCH = 16 * MIB  # Of small files, stored in one transaction.
_PROVISIONAL = "local:"


class Turns:
    """What those share who adopt side by side: as many files are read at a time as there are cores, and one at a time
    makes room for its copies."""

    def __init__(self) -> None:
        self.reading = trio.CapacityLimiter(len(os.sched_getaffinity(0)))
        self.copying = trio.Lock()


class _Job(NamedTuple):
    """A file to be read.

    Attributes:
        identity: As in the manifest; provisional where it begins so.
        claim: What the file should be; only the algorithm where nothing says what.
    """

    path: Path
    stamp: Stamp
    identity: str
    claim: str
    ranges: list[ByteRange]


class Adopter:
    """Adds models whose files are on this machine, all or some.

    Args:
        remote: For the files that are not; None where nothing may be asked.
        meter: Is told of each byte of a file that is here, once.
        copy: Make the bytes our own.
        limit: Of the store, in bytes, which copies have to keep; 0 for none.
        turns: Of others who adopt at the same time.

    Attributes:
        skipped: What was not taken so far, and why.
    """

    def __init__(
        self,
        store: Store,
        remote: Remote | None = None,
        *,
        meter: Meter | None = None,
        copy: bool = False,
        limit: int = 0,
        turns: Turns | None = None,
    ) -> None:
        self._store = store
        self._remote = remote
        self._progress = (meter or Meter()).advance
        self._copy = copy
        self._limit = limit
        self._turns = turns or Turns()
        self._recording = trio.Lock()
        self._waiting: list[tuple[str, Scan]] = []
        self._flushed = time.monotonic()
        self.skipped: list[Skipped] = []

    async def add(self, found: Found, *, update: bool = False) -> Added:
        """Takes the files that are here, has the others listed for later, and shows the model under its name.

        Raises:
            CakeError: As `Indexer.add`; CorruptData where a file is not what it should be and there is no other.
        """
        larger = None if update else self._larger(found)
        if larger is not None:
            await self.adopt(larger, found.paths)
            return Indexer(self._store, Files()).put(larger)
        paths = dict(found.paths)
        while True:
            try:
                return await self._add(found, paths, update)
            except _Unfit as unfit:
                if self._remote is None:
                    raise
                self.skipped.append(unfit.skipped)
                log.warning("%s %s: not taken", *unfit.skipped)
                paths = {path: file for path, file in paths.items() if str(file) != unfit.skipped.what}

    async def adopt(self, manifest: Manifest, paths: Mapping[str, Path]) -> None:
        """Takes the bytes of files of a model that is here already; a file that does not fit is skipped."""
        usable: dict[str, Path] = {}
        for path, file in paths.items():
            try:
                await trio.to_thread.run_sync(self._stamp, file)
                usable[path] = file
            except _Unfit as unfit:
                self.skipped.append(unfit.skipped)
        jobs = await trio.to_thread.run_sync(self._plan, manifest, usable, {})
        self.skipped += [unfit.skipped for unfit in await self._read(jobs, {})]
        await self._own(manifest, usable)

    def _larger(self, found: Found) -> Manifest | None:
        """What the name stands for, if that is the same revision of the model with further files."""
        record = self._store.catalog.models.all().get(found.name)
        try:
            old = self._store.catalog.models.manifest(record.manifest) if record else None
        except CakeError:  # adding it again is what mends it
            return None
        if (
            old is None
            or (old.origin, old.revision) != (found.listing.origin, found.listing.revision)
            or is_file(old.origin)
        ):
            return None
        known = {source.path: source.locator for source in old.sources}
        files = {f.path: Locator(f.url, f.size, f.validator) for f in found.listing.files}
        return old if files.items() < known.items() else None

    async def _add(self, found: Found, paths: dict[str, Path], update: bool) -> Added:
        claims: dict[str, str] = {}  # provisional identity → what the file should be
        files = await trio.to_thread.run_sync(self._name_files, found, paths, claims)
        listing = msgspec.structs.replace(found.listing, files=files)
        here = Files(self._remote, {f.url: paths[f.path] for f in files if f.path in paths})
        indexer = Indexer(self._store, here)
        try:
            manifest = await indexer.compose(listing, found.name)
            jobs = await trio.to_thread.run_sync(self._plan, manifest, paths, claims)
            final: dict[str, str] = {}
            unfit = await self._read(jobs, final)
            if unfit:
                raise unfit[0]
            if final:
                manifest = _renamed(manifest, final)
            await self._own(manifest, found.paths)
            update = update or (is_file(manifest.origin) and self._is_from(manifest))
            added = indexer.put(manifest, update=update)
            return added._replace(fetched=max(0, added.fetched - here.bytes_read))
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._forget_provisional, claims)

    def _is_from(self, manifest: Manifest) -> bool:
        """Whether the name stands for an earlier state of the same place on this machine."""
        record = self._store.catalog.models.all().get(manifest.name)
        return record is not None and self._store.catalog.models.head(record.manifest).origin == manifest.origin

    # What is what

    def _name_files(self, found: Found, paths: dict[str, Path], claims: dict[str, str]) -> tuple[Published, ...]:
        """The listing with an identity for each file; of small files the content is stored. In a thread."""
        small: dict[SpanKey, bytes] = {}
        named = []
        for file in found.listing.files:
            identity = file.identity
            if file.path in found.texts:
                data = found.texts[file.path]
                identity = identities_of(data, ["sha256"])[0]
                small[SpanKey(identity, 0, len(data))] = data
            elif file.path in paths:
                identity = self._identity(file, paths, claims, small)
            named.append(msgspec.structs.replace(file, identity=identity))
            if sum(map(len, small.values())) > SMALL_BATCH:
                self._put_small(small)
        self._put_small(small)
        return tuple(named)

    def _put_small(self, small: dict[SpanKey, bytes]) -> None:
        self._store.put_spans((key, data) for key, data in small.items() if data)
        for key in small:
            self._confirm(key.identity)
        small.clear()

    def _confirm(self, identity: str) -> None:
        """All of this file was hashed here."""
        known = self._store.catalog.verified(identity)
        if known is None or not known.ok:
            record_right(self._store, identity)

    def _identity(
        self, file: Published, paths: dict[str, Path], claims: dict[str, str], small: dict[SpanKey, bytes]
    ) -> str:
        """What a file is, provisionally where that takes reading all of a large one: until it was read, nothing of it
        may be recorded under a true name.

        A file whose content is all here already is taken out of `paths`.
        """
        path = paths[file.path]
        stamp = self._stamp(path)
        algorithm, _, digits = file.identity.partition(":")
        known = next((i for i in self._store.catalog.borrowed.identities(stamp) if i.startswith(algorithm + ":")), "")
        if not known and digits and self._is_complete(file.identity, file.size):
            del paths[file.path]
            self._progress(file.size)
            return file.identity
        # Of the others it is known later what they are cut into.
        small_one = stamp.size <= SMALL_FILE_LIMIT and not (is_safetensors(file.path) or is_gguf(file.path))
        if small_one and not (known and self._store.has(SpanKey(known, 0, stamp.size))):
            data = _bytes(path, stamp)
            known = identities_of(data, [algorithm])[0]
            self._store.catalog.borrowed.note([(stamp, [known])])
            if known == file.identity or not digits:
                small[SpanKey(known, 0, len(data))] = data
        if known and digits and known != file.identity:
            raise _not_as_named(path)
        if known and (small_one or self._is_complete(known, stamp.size)):
            return known
        provisional = _PROVISIONAL + identities_of(repr(stamp).encode(), ["sha256"])[0].partition(":")[2]
        claims[provisional] = known or file.identity
        return provisional

    def _is_complete(self, identity: str, size: int) -> bool:
        return tiling(self._store.catalog.spans(identity), size) is not None

    def _plan(self, manifest: Manifest, paths: Mapping[str, Path], claims: Mapping[str, str]) -> list[_Job]:
        """The files that have to be read, largest first. In a thread."""
        jobs: dict[str, _Job] = {}
        for index, spans in _spans(manifest, paths).items():
            source = manifest.sources[index]
            here = self._store.catalog.recorded(spans) if source.identity not in claims else set()
            missing = [ByteRange(key.start, key.stop) for key in spans if key not in here]
            if not missing or source.identity in jobs:
                self._progress(source.locator.size)
                continue
            path = paths[source.path]
            claim = claims.get(source.identity, source.identity)
            jobs[source.identity] = _Job(path, self._stamp(path), source.identity, claim, missing)
        return sorted(jobs.values(), key=lambda job: -job.stamp.size)

    def _stamp(self, path: Path) -> Stamp:
        try:
            stamp = stamp_of(path)
        except OSError as error:
            raise _Unfit(Skipped(str(path), f"cannot be read: {error.strerror}")) from None
        if Path(os.fsdecode(stamp.path)).is_relative_to(self._store.path.resolve()):
            raise _Unfit(Skipped(str(path), "lies in the store itself"))
        return stamp

    # Reading

    async def _read(self, jobs: Iterable[_Job], final: dict[str, str]) -> "list[_Unfit]":
        """Hashes files side by side and records what they are; `final` gets the identities of the provisional ones.

        Returns: Those that are not what they should be.
        """
        unfit: list[_Unfit] = []

        async def read(job: _Job) -> None:
            done = await trio.to_thread.run_sync(self._scan, job, limiter=self._turns.reading)
            if isinstance(done, _Unfit):
                unfit.append(done)
                return
            final[job.identity] = done.identities[0]
            self._waiting.append((done.identities[0], done))
            pieces = sum(len(one.pieces) for _, one in self._waiting)
            if pieces >= BATCH_PIECES or time.monotonic() - self._flushed > BATCH_S:
                await self._flush()

        try:
            async with open_flat_nursery() as nursery:
                for job in jobs:
                    nursery.start_soon(read, job)
        finally:
            await self._flush()
        return unfit

    def _scan(self, job: _Job) -> "Scan | _Unfit":
        """In a thread."""

        def progress(size: int) -> None:
            trio.from_thread.check_cancelled()
            self._progress(size)

        algorithm, _, digits = job.claim.partition(":")
        try:
            done = scan(job.stamp, job.ranges, [algorithm], progress)
        except OSError as error:
            return _Unfit(Skipped(str(job.path), f"cannot be read: {error.strerror}"))
        if done is None:
            return _Unfit(Skipped(str(job.path), "changed while it was read"))
        if digits and job.claim not in done.identities:
            return _not_as_named(job.path)
        return done

    async def _flush(self) -> None:
        with trio.CancelScope(shield=True):  # What was read is not read again.
            await self._record_waiting()

    async def _record_waiting(self) -> None:
        async with self._recording:
            batch, self._waiting = self._waiting, []
            self._flushed = time.monotonic()
            if batch:
                await trio.to_thread.run_sync(self._record, batch)

    def _record(self, batch: list[tuple[str, Scan]]) -> None:
        Borrowing(self._store).borrow(batch)
        for identity, done in batch:
            if tiling((piece.range for piece in done.pieces), done.stamp.size):  # and nothing came from elsewhere
                self._confirm(identity)

    async def _own(self, manifest: Manifest, paths: Mapping[str, Path]) -> None:
        if not self._copy:
            return
        keys = [key for spans in _spans(manifest, paths).values() for key in spans]
        async with self._turns.copying:
            if self._limit:
                await trio.to_thread.run_sync(self._make_room, keys)
            await trio.to_thread.run_sync(Borrowing(self._store).own, keys)
            await trio.to_thread.run_sync(job_is_done, self._store, keys, self._limit)

    def _make_room(self, keys: list[SpanKey]) -> None:
        """For all that is going to be copied. Raises StoreFull when it does not fit; it stays borrowed then."""
        if wanted := Borrowing(self._store).bytes_of(keys):
            prepare_room(self._store, wanted, keys, self._limit)
            make_room(self._store, wanted, self._limit)

    def _forget_provisional(self, claims: Mapping[str, str]) -> None:
        """What was read to compose the manifest is known by its true name now; or it is of no use."""
        keys = [SpanKey(i, *span) for i in claims for span in self._store.catalog.spans(i)]
        self._store.catalog.forget_spans(keys)


class _Unfit(CorruptData):
    """A file that cannot be taken."""

    def __init__(self, skipped: Skipped) -> None:
        super().__init__(" ".join(skipped))
        self.skipped = skipped


def _renamed(manifest: Manifest, final: Mapping[str, str]) -> Manifest:
    """With the identities that were found out. Args: final: By the provisional ones."""
    named = (msgspec.structs.replace(s, identity=final.get(s.identity, s.identity)) for s in manifest.sources)
    return msgspec.structs.replace(manifest, sources=tuple(named))


def _spans(manifest: Manifest, paths: Mapping[str, Path]) -> dict[int, list[SpanKey]]:
    """What the files that are here are cut into, by the index of the source."""
    wanted = {index for index, source in enumerate(manifest.sources) if source.path in paths}
    found: dict[int, set[SpanKey]] = {index: set() for index in wanted}
    for index, span in enumerate(manifest.spans):
        if span.source in wanted and span.size:
            found[span.source].add(manifest.key(index))
    return {index: sorted(keys) for index, keys in found.items()}


def _bytes(path: Path, stamp: Stamp) -> bytes:
    """All of a small file."""
    file = open_stamped(stamp)
    data = os.pread(file.fd, stamp.size, 0) if file is not None else b""
    if file is None or len(data) != stamp.size or not stamp.matches(os.fstat(file.fd)):
        raise _Unfit(Skipped(str(path), "changed while it was read"))
    return data


def _not_as_named(path: Path) -> _Unfit:
    return _Unfit(Skipped(str(path), "does not have the bytes that its name promises"))
