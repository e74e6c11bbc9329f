"""Which bytes to give up when room is needed: what was used least recently goes first, blob or partial. Pure.

Eviction takes what can be fetched again and leaves the models as they are; garbage collection (`collect.py`) takes what
no model refers to.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from cakefs.model import MIB, SMALL_FILE_LIMIT, Digest, Source, SpanKey

HEADER_LIMIT = 100 * MIB  # The official reader takes headers of up to 100 MB.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


class Resident(NamedTuple):
    """What may go: a blob by its digest, or the partial of a span; `used` in Unix seconds."""

    item: Digest | SpanKey
    size: int
    used: float

    @property
    def is_partial(self) -> bool:
        return isinstance(self.item, SpanKey)


class Eviction(NamedTuple):
    """Attributes:
    residents: In the order in which they go.
    short: Bytes that were wanted beyond what these have.
    """

    residents: list[Resident]
    short: int

    @property
    def bytes(self) -> int:
        return sum(resident.size for resident in self.residents)


def shown_by(source: Source) -> int:
    """Up to where the first span of an upstream file is what a model is shown by: its header, or all of a small file
    or a tokenizer. That stays."""
    size = source.locator.size
    whole = size <= SMALL_FILE_LIMIT or source.path.rpartition("/")[2] in _TOKENIZERS
    return size if whole else min(HEADER_LIMIT, size - 1)


def evictable(
    spans: Iterable[tuple[SpanKey, Digest | SpanKey]], fetchable: Mapping[str, int], pinned: set[SpanKey]
) -> set[Digest | SpanKey]:
    """The items of which every span can be fetched again, and none is pinned or what a model is shown by.

    Args:
        spans: All that the store has, with the items that hold them: blobs by digest, each partial by its span.
        fetchable: `shown_by` of the upstream files, by identity, that some model still knows an address of.
    """
    found: set[Digest | SpanKey] = set()
    kept: set[Digest | SpanKey] = set()
    for key, item in spans:
        front = key.start == 0 and key.stop <= fetchable.get(key.identity, 0)
        (kept if front or key.identity not in fetchable or key in pinned else found).add(item)
    return found - kept


def plan_eviction(candidates: Iterable[Resident], wanted: int) -> Eviction:
    """Enough of them to free `wanted` bytes, least recently used first."""
    chosen: list[Resident] = []
    for resident in sorted(candidates, key=lambda r: (r.used, str(r.item))):
        if wanted <= 0:
            break
        chosen.append(resident)
        wanted -= resident.size
    return Eviction(chosen, max(0, wanted))
