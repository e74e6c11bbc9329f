"""Giving up bytes that can be fetched again, whole tensors and parts: for `cakefs evict`, and to keep a store's limit.

Never what is pinned, what a process serves from or writes, or what nobody could fetch again; and `cakefs evict` takes
nothing of what a long job (`held.py`) works on.
"""

import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cakefs.engine.held import worked_on
from cakefs.errors import CakeError, StoreFull
from cakefs.model import Digest, Manifest, SpanKey
from cakefs.plan.evict import Eviction, Resident, evictable, plan_eviction, shown_by
from cakefs.store.store import Store

FRESH_S = 60.0  # What was used within this time is not evicted to make room: it was fetched ahead of a reader.
EVERYTHING = 1 << 63


class _Here(NamedTuple):
    """What is in the store.

    Attributes:
        spans: With what holds their bytes: blobs by digest, partials by their span.
        partials: The bytes that they take on disk.
    """

    spans: list[tuple[SpanKey, Digest | SpanKey]]
    partials: dict[SpanKey, int]

    @classmethod
    def of(cls, store: Store) -> "_Here":
        partials = dict(store.partials())
        return cls([*store.catalog.listing(), *((key, key) for key in partials)], partials)

    def holding(self, keys: set[SpanKey]) -> set[Digest | SpanKey]:
        """What holds bytes of these."""
        return {item for key, item in self.spans if key in keys}


class Evicted(NamedTuple):
    """What went; `in_use` is what was left because a process serves from it, writes it, or works on it."""

    gone: list[Resident]
    in_use: list[Resident]

    @property
    def bytes(self) -> int:
        return sum(resident.size for resident in self.gone)


def eviction_of(store: Store, manifest: Manifest) -> Eviction:
    """What `evict MODEL` gives up: the model's bytes, except what other models have as well."""
    keys = {manifest.key(span) for span in range(len(manifest.spans))}
    used = _keys_of_models(store, [r.manifest for n, r in store.catalog.models.all().items() if n != manifest.name])
    here = _Here.of(store)
    own = here.holding(keys) - here.holding(used)
    return plan_eviction(_residents(store, here, _may_go(store, here) & own), EVERYTHING)._replace(short=0)


def room_plan(store: Store, wanted: int, *, unused_since: float) -> Eviction:
    """What goes to free `wanted` bytes; nothing that was used later than `unused_since` (Unix seconds)."""
    here = _Here.of(store)
    residents = _residents(store, here, _may_go(store, here))
    return plan_eviction((r for r in residents if r.used < unused_since), wanted)


def evict(store: Store, plan: Eviction, *, spare_jobs: bool = False, dry_run: bool = False) -> Evicted:
    """Carries it out.

    Args:
        spare_jobs: Leave what long jobs work on.
        dry_run: Only say what would go, and what is in use.
    """
    jobs = _keys_of_models(store, sorted(worked_on(store))) if spare_jobs else set()
    spared = _Here.of(store).holding(jobs) if jobs else set()
    gone = store.evict([r.item for r in plan.residents if r.item not in spared], dry_run=dry_run)
    return Evicted([r for r in plan.residents if r.item in gone], [r for r in plan.residents if r.item not in gone])


def make_room(store: Store, size: int, limit: int, *, spared_since: float = 0.0) -> int:
    """Evicts until `size` bytes fit below the limit, if that can be done. Returns: bytes that are free then.

    Args:
        spared_since: Unix seconds; what was used later stays, as does what was used a moment ago.
    """
    with store.evicting():  # Two that plan at once would choose the same.
        free = limit - used_bytes(store)
        if free < size:
            free += store.empty_quarantine()
        if free < size:
            since = min(spared_since or EVERYTHING, time.time() - FRESH_S)
            free += evict(store, room_plan(store, size - free, unused_since=since)).bytes
        return free


def prepare_room(store: Store, wanted: int, needed: Sequence[SpanKey], limit: int, *, spare: int = 0) -> None:
    """Before a transfer of which all is to be kept.

    Args:
        needed: Spans of which nothing must go to make room for the others.
        spare: Bytes that are to be left free.

    Raises:
        StoreFull: What is wanted does not fit below the limit, whatever goes.
    """
    began = time.time()
    store.note_use(needed)
    store.empty_quarantine()
    spared_since = min(began, time.time() - FRESH_S)
    free = limit - spare - used_bytes(store) + room_plan(store, EVERYTHING, unused_since=spared_since).bytes
    if wanted and wanted > free:  # What is here already is used all the same when a lower limit came later.
        raise StoreFull(
            f"{wanted} bytes are missing, and of the limit of {limit} no more than {max(0, free)} can be had",
            hint="a higher limit of the mount, `cakefs unpin`, `cakefs rm` and `cakefs gc`; or it part by part:"
            " pull --files or --layers, export --file",
        )


def job_is_done(store: Store, keys: Iterable[SpanKey], limit: int) -> None:
    """A job that brought or read these ends: nobody is about to read them, as what was fetched ahead, so the next job
    need not wait until they are no longer fresh."""
    if limit:
        store.note_use(keys, ago=FRESH_S)


def used_bytes(store: Store) -> int:
    """What counts against the limit."""
    usage = store.usage()
    return usage.blob_bytes + usage.partial_bytes + usage.quarantine_bytes


def _may_go(store: Store, here: _Here) -> set[Digest | SpanKey]:
    models = store.catalog.models.all()
    fetchable: dict[str, int] = {}
    local: set[str] = set()  # Of a model from this machine, whose files may be gone: others' addresses are not its own.
    for record in models.values():
        try:
            head = store.catalog.models.head(record.manifest)
        except CakeError:
            continue  # Damaged: nothing of it can be fetched again until it is added again.
        for source in head.sources:
            if source.locator.url.startswith(("http://", "https://")):
                fetchable[source.identity] = max(shown_by(source), fetchable.get(source.identity, 0))
            else:
                local.add(source.identity)
    pinned = _keys_of_models(store, [record.manifest for record in models.values() if record.pinned])
    return evictable(here.spans, {one: front for one, front in fetchable.items() if one not in local}, pinned)


def _keys_of_models(store: Store, manifests: Sequence[str]) -> set[SpanKey]:
    keys: set[SpanKey] = set()
    for manifest_id in manifests:
        try:
            manifest = store.catalog.models.manifest(manifest_id)
        except CakeError:
            continue
        keys.update(manifest.key(span) for span in range(len(manifest.spans)))
    return keys


def _residents(store: Store, here: _Here, items: set[Digest | SpanKey]) -> list[Resident]:
    """Those that have a file of their own: what lies in the catalog or is borrowed takes no room worth having."""
    blobs = ((digest, size) for digest, size, inline in store.catalog.blobs() if not inline)
    found = [(item, size, store.last_use(item)) for item, size in (*blobs, *here.partials.items()) if item in items]
    return [Resident(item, size, used) for item, size, used in found if used is not None]
