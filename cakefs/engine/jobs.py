"""The long jobs: pull and gc. Each plans over the catalog, then acts, and reports progress to a callback."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import trio

from cakefs.engine.evict import prepare_room
from cakefs.engine.fetch import Fetcher
from cakefs.engine.follow import Followed
from cakefs.engine.known import claims
from cakefs.engine.known.survey import missing_chunks
from cakefs.engine.tasks import open_flat_nursery
from cakefs.engine.transfer.flights import Pending, Priority
from cakefs.engine.transfer.quota import left_free
from cakefs.errors import CorruptData, StoreFull
from cakefs.model import MIB, File, Literal, Manifest, SpanKey
from cakefs.plan.choice import file_spans, in_order
from cakefs.plan.collect import GcPlan, plan_gc
from cakefs.plan.pullplan import beside_tensors
from cakefs.plan.requests import ChunkRef, batches, chunks_size
from cakefs.store.borrowing import Borrowing
from cakefs.store.store import LITERAL, Store

Progress = Callable[[int], None]
"""Called with the number of bytes done since the last call."""

ROUNDS = 2  # What turns out wrong is fetched once more.
QUEUED = 8  # Flights queued behind the running ones, so that no connection waits for the planner.
RATE_BYTES = 16 * MIB  # A transfer that says how fast the line is moves at least this much.


async def pull(store: Store, fetcher: Fetcher, manifest: Manifest, files: Sequence[File], progress: Progress) -> int:
    """As `pull_spans`, for all that the files consist of."""
    return await pull_spans(store, fetcher, manifest, file_spans(manifest, files), progress)


async def pull_spans(
    store: Store, fetcher: Fetcher, manifest: Manifest, spans: Sequence[int], progress: Progress
) -> int:
    """Fetches what is missing of spans, seals it and confirms the upstream files that are complete. Where one is wrong
    all of it was dropped: what had been here of it is fetched again, too.

    Takes up whatever a process that ended left: parts, whole tensors not sealed, whole files not confirmed. What is
    here under another name, by somebody's claim, is not fetched where the claim can be proved (`engine/claims.py`).

    Args:
        spans: In the order of `in_order`.

    Returns:
        Bytes that were fetched.

    Raises:
        StoreFull: Not all of it could be kept.
        CorruptData: What came is wrong, and was so again; it was dropped.
    """
    await trio.to_thread.run_sync(Borrowing(store).forget_lost)
    sources = {manifest.spans[span].source for span in spans}
    doubted = [manifest.sources[source].identity for source in sources if _is_wrong(store, manifest, source)]
    if headers := [span for identity in doubted for span in beside_tensors(manifest, identity)]:
        spans = in_order(manifest, [*spans, *headers])  # Without them no file is complete, and can be right.
    left = _unsealed(store, manifest, spans)
    beside = _sealed_of(store, manifest, sources)
    if fetcher.limit:
        wanted = sum(chunks_size(manifest, missing_chunks(store, manifest, span)) for span in left)
        needed = [manifest.key(span) for span in spans]  # Also of those that are to be completed.
        room = partial(prepare_room, store, wanted, needed, fetcher.limit, spare=left_free(fetcher.limit))
        await trio.to_thread.run_sync(room)
    progress(sum(manifest.spans[span].size for span in set(spans) - set(left)))
    planned = await trio.to_thread.run_sync(claims.plan, store, manifest, left)
    followed = Followed(store, manifest, left)
    fetched = 0
    if planned.spared:
        fetched += await _fetch_and_seal(store, fetcher, manifest, planned.fetch, progress, followed)
        await trio.to_thread.run_sync(claims.settle, store, manifest, planned)
        left = _unsealed(store, manifest, left)
    for _ in range(ROUNDS):
        fetched += await _fetch_and_seal(store, fetcher, manifest, left, progress, followed)
        for identity, ok in await trio.to_thread.run_sync(_confirm, followed, manifest, sources):
            fetcher.note_confirmed(identity, ok)
        wrong = {source for source in sources if _is_wrong(store, manifest, source)}
        dropped = [span for span in beside if manifest.spans[span].source in wrong]  # with what this pull brought
        left = _unsealed(store, manifest, in_order(manifest, [*spans, *dropped]))
        if not left:
            return fetched
    paths = {manifest.spans[span].source: manifest.sources[manifest.spans[span].source].path for span in left}
    refuted = ", ".join(sorted(path for source, path in paths.items() if source in wrong))
    if refuted:
        raise CorruptData(f"what came of {refuted} is not what was published, and was dropped", hint="pull again")
    gone = ", ".join(sorted(paths.values()))
    raise StoreFull(f"bytes of {gone} went as they came: evicted by others, or damaged on disk", hint="pull again")


async def _fetch_and_seal(
    store: Store, fetcher: Fetcher, manifest: Manifest, spans: Sequence[int], progress: Progress, followed: Followed
) -> int:
    began = trio.current_time()
    async with followed.coming(fetcher.note_confirmed):
        fetched = await _fetch(store, fetcher, manifest, spans, progress, followed)
        if fetched >= RATE_BYTES:
            store.catalog.numbers.set_rate(round(fetched / (trio.current_time() - began)))
        await fetcher.flush()
    _check_kept(store, fetcher)
    await trio.to_thread.run_sync(_seal, store, manifest, spans)
    return fetched


async def _fetch(
    store: Store, fetcher: Fetcher, manifest: Manifest, spans: Sequence[int], progress: Progress, followed: Followed
) -> int:
    """Fetches the missing chunks of spans; returns their bytes."""
    fetched = 0

    def look() -> Iterator[list[ChunkRef]]:
        nonlocal fetched
        for span in spans:
            missing = missing_chunks(store, manifest, span)
            size = chunks_size(manifest, missing)
            progress(manifest.spans[span].size - size)
            fetched += size
            _check_kept(store, fetcher)
            yield missing

    async def follow(pendings: list[Pending]) -> None:
        for pending in pendings:
            await pending.wait()
            progress(pending.size)

    async with open_flat_nursery() as nursery:
        for batch in batches(manifest, look()):
            nursery.start_soon(follow, fetcher.want(manifest, batch, Priority.AHEAD, confirmed_elsewhere=followed))
            await fetcher.wait_for_room(QUEUED)
    return fetched


def _seal(store: Store, manifest: Manifest, spans: Iterable[int]) -> None:
    """What came, and what an earlier process left complete of the same upstream files. In a thread."""
    keys = {manifest.key(span) for span in spans}
    identities = {key.identity for key in keys}
    keys |= {key for key, _ in store.partials() if key.identity in identities}
    store.seal(sorted(keys - store.catalog.recorded(keys)))


def _unsealed(store: Store, manifest: Manifest, spans: Sequence[int]) -> list[int]:
    sealed = store.catalog.recorded([manifest.key(span) for span in spans])
    return [span for span in spans if manifest.key(span) not in sealed]


def _sealed_of(store: Store, manifest: Manifest, sources: Iterable[int]) -> list[int]:
    """What is here of these upstream files."""
    wanted = set(sources)
    keys = {i: manifest.key(i) for i, span in enumerate(manifest.spans) if span.source in wanted}
    sealed = store.catalog.recorded(keys.values())
    return [span for span, key in keys.items() if key in sealed]


def _is_wrong(store: Store, manifest: Manifest, source: int) -> bool:
    """Whether an upstream file did not have its published hash, the last time that all of it was here."""
    check = store.catalog.verified(manifest.sources[source].identity)
    return check is not None and not check.ok


def _confirm(followed: Followed, manifest: Manifest, sources: Iterable[int]) -> list[tuple[str, bool]]:
    """Hashes complete files; drops those with another hash than was published. In a thread.

    Returns: Of those that were hashed, whether they are right.
    """
    verdicts = {manifest.sources[i].identity: followed.confirm(i) for i in sources}
    return [(identity, ok) for identity, ok in verdicts.items() if ok is not None]


def _check_kept(store: Store, fetcher: Fetcher) -> None:
    if fetcher.has_unkept:
        raise StoreFull(f"no room left in {store.path}", hint="cakefs gc")


def gc_plan(store: Store) -> GcPlan:
    """What nothing alive refers to. Names and the manifests that live mounts hold are alive."""
    catalog = store.catalog
    stored = catalog.models.manifest_ids()
    named = {record.manifest for record in catalog.models.all().values()}
    held = (store.leased() & stored) - named
    alive = named | held
    spans: set[SpanKey] = set()
    literals: set[str] = set()
    for manifest_id in alive:
        manifest = catalog.models.manifest(manifest_id)
        spans.update(manifest.key(i) for i, span in enumerate(manifest.spans) if span.size)
        literals.update(s.blob for f in manifest.files for s in f.segments if isinstance(s, Literal))
    listing = catalog.listing()
    spans.update(key for key, digest in listing if key.identity.startswith(LITERAL) and digest in literals)
    borrowed = catalog.borrowed.digests()  # Nothing is freed by forgetting these.
    blobs = {digest: 0 if digest in borrowed else size for digest, size, _ in catalog.blobs()}
    plan = plan_gc(stored, alive, spans, listing, blobs, dict(store.partials()))
    names = sorted(catalog.models.head(manifest_id).name for manifest_id in held)
    return plan._replace(held=names, set_aside=store.usage().quarantine_bytes)


def collect(store: Store) -> GcPlan:
    """Plans and carries the plan out, while no model is being added. Runs in a thread.

    Returns:
        The plan, as carried out.
    """
    with store.guard(exclusive=True):
        plan = gc_plan(store)
        for key in plan.partials:  # First: on a full disk the catalog needs room to shrink.
            store.drop_partial(key)
        store.freeing(lambda: store.catalog.models.drop_manifests(plan.manifests))
        store.freeing(lambda: store.catalog.forget_spans(plan.spans))
        store.delete_blobs(list(plan.blobs))
        Borrowing(store).forget_gone()
        heads = map(store.catalog.models.head, store.catalog.models.manifest_ids())
        identities = {source.identity for head in heads for source in head.sources}
        store.catalog.sha256.keep_claims(identities)
        store.catalog.keep_files(identities)
        store.sweep()
        return plan
