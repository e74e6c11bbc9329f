"""Published files and their headers -> the manifest of one model. Pure.

Spans are made once per published file (header and tensors of a safetensors file, the whole of any other), in file
order; every file shown is then a list of extents of them. A merged file adds one literal, its header: exactly what the
official writer would emit for the union of the indexed tensors, so that one SHA-256 proves it.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from cakefs.errors import InvalidFormat
from cakefs.formats.safetensors import Header, TensorEntry, build_header, canonical_key
from cakefs.formats.sharded import Index
from cakefs.formats.strictjson import brief
from cakefs.model import (
    Digest,
    Extent,
    File,
    Listing,
    Literal,
    Manifest,
    Published,
    Segment,
    Span,
    TensorInfo,
)
from cakefs.plan.present import Shown, arrange, is_safetensors, shard_path


def build_manifest(
    name: str,
    listing: Listing,
    headers: Mapping[str, Header],
    indexes: Mapping[str, Index],
    created: int,
    put_literal: Callable[[bytes], Digest],
) -> Manifest:
    """Raises InvalidFormat, naming the file, where the published files contradict each other.

    Args:
        headers: Of every published file for which `is_safetensors` holds, by path.
        indexes: Of every path in `wanted_indexes`.
        put_literal: Stores the header of a merged file.
    """
    builder = _Builder(headers)
    published = sorted(listing.files, key=lambda p: p.path)
    paths = [p.path for p in published]
    for path, following in pairwise(paths):
        if path == following:
            raise InvalidFormat(f"listing of {name}: {brief(path)} is there twice")
    shown = arrange(paths, indexes)
    for source, file in enumerate(published):
        builder.add(source, file)
    files = [builder.merged(s, indexes[s.origin], put_literal) if s.merged else builder.verbatim(s) for s in shown]
    return Manifest(
        name=name,
        origin=listing.origin,
        revision=listing.revision,
        requested=listing.requested,
        created=created,
        sources=tuple(p.source() for p in published),
        spans=tuple(builder.spans),
        tensors=tuple(builder.tensors),
        files=tuple(files),
    )


def merged_metadata(shards: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """`format: pt` when all shards say it, else what all of them say, else `format: pt` unless one says otherwise."""
    formats = {metadata.get("format") for metadata in shards}
    if formats == {"pt"}:
        return {"format": "pt"}
    common = set.intersection(*(set(metadata.items()) for metadata in shards)) if shards else set()
    if common:
        return dict(sorted(common))
    return {"format": "pt"} if formats <= {"pt", None} else {}


class _Builder:
    """Grows the tables of the manifest."""

    def __init__(self, headers: Mapping[str, Header]) -> None:
        self.spans: list[Span] = []
        self.tensors: list[TensorInfo] = []
        self._headers = headers
        self._extents: dict[str, tuple[Extent, ...]] = {}  # published path -> its bytes

    def add(self, source: int, file: Published) -> None:
        """Makes the spans and tensors of one published file."""
        header = self._headers[file.path] if is_safetensors(file.path) else None
        if header is None:
            self._extents[file.path] = (self._span(source, 0, file.size),) if file.size else ()
            return
        extents = [self._span(source, 0, header.size)]
        for entry in header.entries:
            extent = self._span(source, header.size + entry.start, header.size + entry.stop)
            self.tensors.append(TensorInfo(entry.name, entry.dtype, entry.shape, extent.span))
            extents.append(extent)
        self._extents[file.path] = tuple(extents)

    def _span(self, source: int, start: int, stop: int) -> Extent:
        self.spans.append(Span(source, start, stop))
        return Extent(len(self.spans) - 1, 0, stop - start)

    def verbatim(self, shown: Shown) -> File:
        extents = self._extents[shown.origin]
        return File(shown.path, sum(e.size for e in extents), shown.view, extents)

    def merged(self, shown: Shown, index: Index, put_literal: Callable[[bytes], Digest]) -> File:
        """One file of the indexed tensors of all shards."""
        shards = {shard: shard_path(shown.origin, shard) for shard in sorted(set(index.weight_map.values()))}
        for path in shards.values():
            if path not in self._headers:
                raise InvalidFormat(f"index {shown.origin}: shard {brief(path)} is not a published safetensors file")
        found = self._indexed(shown.origin, index, shards)
        found.sort(key=lambda pair: canonical_key(pair[0]))
        metadata = merged_metadata([self._headers[path].metadata for path in shards.values()])
        header = build_header((entry[:3] for entry, _ in found), metadata, shown.path)
        segments: list[Segment] = [Literal(put_literal(header), len(header))]
        segments.extend(extent for _, extent in found)
        size = len(header) + sum(entry.size for entry, _ in found)
        return File(shown.path, size, shown.view, tuple(segments))

    def _indexed(self, origin: str, index: Index, shards: Mapping[str, str]) -> list[tuple[TensorEntry, Extent]]:
        """Every indexed tensor, from the shard that the index names for it."""
        found = [
            (entry, extent)
            for shard, path in shards.items()
            for entry, extent in zip(self._headers[path].entries, self._extents[path][1:], strict=True)
            if index.weight_map.get(entry.name) == shard
        ]
        if len(found) < len(index.weight_map):
            names = {entry.name for entry, _ in found}
            name, shard = next((n, s) for n, s in index.weight_map.items() if n not in names)
            raise InvalidFormat(f"index {origin}: tensor {brief(name)} is not in {shards[shard]}")
        return found
