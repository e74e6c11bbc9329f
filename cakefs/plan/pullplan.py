"""What a pull fetches, and what it can spare: spans whose bytes are here under another name, if a claim holds. Pure.

A claim (an imported hashes.json) says that a span's bytes have a certain SHA-256. It may be false. So it never puts
bytes under a name by itself; what vouches is the published SHA-256 of the whole upstream file, by which the file is
named. A span is spared only where that decides:

- its file is named by its SHA-256 (`sha256:…`), and will be complete once the rest of this pull is here;
- a blob with the claimed SHA-256, which we computed, is here, or another span with the same claim is fetched before it.

After the transfer the whole file is hashed with the spared spans filled in from those blobs (`engine/claims.py`).
Only if it has the published SHA-256 are they bound; else all that was spared of the file is fetched. Bytes that pass
cannot be wrong without a collision of SHA-256. Everything else is fetched, whatever is claimed of it.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from cakefs.model import Manifest, SpanKey, leaves
from cakefs.plan.ranges import tiling

PROVING = "sha256:"  # Identities that are a hash of the whole file. A git id is one, too, but of SHA-1.


class Spared(NamedTuple):
    """A span that need not be fetched if it has `sha256`, as is claimed; `digest` is empty where the blob comes with
    another span of the same pull."""

    span: int
    sha256: str
    digest: str


class PullPlan(NamedTuple):
    """`fetch` in the order of the pull. Together they are all that is not complete yet, each span once."""

    fetch: tuple[int, ...]
    spared: tuple[Spared, ...]


class Held(NamedTuple):
    """A blob whose SHA-256 we computed."""

    digest: str
    size: int


def plan_pull(
    manifest: Manifest,
    left: Sequence[int],
    sealed: Mapping[str, Collection[tuple[int, int]]],
    claims: Mapping[SpanKey, str],
    held: Mapping[str, Held],
) -> PullPlan:
    """Divides the spans that are not complete.

    Args:
        left: Those, in the order of the pull.
        sealed: By identity, the complete spans of the files of which something is claimed.
        claims: Span -> claimed SHA-256.
        held: SHA-256 -> blob.
    """
    provable = _provable(manifest, left, sealed)
    coming: dict[tuple[str, int], int] = {}
    fetch, spared = [], []
    for span in left:
        key = manifest.key(span)
        sha256 = claims.get(key, "") if key.identity in provable else ""
        blob = held.get(sha256)
        if blob is not None and blob.size == key.size:
            spared.append(Spared(span, sha256, blob.digest))
        elif sha256 and (sha256, key.size) in coming:
            spared.append(Spared(span, sha256, ""))
        else:
            fetch.append(span)
            coming.setdefault((claims.get(key, ""), key.size), span)
    return PullPlan(tuple(fetch), tuple(spared))


def beside_tensors(manifest: Manifest, identity: str) -> list[int]:
    """The spans of an upstream file that are of no tensor, such as its header; none of a file without tensors."""
    parts = (leaves(t.data) if t.data is not None else () for t in manifest.tensors)
    of_tensors = {t.span for t in manifest.tensors} | {part.span for some in parts for part in some}
    spans = [i for i, s in enumerate(manifest.spans) if manifest.sources[s.source].identity == identity]
    return [i for i in spans if i not in of_tensors] if of_tensors.intersection(spans) else []


def claimed_sizes(manifest: Manifest, left: Iterable[int], claims: Mapping[SpanKey, str]) -> set[int]:
    """Sizes of the blobs that are worth hashing, because one of them may be what is claimed."""
    keys = (manifest.key(span) for span in left)
    return {key.size for key in keys if key.identity.startswith(PROVING) and key in claims}


def _provable(manifest: Manifest, left: Iterable[int], sealed: Mapping[str, Collection[tuple[int, int]]]) -> set[str]:
    """Identities of the files that will be complete, and so can be held against their published SHA-256."""
    spans: dict[str, set[tuple[int, int]]] = {identity: set(known) for identity, known in sealed.items()}
    for span in left:
        key = manifest.key(span)
        if key.identity in spans:
            spans[key.identity].add((key.start, key.stop))
    sizes = {source.identity: source.locator.size for source in manifest.sources}
    return {
        identity
        for identity, parts in spans.items()
        if identity.startswith(PROVING) and identity in sizes and tiling(parts, sizes[identity]) is not None
    }
