"""Which blobs to give up when bytes are needed: what was used least recently goes first. Pure.

Eviction takes what can be fetched again and leaves the models as they are; garbage collection (`collect.py`) takes what
no model refers to.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from cakefs.model import MIB, SMALL_FILE_LIMIT, Source, SpanKey

HEADER_LIMIT = 100 * MIB  # The official reader takes headers of up to 100 MB.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")


class Resident(NamedTuple):
    """A blob that may go; `used` in Unix seconds."""

    digest: str
    size: int
    used: float


class Eviction(NamedTuple):
    """Attributes:
    blobs: In the order in which they go.
    short: Bytes that were wanted beyond what these have.
    """

    blobs: list[Resident]
    short: int

    @property
    def bytes(self) -> int:
        return sum(blob.size for blob in self.blobs)


def shown_by(source: Source) -> int:
    """Up to where the first span of an upstream file is what a model is shown by: its header, or all of a small file
    or a tokenizer. That stays."""
    size = source.locator.size
    whole = size <= SMALL_FILE_LIMIT or source.path.rpartition("/")[2] in _TOKENIZERS
    return size if whole else min(HEADER_LIMIT, size - 1)


def evictable(spans: Iterable[tuple[SpanKey, str]], fetchable: Mapping[str, int], pinned: set[SpanKey]) -> set[str]:
    """The blobs of which every span can be fetched again, and none is pinned or what a model is shown by.

    Args:
        spans: All that the store has, with their digests.
        fetchable: `shown_by` of the upstream files, by identity, that some model still knows an address of.
    """
    found: set[str] = set()
    kept: set[str] = set()
    for key, digest in spans:
        front = key.start == 0 and key.stop <= fetchable.get(key.identity, 0)
        (kept if front or key.identity not in fetchable or key in pinned else found).add(digest)
    return found - kept


def plan_eviction(candidates: Iterable[Resident], wanted: int) -> Eviction:
    """Enough of them to free `wanted` bytes, least recently used first."""
    chosen: list[Resident] = []
    for blob in sorted(candidates, key=lambda b: (b.used, b.digest)):
        if wanted <= 0:
            break
        chosen.append(blob)
        wanted -= blob.size
    return Eviction(chosen, max(0, wanted))


def own_blobs(mine: Mapping[SpanKey, str], others: set[str]) -> set[str]:
    """Blobs of a model that no other model has."""
    return set(mine.values()) - others
