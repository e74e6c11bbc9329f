"""What garbage collection would delete. Pure: `gc --dry-run` prints the very plan that `gc` carries out.

Alive is what a named model or a mount that still serves it refers to.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from cakefs.model import SpanKey


class GcPlan(NamedTuple):
    """Attributes:
    manifests: Ids that neither a name nor a live mount refers to.
    spans: Catalog entries that no living manifest refers to.
    blobs: Digest -> bytes, of blobs that nothing alive refers to afterwards.
    partials: Span -> bytes on disk, of transfers that no living manifest wants.
    held: Models that were removed or updated, and stay because a process still uses them.
    set_aside: Bytes of blobs that were found wrong or damaged, and replaced.
    """

    manifests: list[str]
    spans: list[SpanKey]
    blobs: dict[str, int]
    partials: dict[SpanKey, int]
    held: list[str]
    set_aside: int

    @property
    def bytes(self) -> int:
        return sum(self.blobs.values()) + sum(self.partials.values()) + self.set_aside


def plan_gc(
    manifests: Iterable[str],
    alive_manifests: set[str],
    alive_spans: set[SpanKey],
    spans: Iterable[tuple[SpanKey, str]],
    blobs: Mapping[str, int],
    partials: Mapping[SpanKey, int],
) -> GcPlan:
    """Args: manifests, spans with their digests, blobs, partials: all that the store has; alive_*: what must stay."""
    keep = set()
    dead_spans = []
    for key, digest in spans:
        if key in alive_spans:
            keep.add(digest)
        else:
            dead_spans.append(key)
    return GcPlan(
        sorted(m for m in manifests if m not in alive_manifests),
        dead_spans,
        {digest: size for digest, size in blobs.items() if digest not in keep},
        {key: size for key, size in partials.items() if key not in alive_spans},
        [],
        0,
    )
