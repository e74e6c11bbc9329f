"""Models that a long job works on: while it does, neither gc nor `cakefs evict` takes anything of them."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cakefs.engine.known.survey import require_models
from cakefs.errors import StoreFull
from cakefs.model import Manifest
from cakefs.store.lease import Lease
from cakefs.store.store import Store

log = logging.getLogger(__name__)

_JOB = "job-"  # Before the manifest, in a lease: mounts hold manifests, too, and what they show may be evicted.


@contextmanager
def held(store: Store, names: Sequence[str]) -> Iterator[list[Manifest]]:
    """The manifests that these names stand for now. Raises UserError."""
    require_models(store, names)
    records = store.catalog.models.all()
    lease = _lease(store)
    try:
        for name in names:
            lease.hold(records[name].manifest)
            lease.hold(_JOB + records[name].manifest)
        yield [store.catalog.models.manifest(records[name].manifest) for name in names]
    finally:
        lease.close()


def worked_on(store: Store) -> set[str]:
    """The manifests that are held now, by whichever process."""
    return {name.removeprefix(_JOB) for name in store.leased() if name.startswith(_JOB)}


def _lease(store: Store) -> Lease:
    """On a full disk none: what is here can be read all the same."""
    try:
        return store.lease()
    except StoreFull as error:
        log.warning("%s: a gc meanwhile may take what this job still needs", error.message)
        return Lease(None)
