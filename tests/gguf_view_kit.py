"""The GGUF form of a directory of files, built without a store: what `add` would show, as bytes."""

from collections.abc import Mapping
from typing import NamedTuple

from cakefs.formats.safetensors import header_size, parse_header
from cakefs.model import Digest, Extent, File, Listing, Literal, Manifest, Published, View
from cakefs.plan import compute
from cakefs.plan.compose import build_manifest
from cakefs.plan.ggufview.build import Outcome, with_gguf


class Literals:
    """What is put into the store, by a digest of its own."""

    def __init__(self) -> None:
        self.data: dict[bytes, Digest] = {}

    def __call__(self, data: bytes) -> Digest:
        return self.data.setdefault(data, f"test:{len(self.data):x}")

    def get(self, digest: Digest) -> bytes:
        return next(data for data, known in self.data.items() if known == digest)


class Shelf(NamedTuple):
    """A model made of files, with the literals that its manifest names."""

    files: Mapping[str, bytes]
    outcome: Outcome
    literals: Literals

    @property
    def refused(self) -> str:
        return self.outcome.refused

    @property
    def file(self) -> File:
        return self.outcome.manifest.shown(View.MODEL)["model.gguf"]

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes of model.gguf."""
        out, at = [], 0
        for segment in self.file.segments:
            first, last = max(start - at, 0), min((self.file.size if stop is None else stop) - at, segment.size)
            at += segment.size
            if first >= last:
                continue
            if isinstance(segment, Literal):
                out.append(self.literals.get(segment.blob)[first:last])
            elif isinstance(segment, Extent):
                out.append(self._span(segment.span, segment.start + first, segment.start + last))
            else:
                needs = compute.needs(segment, first, last)
                inputs = [self._span(need.extent.span, need.start, need.stop) for need in needs]
                out.append(compute.evaluate(segment, first, last, inputs))
        return b"".join(out)

    def _span(self, span: int, start: int, stop: int) -> bytes:
        manifest = self.outcome.manifest
        found = manifest.spans[span]
        return self.files[manifest.sources[found.source].path][found.start + start : found.start + stop]


def shelve(name: str, files: Mapping[str, bytes]) -> Shelf:
    literals = Literals()
    manifest = manifest_of(name, files, literals)
    return Shelf(files, with_gguf(manifest, lambda _, path: files[path], literals), literals)


def manifest_of(name: str, files: Mapping[str, bytes], literals: Literals) -> Manifest:
    published = tuple(Published(path, len(data), f"id:{path}", f"u/{path}") for path, data in files.items())
    heads = {
        path: parse_header(data[: header_size(data[:8], path)], len(data), path)
        for path, data in files.items()
        if path.endswith(".safetensors")
    }
    return build_manifest(f"org/{name}", Listing("o", "r", "main", published), heads, {}, 1, literals)
