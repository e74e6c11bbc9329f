"""Published files and their headers -> the manifest of one model. Pure.

Spans are made once per published file (header and tensors of a safetensors or GGUF file, storages of a torch
checkpoint, the whole of any other), in file order; every file shown is then a list of extents of them. A merged file
adds one literal, its header: exactly what the official writer would emit for the union of the indexed tensors, so that
one SHA-256 proves it.

What cannot be put together of files that are not the model's own safetensors (a split GGUF, a torch checkpoint) is a
warning, and left out.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from itertools import pairwise

from cakefs.errors import InvalidFormat
from cakefs.formats import gguf, safetensors
from cakefs.formats.safetensors import TensorEntry, build_header, canonical_key
from cakefs.formats.sharded import Index
from cakefs.formats.strictjson import brief
from cakefs.formats.torchckpt import Checkpoint
from cakefs.model import (
    ByteRange,
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
    View,
)
from cakefs.plan import gguf_compose, torch_compose
from cakefs.plan.present import Shown, arrange, shard_path, wanted_checkpoints

Header = safetensors.Header | gguf.Header | Checkpoint
PutLiteral = Callable[[bytes], Digest]
Warn = Callable[[str], None]


def _silent(warning: str) -> None:
    pass


def build_manifest(
    name: str,
    listing: Listing,
    headers: Mapping[str, Header],
    indexes: Mapping[str, Index],
    created: int,
    put_literal: PutLiteral,
    warn: Warn = _silent,
) -> Manifest:
    """Raises InvalidFormat, naming the file, where the published files contradict each other.

    Args:
        headers: Of the published files that have one, by path; a file without is shown as it is, as one piece.
        indexes: Of every path in `wanted_indexes`, and those of `wanted_checkpoints` that could be read.
        put_literal: Stores the header of a merged file.
    """
    builder = _Builder(headers, put_literal)
    published = sorted(listing.files, key=lambda p: p.path)
    paths = [p.path for p in published]
    for path, following in pairwise(paths):
        if path == following:
            raise InvalidFormat(f"listing of {name}: {brief(path)} is there twice")
    for source, file in enumerate(published):
        builder.add(source, file)
    converted = builder.converted(wanted_checkpoints(paths), indexes, warn)
    shown = arrange(paths, indexes, converted)
    files = [
        builder.verbatim(s) if not s.merged else converted.get(s.path) or builder.merged(s, indexes[s.origin])
        for s in shown
    ]
    files += builder.merged_splits(paths, {f.path for f in files}, warn)
    files.sort(key=lambda f: f.path)
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
        whole=listing.whole,
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

    def __init__(self, headers: Mapping[str, Header], put_literal: PutLiteral) -> None:
        self.spans: list[Span] = []
        self.tensors: list[TensorInfo] = []
        self._headers = headers
        self._put_literal = put_literal
        self._extents: dict[str, tuple[Extent, ...]] = {}  # published path -> its bytes
        self._checkpoints: dict[str, torch_compose.StoredCheckpoint] = {}

    def add(self, source: int, file: Published) -> None:
        """Makes the spans and tensors of one published file."""
        header = self._headers.get(file.path)
        if isinstance(header, safetensors.Header):
            self._extents[file.path] = tuple(self._add_safetensors(source, header))
        elif header is None:
            self._extents[file.path] = (self._span(source, 0, file.size),) if file.size else ()
        else:
            self._add_pieces(source, file, header)

    def _add_safetensors(self, source: int, header: safetensors.Header) -> list[Extent]:
        extents = [self._span(source, 0, header.size)]
        for entry in header.entries:
            extent = self._span(source, header.size + entry.start, header.size + entry.stop)
            self.tensors.append(TensorInfo(entry.name, entry.dtype, entry.shape, extent.span))
            extents.append(extent)
        return extents

    def _add_pieces(self, source: int, file: Published, header: gguf.Header | Checkpoint) -> None:
        pieces = piece_ranges(header, file.size)
        self._extents[file.path] = tuple(self._span(source, *piece) for piece in pieces)
        if isinstance(header, Checkpoint):
            first = len(self.spans) - len(pieces)
            self._checkpoints[file.path] = torch_compose.StoredCheckpoint(file.path, header, pieces, first)
            return
        for tensor, extent in zip(header.tensors, self._tensors_of(file.path, header), strict=True):
            self.tensors.append(TensorInfo(tensor.name, tensor.dtype, tensor.shape, extent.span))

    def _tensors_of(self, path: str, header: gguf.Header) -> Sequence[Extent]:
        first = len(gguf_compose.header_ranges(header))
        return self._extents[path][first : first + len(header.tensors)]

    def _span(self, source: int, start: int, stop: int) -> Extent:
        self.spans.append(Span(source, start, stop))
        return Extent(len(self.spans) - 1, 0, stop - start)

    def verbatim(self, shown: Shown) -> File:
        extents = self._extents[shown.origin]
        return File(shown.path, sum(e.size for e in extents), shown.view, extents)

    def merged(self, shown: Shown, index: Index) -> File:
        """One file of the indexed tensors of all shards."""
        shards = {shard: shard_path(shown.origin, shard) for shard in sorted(set(index.weight_map.values()))}
        headers: dict[str, safetensors.Header] = {}
        for path in shards.values():
            shard = self._headers.get(path)
            if not isinstance(shard, safetensors.Header):
                raise InvalidFormat(f"index {shown.origin}: shard {brief(path)} is not a published safetensors file")
            headers[path] = shard
        found = self._indexed(shown.origin, index, shards, headers)
        found.sort(key=lambda pair: canonical_key(pair[0]))
        metadata = merged_metadata([shard.metadata for shard in headers.values()])
        header = build_header((entry for entry, _ in found), metadata, shown.path)
        segments: list[Segment] = [Literal(self._put_literal(header), len(header))]
        segments.extend(extent for _, extent in found)
        size = len(header) + sum(entry.size for entry, _ in found)
        return File(shown.path, size, shown.view, tuple(segments))

    def _indexed(
        self, origin: str, index: Index, shards: Mapping[str, str], headers: Mapping[str, safetensors.Header]
    ) -> list[tuple[TensorEntry, Extent]]:
        """Every indexed tensor, from the shard that the index names for it."""
        found = [
            (entry, extent)
            for shard, path in shards.items()
            for entry, extent in zip(headers[path].entries, self._extents[path][1:], strict=True)
            if index.weight_map.get(entry.name) == shard
        ]
        if len(found) < len(index.weight_map):
            names = {entry.name for entry, _ in found}
            name, shard = next((n, s) for n, s in index.weight_map.items() if n not in names)
            raise InvalidFormat(f"index {origin}: tensor {brief(name)} is not in {shards[shard]}")
        return found

    def converted(self, wanted: Mapping[str, str], indexes: Mapping[str, Index], warn: Warn) -> dict[str, File]:
        """The safetensors files of torch checkpoints that can be made, by path.

        Args:
            wanted: As `wanted_checkpoints` has them; those that could not be read were warned of.
        """
        files: dict[str, File] = {}
        for target, origin in wanted.items():
            weight_map = None
            if origin in indexes:
                weight_map = {name: shard_path(origin, s) for name, s in indexes[origin].weight_map.items()}
            elif origin not in self._checkpoints:
                continue
            try:
                views = torch_compose.chosen_views(origin, weight_map, self._checkpoints)
                files[target], tensors = torch_compose.converted_file(target, views, self._put_literal)
                self.tensors += tensors
            except InvalidFormat as error:
                warn(f"{origin} is shown under .cakefs/original only: {error.message}")
        return files

    def merged_splits(self, paths: Sequence[str], shown: Container[str], warn: Warn) -> list[File]:
        """The files that splits of a GGUF come from, beside their parts."""
        files: list[File] = []
        for target, parts in gguf_compose.split_sets(paths).items():
            headers = {path: h for path in parts if isinstance(h := self._headers.get(path), gguf.Header)}
            if len(headers) < len(parts) or target in shown:
                continue
            try:
                found = [gguf_compose.Part(h, self._tensors_of(path, h)) for path, h in headers.items()]
                files.append(gguf_compose.merged_file(target, found, View.MODEL, self._put_literal))
            except InvalidFormat as error:
                warn(f"the parts of {target} are shown, but not merged: {error.message}")
        return files


def piece_ranges(header: gguf.Header | Checkpoint, file_size: int) -> list[ByteRange]:
    """What a published file is stored as, without gap."""
    if isinstance(header, Checkpoint):
        return torch_compose.piece_ranges(header, file_size)
    return gguf_compose.piece_ranges(header, file_size)
