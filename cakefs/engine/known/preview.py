"""What a pull would do: per tensor and in sum what is here, what another model has, what is missing, and the requests.

Nothing is fetched. The requests are those of `jobs.pull_spans`, made by the same functions from the same state of the
store; they differ only if the store changes in between, or upstream fails.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

from msgspec import Struct

from cakefs.engine.known import claims
from cakefs.engine.known.survey import missing_chunks
from cakefs.engine.models.smallfiles import small_files
from cakefs.model import Manifest, leaves
from cakefs.plan.choice import in_order
from cakefs.plan.parents import load_parent, require_layers
from cakefs.plan.requests import ChunkRef, RangeRequest, chunks_size, pull_requests, span_chunks
from cakefs.plan.tensors import named_alike, shown_tensors
from cakefs.store.borrowing import Borrowing
from cakefs.store.store import Store


class State(StrEnum):
    LOCAL = "local"  # all of it is here
    SHARED = "shared"  # and another model has the very same bytes
    CLAIMED = "claimed"  # not here under this name, but spared by a claim that the file's SHA-256 is to bear out
    CACHED = "cached"  # in a file of the Hub cache, by the name of that: it is hashed, and borrowed if it is right
    PARTLY = "partly"
    MISSING = "missing"


class TensorPlan(Struct, frozen=True, gc=False):
    """A tensor, or (`dtype` empty) a file without tensors.

    Attributes:
        size: Of the stored bytes it is made of.
        local_bytes: Of them, what is here.
        same_as: A model that has these bytes; several where each has a part of them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    state: State
    local_bytes: int
    same_as: str


class Preview(NamedTuple):
    """Attributes:
    bytes: By state, each stored byte once; of what is partly here the two parts.
    requests: In the order of the pull.
    rate: Bytes per second of the latest long transfer; 0 when none was measured.
    """

    manifest: Manifest
    tensors: tuple[TensorPlan, ...]
    bytes: dict[State, int]
    requests: tuple[RangeRequest, ...]
    rate: int

    @property
    def missing(self) -> int:
        return self.bytes[State.MISSING]


def layer_spans(store: Store, manifest: Manifest, layers: Sequence[int], prefix: str = "") -> list[int]:
    """The spans of some layers, as a pull takes them. Raises UserError for a layer that is not there."""
    parent = load_parent(manifest, small_files(store), prefix)
    require_layers(parent, layers, "layers")
    parts = [part for layer in layers for part in parent.layers[layer].values()]
    return in_order(manifest, {e.span for part in parts for e in leaves(part.data) if e.size})


def preview(store: Store, manifest: Manifest, spans: Sequence[int], cached: Container[str] = ()) -> Preview:
    """What a pull of these spans, as `jobs.file_spans` or `layer_spans` gives them, would do. Runs in a thread.

    Args:
        cached: Identities of the files that are in the Hub cache.
    """
    Borrowing(store).forget_lost()
    blobs = _blobs(store, manifest, spans)
    missing = _missing(store, manifest, [span for span in spans if span not in blobs])
    sources = {i for i, source in enumerate(manifest.sources) if source.identity in cached}
    borrowed = {span for span in missing if manifest.spans[span].source in sources} if sources else set()
    planned = claims.plan(store, manifest, [span for span in missing if span not in borrowed])
    blobs |= {one.span: one.digest for one in planned.spared if one.digest}
    owners = _owners(store, manifest, set(blobs.values()))
    spared = {one.span for one in planned.spared}

    def look(span: int) -> _Piece:
        size, owner = manifest.spans[span].size, owners.get(blobs.get(span, ""), "")
        if span not in missing:
            return _Piece(size, size, State.SHARED if owner else State.LOCAL, owner)
        local = size - chunks_size(manifest, missing[span])
        if span in borrowed or span in spared:
            return _Piece(size, local, State.CACHED if span in borrowed else State.CLAIMED, owner)
        return _Piece(size, local, State.PARTLY if local else State.MISSING, owner)

    pieces = {span: look(span) for span in spans}
    requests = pull_requests(manifest, (missing[span] for span in planned.fetch))
    rows = tuple(_rows(manifest, pieces))
    return Preview(manifest, rows, _sums(pieces.values()), tuple(requests), store.catalog.numbers.rate())


