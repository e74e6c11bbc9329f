"""What models show, and how much of it is here: by upstream file and span, so that a thousand models take one scan of
what is stored.

What a model shows follows from its manifest, but to decode those of 1,000 models took 1.5 s of `ls`, and to read what
`Outline` keeps of them a tenth of that: so it is stored beside the manifest (`put_model`), and made from it where it is
missing.
"""

import sys
from array import array
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cached_property
from typing import NamedTuple, TypeAlias, TypeVar

import msgspec
from msgspec import Struct

from cakefs.model import File, Literal, Manifest, SpanKey, all_leaves
from cakefs.plan.derived import own_files
from cakefs.store.borrowing import Borrowing
from cakefs.store.models import ModelRecord
from cakefs.store.partial import local_size
from cakefs.store.store import Store

T = TypeVar("T")

Bounds = tuple[int, int]
"""Start and stop of a span."""
Column: TypeAlias = "array[int]"
"""Of u64."""


class Local:
    """What of which span is in the store, or in files that lend it, as of when this was made.

    Attributes:
        sealed: The digests of complete spans, by identity and bounds.
    """

    def __init__(self, store: Store, sealed: Mapping[str, Mapping[Bounds, str]]) -> None:
        lost = Borrowing(store).lost()
        if lost:
            sealed = {i: {b: d for b, d in spans.items() if d not in lost} for i, spans in sealed.items()}
        self.sealed = sealed
        self._started: dict[str, dict[Bounds, int]] = {}
        for key, _ in store.partials():
            if key[1:] not in sealed.get(key.identity, {}):
                self._started.setdefault(key.identity, {})[key[1:]] = local_size(store.partial_path, key)

    @classmethod
    def of_all(cls, store: Store) -> "Local":
        return cls(store, store.catalog.sealed())

    @classmethod
    def of_model(cls, store: Store, manifest: Manifest) -> "Local":
        return cls(store, {source.identity: store.catalog.spans(source.identity) for source in manifest.sources})

    def digest(self, key: SpanKey) -> str:
        """Of the blob; empty for a span that is not complete."""
        return self.sealed.get(key.identity, {}).get(key[1:], "")

    def size(self, key: SpanKey) -> int:
        return key.size if self.digest(key) else self.started(key.identity).get(key[1:], 0)

    def started(self, identity: str) -> Mapping[Bounds, int]:
        """Bytes of the spans of which only a part is here."""
        return self._started.get(identity, {})

    @cached_property
    def digests(self) -> dict[SpanKey, str]:
        """Of the blobs of all complete spans."""
        return {SpanKey(i, *bounds): digest for i, spans in self.sealed.items() for bounds, digest in spans.items()}


class Spans:
    """Spans of one upstream file and how many bytes of each are shown, as columns: rising by start, then stop.

    Attributes:
        total: Sum of the sizes.
    """

    def __init__(self, starts: Column, stops: Column, sizes: Column, total: int) -> None:
        self.starts, self.stops, self.sizes, self.total = starts, stops, sizes, total

    @classmethod
    def of(cls, sizes: Mapping[Bounds, int]) -> "Spans":
        rising = sorted(sizes)
        starts, stops = (array("Q", column) for column in zip(*rising, strict=True))
        return cls(starts, stops, array("Q", map(sizes.__getitem__, rising)), sum(sizes.values()))

    def among(self, known: Mapping[Bounds, T]) -> Iterator[tuple[int, Bounds, T]]:
        """Those of which something is known: the bytes shown, the bounds, and that."""
        starts, stops, sizes = self.starts, self.stops, self.sizes
        if 8 * len(known) > len(starts):
            for size, bounds in zip(sizes, zip(starts, stops, strict=True), strict=True):
                if (value := known.get(bounds)) is not None:
                    yield size, bounds, value
            return
        for bounds, value in known.items():  # Of a thousand models only the headers are here: these few are looked up.
            at = bisect_left(starts, bounds[0])
            while at < len(starts) and starts[at] == bounds[0]:
                if stops[at] == bounds[1]:
                    yield sizes[at], bounds, value
                at += 1


class Here(NamedTuple):
    """What is local of what a model shows.

    Attributes:
        bytes: A span that is shown several times counts as often; what is calculated, as much as of its inputs is here.
        complete: All is.
        blobs: How many bytes of which blob of a complete span are shown or calculated with.
        shown: Bytes that are made of spans; `needed` bytes are needed for them.
    """

    bytes: int
    complete: bool
    blobs: Mapping[str, int]
    shown: int
    needed: int

    def bytes_in(self, blobs: Collection[str]) -> int:
        """The part that is in these blobs, counted as in `bytes`."""
        stored = sum(size for digest, size in self.blobs.items() if digest in blobs) if blobs else 0
        return _as_shown(stored, self.shown, self.needed)


