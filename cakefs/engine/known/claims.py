"""SHA-256s of tensors: computing those of blobs here, and using what others claim to spare a transfer.

A claim decides nothing. `plan/pullplan.py` says which spans a pull can leave out for one, and why the whole file's
published SHA-256 has to bear it out before a byte is served; here is what touches the store: `plan` before the
transfer, `settle` after it.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from cakefs.buffers import page_aligned
from cakefs.engine.local import stream_blob
from cakefs.engine.transfer.confirm import prove
from cakefs.errors import CorruptData
from cakefs.model import MIB, Manifest, SpanKey
from cakefs.plan.pullplan import Held, PullPlan, Spared, claimed_sizes, plan_pull
from cakefs.store.store import Store

log = logging.getLogger(__name__)

HASH_THREADS = min(4, os.cpu_count() or 1)  # hashlib lets the others run; more only wait for the disk.
Progress = Callable[[int], None]

RECORD_EVERY = 64  # Blobs hashed between two transactions: what an interrupted run has to do again.


def claims_of(store: Store, identities: Iterable[str]) -> dict[SpanKey, str]:
    """What is claimed of the spans of upstream files."""
    return {
        SpanKey(identity, *span): sha256
        for identity in identities
        for span, sha256 in store.catalog.sha256.claims(identity).items()
    }


def plan(store: Store, manifest: Manifest, left: Sequence[int]) -> PullPlan:
    """What a pull of these spans fetches, and what it can spare.

    Where something is claimed, blobs of the claimed sizes are hashed, once in their life. Runs in a thread.
    """
    identities = {manifest.sources[source].identity for source in {manifest.spans[span].source for span in left}}
    claims = claims_of(store, identities)
    if not claims:
        return PullPlan(tuple(left), ())
    learn(store, candidates(store, manifest, left, claims))
    digests = store.catalog.sha256.digests(set(claims.values()))
    sizes = {digest: size for digest, size, _ in store.catalog.blobs()}
    held = {sha256: Held(digest, sizes[digest]) for sha256, digest in digests.items() if digest in sizes}
    sealed = {identity: store.catalog.spans(identity) for identity in {key.identity for key in claims}}
    return plan_pull(manifest, left, sealed, claims, held)


def settle(store: Store, manifest: Manifest, planned: PullPlan) -> None:
    """After the rest was fetched and sealed: binds what was spared, file by file, if the file's SHA-256 bears it out.

    Where it does not, the claims about that file are forgotten, so that the next pull fetches. Runs in a thread.
    """
    by_identity: dict[str, list[Spared]] = {}
    for spared in planned.spared:
        by_identity.setdefault(manifest.key(spared.span).identity, []).append(spared)
    if any(not spared.digest for spared in planned.spared):
        learn(store, _fetched(store, manifest, planned))
    sizes = {source.identity: source.locator.size for source in manifest.sources}
    for identity, group in by_identity.items():
        guesses = _guesses(store, manifest, group)
        proved = None if guesses is None else prove(store, identity, sizes[identity], guesses)
        if proved:
            continue
        if proved is False or guesses is None:
            path = next(source.path for source in manifest.sources if source.identity == identity)
            log.warning("%s: what is claimed of its tensors is wrong; it is forgotten, and they are fetched", path)
            store.catalog.sha256.drop_claims(claims_of(store, [identity]))


def _guesses(store: Store, manifest: Manifest, group: Iterable[Spared]) -> dict[tuple[int, int], str] | None:
    """The blobs to try; None where the bytes that came with another span are not what was claimed of them."""
    group = list(group)
    digests = store.catalog.sha256.digests({spared.sha256 for spared in group})
    if any(spared.sha256 not in digests for spared in group):
        return None
    keys = ((manifest.key(spared.span), digests[spared.sha256]) for spared in group)
    return {(key.start, key.stop): digest for key, digest in keys}


def _fetched(store: Store, manifest: Manifest, planned: PullPlan) -> list[str]:
    """Blobs that came with this pull and of which copies were spared."""
    wanted = {spared.sha256 for spared in planned.spared if not spared.digest}
    claims = claims_of(store, {manifest.key(span).identity for span in planned.fetch})
    keys = [key for span in planned.fetch if claims.get(key := manifest.key(span)) in wanted]
    return [record.digest for key in keys if (record := store.catalog.find(key)) is not None]


def candidates(store: Store, manifest: Manifest, left: Iterable[int], claims: Mapping[SpanKey, str]) -> list[str]:
    """Blobs that may be what is claimed of spans, by their size."""
    sizes = claimed_sizes(manifest, left, claims)
    return [digest for digest, size, _ in store.catalog.blobs() if size in sizes]


def learn(store: Store, digests: Collection[str], progress: Progress = lambda size: None) -> dict[str, str]:
    """The SHA-256s of blobs; those not known yet are computed and recorded. A damaged blob is left out.

    Args:
        progress: Called with the number of bytes whose SHA-256 is known since the last call.
    """
    known = store.catalog.sha256.of(digests)
    new = [digest for digest in dict.fromkeys(digests) if digest not in known]
    sizes = {digest: size for digest, size, _ in store.catalog.blobs()} if new else {}
    progress(sum(size for digest, size in sizes.items() if digest in known))
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        for first in range(0, len(new), RECORD_EVERY):
            batch, found = new[first : first + RECORD_EVERY], {}
            for digest, sha256 in zip(batch, pool.map(lambda one: _sha256(store, one), batch), strict=True):
                progress(sizes.get(digest, 0))
                if sha256:
                    found[digest] = sha256
            if not store.catalog.readonly:
                store.catalog.sha256.record(found)
            known |= found
    return known


def _sha256(store: Store, digest: str) -> str:
    """Empty for a blob that is gone or damaged."""
    hasher = hashlib.sha256()
    try:
        for piece in stream_blob(store, digest, page_aligned(MIB)):
            hasher.update(piece)
    except CorruptData as error:
        log.warning("%s", error.message)
        return ""
    return hasher.hexdigest()
