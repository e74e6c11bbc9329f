"""The long jobs: pull, verify, gc. Each plans over the catalog, then acts, and reports progress to a callback."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import trio

from cakefs.engine.confirm import confirm_source
from cakefs.engine.fetch import Fetcher, Pending, Priority
from cakefs.engine.local import stream
from cakefs.engine.tasks import open_flat_nursery
from cakefs.errors import CorruptData, NotFound, StoreFull
from cakefs.model import CHUNK, MIB, File, Literal, Manifest, SpanKey, leaves
from cakefs.plan.collect import GcPlan, plan_gc
from cakefs.plan.requests import ChunkRef, span_chunks
from cakefs.store.store import LITERAL, Store

Progress = Callable[[int], None]
"""Called with the number of bytes done since the last call."""

BATCH_BYTES = 64 * MIB  # Asked for at once by pull: enough to coalesce, little enough that the progress bar moves.
BATCH_CHUNKS = 4096  # The same for many small tensors.
ROUNDS = 2  # What turns out wrong is fetched once more.
QUEUED = 8  # Flights queued behind the running ones, so that no connection waits for the planner.


class Repair(NamedTuple):
    """What verify found, in numbers, and one line for each thing that did not hold.

    Attributes:
        bad: What upstream has: dropped by `repair`, and then fetched again.
        lost: What only adding the model again brings back: headers that were synthesized.
    """

    spans: int
    bytes: int
    confirmed: int
    incomplete: int
    bad: list[str]
    lost: list[str]


def file_spans(manifest: Manifest, files: Iterable[File]) -> list[int]:
    """The spans that the files consist of, each once, in the order of their bytes upstream."""
    spans = {s.span for f in files for segment in f.segments for s in leaves(segment) if s.size}
    return sorted(spans, key=lambda i: (manifest.spans[i].source, manifest.spans[i].start))


def missing_chunks(store: Store, manifest: Manifest, span: int) -> list[ChunkRef]:
    """What of a span is not in the store yet."""
    key = manifest.key(span)
    if store.has(key):
        return []
    content = store.content(key)
    if content is None:
        return list(span_chunks(span, 0, key.size))
    return [ChunkRef(span, chunk) for chunk in content.missing(0, key.size)]


async def pull(store: Store, fetcher: Fetcher, manifest: Manifest, files: Sequence[File], progress: Progress) -> int:
    """Fetches what is missing of the files, seals it and confirms the upstream files that are complete.

    Takes up whatever a process that ended left: parts, whole tensors not sealed, whole files not confirmed.

    Returns:
        Bytes that were fetched.

    Raises:
        StoreFull: Not all of it could be kept.
        CorruptData: What came is wrong, and was so again; it was dropped.
    """
    spans = file_spans(manifest, files)
    left = _unsealed(store, manifest, spans)
    progress(sum(manifest.spans[span].size for span in set(spans) - set(left)))
    fetched = 0
    for _ in range(ROUNDS):
        fetched += await _fetch(store, fetcher, manifest, left, progress)
        await fetcher.flush()
        _check_kept(store, fetcher)
        unsealed = [manifest.key(span) for span in _unsealed(store, manifest, left)]
        await trio.to_thread.run_sync(store.seal, unsealed)
        await trio.to_thread.run_sync(_confirm, store, manifest, {manifest.spans[span].source for span in spans})
        left = _unsealed(store, manifest, spans)
        if not left:
            return fetched
    paths = sorted({manifest.sources[manifest.spans[span].source].path for span in left})
    raise CorruptData(f"what came of {', '.join(paths)} is not what was published, and was dropped", hint="pull again")


async def _fetch(store: Store, fetcher: Fetcher, manifest: Manifest, spans: list[int], progress: Progress) -> int:
    """Fetches the missing chunks of spans; returns their bytes."""
    fetched = 0
    batch: list[ChunkRef] = []
    batch_bytes = 0

    async def follow(pendings: list[Pending]) -> None:
        for pending in pendings:
            await pending.wait()
            progress(pending.size)

    async with open_flat_nursery() as nursery:
        for span in spans:
            missing = missing_chunks(store, manifest, span)
            size = sum(chunk_size(manifest, ref) for ref in missing)
            progress(manifest.spans[span].size - size)
            fetched += size
            batch_bytes += size
            batch += missing
            if batch_bytes >= BATCH_BYTES or len(batch) >= BATCH_CHUNKS:
                nursery.start_soon(follow, fetcher.want(manifest, batch, Priority.AHEAD))
                batch, batch_bytes = [], 0
                await fetcher.wait_for_room(QUEUED)
            _check_kept(store, fetcher)
        if batch:
            nursery.start_soon(follow, fetcher.want(manifest, batch, Priority.AHEAD))
    return fetched


def _unsealed(store: Store, manifest: Manifest, spans: Sequence[int]) -> list[int]:
    sealed = store.catalog.recorded([manifest.key(span) for span in spans])
    return [span for span in spans if manifest.key(span) not in sealed]


def _confirm(store: Store, manifest: Manifest, sources: Iterable[int]) -> None:
    """Confirms complete files that the transfer processes have not; drops those with another SHA-256. In a thread."""
    for source in (manifest.sources[i] for i in sources):
        confirm_source(store, source.identity, source.locator.size)


def _check_kept(store: Store, fetcher: Fetcher) -> None:
    if fetcher.has_unkept:
        raise StoreFull(f"no room left in {store.path}", hint="cakefs gc")


def chunk_size(manifest: Manifest, ref: ChunkRef) -> int:
    return min(CHUNK, manifest.spans[ref.span].size - ref.chunk * CHUNK)


def verify(store: Store, manifest: Manifest, progress: Progress, *, repair: bool) -> Repair:
    """Reads every stored byte of a model again and confirms every complete upstream file. Runs in a thread.

    Args:
        repair: Forget what does not hold, so that it counts as missing.
    """
    bad: list[str] = []
    damaged: set[str] = set()
    buffer = memoryview(bytearray(4 * MIB))
    spans = read = 0
    for span in range(len(manifest.spans)):
        key = manifest.key(span)
        if not key.size or not store.has(key):
            continue
        spans += 1
        try:
            for piece in stream(store, key, buffer):
                read += len(piece)
                progress(len(piece))
        except CorruptData as error:
            bad.append(f"{_label(manifest, span)}: {error.message}")
            damaged.add(key.identity)
            if repair:
                store.drop_span(key)
    confirmed = incomplete = 0
    for source in manifest.sources:
        if source.identity in damaged:
            continue  # What is wrong with it is known; the rest of it need not be dropped.
        ok = confirm_source(store, source.identity, source.locator.size, again=True)
        confirmed += ok is True
        incomplete += ok is None and bool(source.sha256)
        if ok is False:
            bad.append(f"{source.path}: does not have the published SHA-256; it will be fetched again")
    return Repair(spans, read, confirmed, incomplete, bad, _lost_literals(store, manifest, repair=repair))


def _label(manifest: Manifest, span: int) -> str:
    source = manifest.sources[manifest.spans[span].source]
    name = next((t.name for t in manifest.tensors if t.span == span), "")
    return f"{name} in {source.path}" if name else source.path


def _lost_literals(store: Store, manifest: Manifest, *, repair: bool) -> list[str]:
    """Damaged headers, in words; dropped by `repair`, so that the next `add` stores them anew."""
    lost = {}
    for file in manifest.files:
        for segment in file.segments:
            if isinstance(segment, Literal):
                try:
                    store.literal(segment.blob)
                except (CorruptData, NotFound) as error:
                    lost[segment.blob] = f"header of {file.path}: {error.message}"
    if lost and repair:
        for key, digest in store.catalog.listing():
            if digest in lost:
                store.drop_span(key)
    return list(lost.values())


def gc_plan(store: Store) -> GcPlan:
    """What nothing alive refers to. Names and the manifests that live mounts hold are alive."""
    catalog = store.catalog
    stored = catalog.manifest_ids()
    alive = {record.manifest for record in catalog.models().values()} | (store.leased() & stored)
    spans: set[SpanKey] = set()
    literals: set[str] = set()
    for manifest_id in alive:
        manifest = catalog.manifest(manifest_id)
        spans.update(manifest.key(i) for i, span in enumerate(manifest.spans) if span.size)
        literals.update(s.blob for f in manifest.files for s in f.segments if isinstance(s, Literal))
    listing = catalog.listing()
    spans.update(key for key, digest in listing if key.identity.startswith(LITERAL) and digest in literals)
    blobs = {digest: size for digest, size, _ in catalog.blobs()}
    return plan_gc(stored, alive, spans, listing, blobs, dict(store.partials()))


def collect(store: Store) -> GcPlan:
    """Plans and carries the plan out, while no model is being added. Runs in a thread.

    Returns:
        The plan, as carried out.
    """
    with store.guard(exclusive=True):
        plan = gc_plan(store)
        for key in plan.partials:  # First: on a full disk the catalog needs room to shrink.
            store.drop_partial(key)
        store.catalog.drop_manifests(plan.manifests)
        store.catalog.forget_spans(plan.spans)
        store.delete_blobs(list(plan.blobs))
        store.sweep()
        return plan