def seconds(size: int, rate: int) -> float | None:
    """How long a transfer takes; None when nothing is known of the rate."""
    return size / rate if rate else 0.0 if not size else None


class _Piece(Struct, frozen=True, gc=False):
    """A span; `same_as` names a model that has its bytes."""

    size: int
    local_bytes: int
    state: State
    same_as: str


def _blobs(store: Store, manifest: Manifest, spans: Iterable[int]) -> dict[int, str]:
    """Digests of the complete spans."""
    sealed = [store.catalog.spans(source.identity) for source in manifest.sources]
    found = {}
    for i in spans:
        span = manifest.spans[i]
        digest = sealed[span.source].get((span.start, span.stop))
        if digest is not None:
            found[i] = digest
    return found


def _missing(store: Store, manifest: Manifest, left: Iterable[int]) -> dict[int, list[ChunkRef]]:
    """As `missing_chunks`, of all spans that are not complete, in their order; what was never begun costs no look."""
    flying = {key for key, _ in store.partials()}
    return {
        span: missing_chunks(store, manifest, span)
        if flying and manifest.key(span) in flying
        else span_chunks(span, 0, manifest.spans[span].size)
        for span in left
    }


def _owners(store: Store, manifest: Manifest, wanted: set[str]) -> dict[str, str]:
    """Of these blobs, those that another published model has as well, with its name. Slices and merges do not count:
    what they have, they have of others."""
    found: dict[str, str] = {}
    for name, record in sorted(store.catalog.models.all().items()):
        if name == manifest.name:
            continue
        head = store.catalog.models.head(record.manifest)
        if head.stack:
            continue
        for identity in {source.identity for source in head.sources}:
            for digest in store.catalog.spans(identity).values():
                if digest in wanted:
                    found.setdefault(digest, name)
    return found


def _rows(manifest: Manifest, pieces: Mapping[int, _Piece]) -> Iterator[TensorPlan]:
    """The tensors that are made of these spans alone, then the files that the other spans belong to."""
    used: set[int] = set()
    (tensors,) = named_alike(shown_tensors(manifest))
    for name, tensor in tensors.items():
        spans = {e.span for e in leaves(tensor.data) if e.stop > e.start}
        if spans and spans <= pieces.keys():
            yield _row(name, tensor.dtype, tensor.shape, [pieces[span] for span in spans])
            used |= spans
    files: dict[str, list[_Piece]] = {}
    for span, piece in pieces.items():
        if span not in used:
            files.setdefault(manifest.sources[manifest.spans[span].source].path, []).append(piece)
    for path, found in files.items():
        yield _row(path, "", (), found)


def _row(name: str, dtype: str, shape: tuple[int, ...], pieces: Sequence[_Piece]) -> TensorPlan:
    if len(pieces) == 1:
        piece = pieces[0]
        return TensorPlan(name, dtype, shape, piece.size, piece.state, piece.local_bytes, piece.same_as)
    size, local = sum(p.size for p in pieces), sum(p.local_bytes for p in pieces)
    states = {piece.state for piece in pieces}
    owners = ""
    if len(states) == 1:
        state, owners = pieces[0].state, ", ".join(sorted({piece.same_as for piece in pieces}))
    elif states == {State.LOCAL, State.SHARED}:
        state = State.LOCAL
    else:
        state = State.PARTLY if local else State.MISSING
    return TensorPlan(name, dtype, shape, size, state, local, owners)


def _sums(pieces: Iterable[_Piece]) -> dict[State, int]:
    sums = dict.fromkeys((State.LOCAL, State.SHARED, State.CLAIMED, State.CACHED, State.MISSING), 0)
    local = missing = 0
    for piece in pieces:
        size, here, state = piece.size, piece.local_bytes, piece.state
        if state is State.MISSING or state is State.PARTLY:
            local += here
            missing += size - here
        elif state is State.CACHED:
            local += here
            sums[state] += size - here
        else:
            sums[state] += size
    sums[State.LOCAL] += local
    sums[State.MISSING] = missing
    return sums
