"""The manifest of a view: tensors and files of other manifests under new names, self-contained. Pure.

Sources and spans are copied from the parents, so removing or updating one changes no byte of the view. Its
`model.safetensors` is a header of its own, then for each tensor a segment that already exists in a parent (or several:
a repeated layer costs nothing) or one that is calculated, in the official writer's order.
"""

import re
from collections.abc import Callable, Iterable, Sequence

import msgspec

from cakefs.errors import UserError
from cakefs.formats.safetensors import TensorSpec, build_header, canonical_key
from cakefs.model import (
    COMPUTED,
    Computed,
    Digest,
    Extent,
    File,
    Literal,
    Manifest,
    Segment,
    Source,
    Span,
    SpanKey,
    StackLayer,
    TensorInfo,
    View,
    all_leaves,
    leaves,
)

WEIGHTS = "model.safetensors"
CONFIG = "config.json"

PutLiteral = Callable[[bytes], Digest]
ReadSmall = Callable[[Manifest, str], bytes]
"""The bytes of a small file of a model's directory."""

DigestOf = Callable[[SpanKey], str | None]
"""What identifies the bytes of a span that is in the store; None for one that is not."""

Bytes = Extent | Computed

# What makes a directory of weights loadable, by name; weights, model cards and training state stay behind.
_BESIDE = re.compile(r"[^/]+\.(json|txt|model|jinja|py|tiktoken|vocab|bpe|spm)|(LICEN[CS]E|NOTICE|USE_POLICY)[^/]*")
_BEHIND = re.compile(
    r"config\.json|.*\.index(\..+)?\.json|(adapter_|trainer_|training_|optimizer).*|README.*|hashes\.json",
    re.IGNORECASE,
)
_BELOW = ("additional_chat_templates/",)