class Shown:
    """What a model's own files consist of.

    Attributes:
        size: Of the files, in bytes; `literal_bytes` of them are in no upstream file.
        spans: Bytes shown of each, by identity; of what is calculated, bytes that are needed.
        published: The identities among these of which a SHA-256 was published.
    """

    def __init__(self, size: int, literal_bytes: int, spans: Mapping[str, Spans], published: Collection[str]) -> None:
        self.size = size
        self.literal_bytes = literal_bytes
        self.spans = spans
        self.published = published

    @classmethod
    def of(cls, manifest: Manifest, files: Iterable[File] | None = None) -> "Shown":
        """Args: files: Only these."""
        shown: dict[int, int] = {}
        literal_bytes = size = 0
        for file in own_files(manifest).values() if files is None else files:
            size += file.size
            literal_bytes += sum(s.size for s in file.segments if isinstance(s, Literal))
            for extent in all_leaves(file.segments):
                if extent.stop > extent.start:  # An empty tensor is never stored.
                    shown[extent.span] = shown.get(extent.span, 0) + extent.stop - extent.start
        found: dict[str, dict[Bounds, int]] = {}
        for index, count in shown.items():
            span = manifest.spans[index]
            of_source = found.setdefault(manifest.sources[span.source].identity, {})
            bounds = span.start, span.stop
            of_source[bounds] = of_source.get(bounds, 0) + count  # Files with equal bytes have equal identities.
        published = {source.identity for source in manifest.sources if source.sha256}
        spans = {identity: Spans.of(one) for identity, one in found.items()}
        return cls(size, literal_bytes, spans, published & spans.keys())

    def here(self, local: Local) -> Here:
        """What of it is local."""
        blobs: dict[str, int] = {}
        sealed = started = needed = count = 0
        for identity, spans in self.spans.items():
            needed += spans.total
            count += len(spans.sizes)
            for size, _, digest in spans.among(local.sealed.get(identity, {})):
                blobs[digest] = blobs.get(digest, 0) + size
                sealed += 1
            for size, (start, stop), arrived in spans.among(local.started(identity)):
                started += min(size, arrived * -(-size // (stop - start)))
        shown, complete = self.size - self.literal_bytes, sealed == count
        here = shown if complete else _as_shown(sum(blobs.values()) + started, shown, needed)
        return Here(self.literal_bytes + here, complete, blobs, shown, needed)


class _Part(Struct, frozen=True, array_like=True):
    """`Spans` of one upstream file, u64 little-endian."""

    identity: str
    published: bool
    total: int
    starts: bytes
    stops: bytes
    sizes: bytes

    def spans(self) -> Spans:
        return Spans(_unpacked(self.starts), _unpacked(self.stops), _unpacked(self.sizes), self.total)


class Outline(Struct, frozen=True, array_like=True):
    """What a list of models has to say of one: a few fields of its manifest, and `Shown`."""

    name: str
    origin: str
    revision: str
    substituted: str
    size: int
    literal_bytes: int
    parts: tuple[_Part, ...]

    @classmethod
    def of(cls, manifest: Manifest, shown: Shown) -> "Outline":
        """Args: shown: By all its own files."""
        parts = (
            _Part(i, i in shown.published, spans.total, *map(_packed, (spans.starts, spans.stops, spans.sizes)))
            for i, spans in shown.spans.items()
        )
        head = manifest.name, manifest.origin, manifest.revision, manifest.substituted
        return cls(*head, shown.size, shown.literal_bytes, tuple(parts))

    def shown(self) -> Shown:
        spans = {part.identity: part.spans() for part in self.parts}
        return Shown(self.size, self.literal_bytes, spans, {part.identity for part in self.parts if part.published})


def put_model(store: Store, manifest: Manifest, shown: Shown, *, instead_of: str | None = None) -> str:
    """Shows a manifest under its name, as `Models.put`. Returns: the manifest's id, or nothing."""
    outline = msgspec.msgpack.encode(Outline.of(manifest, shown))
    return store.catalog.models.put(manifest, outline=outline, instead_of=instead_of)


def outlines(store: Store, records: Mapping[str, ModelRecord]) -> dict[str, Outline]:
    """Of models, by name. Raises CakeError for a manifest that is damaged."""
    known = store.catalog.models.outlines()
    return {name: _outline(store, record.manifest, known.get(record.manifest)) for name, record in records.items()}


def _outline(store: Store, manifest_id: str, known: bytes | None) -> Outline:
    if known is not None:
        try:
            return _DECODER.decode(known)
        except msgspec.DecodeError:  # of another version
            pass
    manifest = store.catalog.models.manifest(manifest_id)
    return Outline.of(manifest, Shown.of(manifest))


_DECODER = msgspec.msgpack.Decoder(Outline)


def _as_shown(stored: int, shown: int, needed: int) -> int:
    """For how many bytes of files so many bytes of what they are made of stand."""
    return stored if shown == needed else stored * shown // needed


def _packed(column: Column) -> bytes:
    return _swapped(column[:]).tobytes()


def _unpacked(data: bytes) -> Column:
    return _swapped(array("Q", data))


def _swapped(column: Column) -> Column:
    if sys.byteorder == "big":
        column.byteswap()
    return column