class Part(msgspec.Struct, frozen=True, gc=False):
    """A tensor of a manifest's `model.safetensors`; `data` counts in that manifest's spans."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Bytes


def parts_of(manifest: Manifest) -> dict[str, Part]:
    """The tensors of `model.safetensors` in the model's top directory, by name.

    Raises:
        UserError: There is no such file.
    """
    file = manifest.shown(View.MODEL).get(WEIGHTS)
    if file is None:
        raise UserError(f"{manifest.name} has no {WEIGHTS}", hint="only models in safetensors can be sliced and merged")
    if manifest.stack:
        data: Sequence[Segment] = file.segments[1:]
        pairs = zip(manifest.tensors, data, strict=True)
        return {t.name: Part(t.name, t.dtype, t.shape, s) for t, s in pairs if not isinstance(s, Literal)}
    spans = {e.span for e in all_leaves(file.segments)}
    return {
        t.name: Part(t.name, t.dtype, t.shape, tensor_data(manifest, t))
        for t in manifest.tensors
        if (t.span in spans if t.data is None else all(e.span in spans for e in leaves(t.data)))
    }


def tensor_data(manifest: Manifest, tensor: TensorInfo) -> Bytes:
    """What a tensor is made of that is of no view."""
    return tensor.data or Extent(tensor.span, 0, manifest.spans[tensor.span].size)


def donor_files(manifest: Manifest) -> list[File]:
    """Tokenizer, templates, code, licence: all that is no weight, config or model card."""
    return [
        file
        for path, file in manifest.shown(View.MODEL).items()
        if path.startswith(_BELOW) or (_BESIDE.fullmatch(path) and not _BEHIND.fullmatch(path))
    ]


class _Parent:
    """Counts the spans of one parent in the tables of a view: `(source, start, stop)` -> number."""

    def __init__(self, manifest: Manifest, sources: dict[Source, int], spans: dict[tuple[int, int, int], int]) -> None:
        self._manifest = manifest
        self._sources = sources
        self._spans = spans
        self._here: dict[int, int] = {}  # number there -> number here

    def take(self, data: Bytes) -> Bytes:
        if isinstance(data, Computed):
            inputs = tuple(map(self.take, data.inputs))
            return Computed(data.op, data.dtype, data.size, inputs, data.dtypes, data.params)
        number = self._here.get(data.span)
        return Extent(self._count(data.span) if number is None else number, data.start, data.stop)

    def _count(self, span: int) -> int:
        old = self._manifest.spans[span]
        source = self._sources.setdefault(self._manifest.sources[old.source], len(self._sources))
        number = self._here[span] = self._spans.setdefault((source, old.start, old.stop), len(self._spans))
        return number


class ViewBuilder:
    """Grows the tables of a view."""

    def __init__(self, put_literal: PutLiteral) -> None:
        self._put_literal = put_literal
        self._sources: dict[Source, int] = {}
        self._spans: dict[tuple[int, int, int], int] = {}
        self._parents: dict[int, _Parent] = {}  # by id of the manifest, which this keeps alive
        self._tensors: list[tuple[TensorSpec, Bytes]] = []
        self._files: dict[str, File] = {}
        self.metadata = {"format": "pt"}  # Of `model.safetensors`.

    def take(self, manifest: Manifest, data: Bytes) -> Bytes:
        """The same bytes, counted in the view's spans."""
        return self._parent(manifest).take(data)

    def _parent(self, manifest: Manifest) -> _Parent:
        if id(manifest) not in self._parents:
            self._parents[id(manifest)] = _Parent(manifest, self._sources, self._spans)
        return self._parents[id(manifest)]

    def add_tensor(self, name: str, dtype: str, shape: tuple[int, ...], data: Bytes) -> None:
        """`data` as `take` or a calculation over what it gave."""
        self._tensors.append((TensorSpec(name, dtype, shape), data))

    def add_parts(self, manifest: Manifest, parts: Iterable[tuple[str, Part]]) -> None:
        """Tensors of a parent as they are, under these names."""
        take = self._parent(manifest).take
        self._tensors += ((TensorSpec(name, p.dtype, p.shape), take(p.data)) for name, p in parts)

    def add_file(self, manifest: Manifest, file: File) -> None:
        take = self._parent(manifest).take
        segments = tuple(s if isinstance(s, Literal) else take(s) for s in file.segments)
        self._files[file.path] = File(file.path, file.size, View.MODEL, segments)

    def add_bytes(self, path: str, data: bytes) -> None:
        literal = Literal(self._put_literal(data), len(data))
        self._files[path] = File(path, len(data), View.MODEL, (literal,) if data else ())

    def build(self, name: str, origin: str, created: int, stack: Sequence[StackLayer]) -> Manifest:
        self._tensors.sort(key=lambda tensor: canonical_key(tensor[0]))
        header = build_header((spec for spec, _ in self._tensors), self.metadata, f"{WEIGHTS} of {name}")
        data = [segment for _, segment in self._tensors]
        segments: list[Segment] = [Literal(self._put_literal(header), len(header)), *data]
        weights = File(WEIGHTS, sum(s.size for s in segments), View.MODEL, tuple(segments))
        spans = tuple(Span(*key) for key in self._spans)
        whole = (s.span if isinstance(s, Extent) and s.size == spans[s.span].size else COMPUTED for s in data)
        pairs = zip((spec for spec, _ in self._tensors), whole, strict=True)
        tensors = tuple(TensorInfo(spec.name, spec.dtype, spec.shape, span) for spec, span in pairs)
        files = {**self._files, WEIGHTS: weights}
        return Manifest(
            name=name,
            origin=origin,
            revision="",
            requested="",
            created=created,
            sources=tuple(self._sources),
            spans=spans,
            tensors=tensors,
            files=tuple(files[path] for path in sorted(files)),
            stack=tuple(stack),
        )


def byte_keys(manifest: Manifest, data: Bytes, digest_of: DigestOf = lambda key: None) -> tuple[object, ...]:
    """Equal for two tensors only where their bytes are known to be equal without a look at them."""
    if isinstance(data, Extent):
        key = manifest.key(data.span)
        return digest_of(key) or key, data.start, data.stop
    inputs = (byte_keys(manifest, part, digest_of) for part in data.inputs)
    return data.op, data.dtype, data.params, data.dtypes, *inputs
