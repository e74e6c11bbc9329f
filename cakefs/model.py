"""The values that all layers share: frozen, checked on construction, without I/O.

A *listing* is what a remote says one model consists of. A *manifest* describes the model as it is shown: the upstream
files (*sources*), the pieces of them that are stored and fetched as one (*spans*: a tensor, a header, a whole small or
opaque file), the named *tensors*, and the *files* shown, each a gap-free list of *segments*. Spans are half-open;
HTTP's inclusive form exists only in `remotes/http.py`.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from typing import Annotated, NamedTuple, TypeVar

import msgspec
from msgspec import Meta, Raw, Struct

from cakefs.errors import InvalidFormat

T = TypeVar("T")

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

# Unit of fetching, of the bitmap and of the first-touch check; never an identity. 1 MiB is the largest FUSE request.
CHUNK = MIB
# Blobs up to this size live inside LMDB: a norm or a bias is not worth a file and two fsyncs.
INLINE_LIMIT = 4 * KIB
# Files up to this size are fetched when a model is added; larger ones when they are read.
SMALL_FILE_LIMIT = MIB

Digest = Annotated[str, Meta(pattern=r"^[a-z0-9]+:[0-9a-f]+(-[0-9]+)?$")]
"""Identity of bytes, `algorithm:hex`. In the store: `xxh3:<32 hex>`, with `-N` for the N-th other blob of the same
hash."""


class ByteRange(NamedTuple):
    """Half-open `[start, stop)`, in bytes."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class SpanKey(NamedTuple):
    """Names stored or wanted bytes across models: which content, which part of it."""

    identity: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        """As messages and logs have it."""
        return f"bytes {self.start}-{self.stop} of {without_query(self.identity)}"


class Locator(Struct, frozen=True, array_like=True):
    """Where an upstream file lives before we have it.

    Attributes:
        url: Pinned to a commit where the server has such; redirects are followed at fetch time.
        size: Of the whole upstream file, in bytes; every answer is checked against it.
        validator: Strong ETag that the bytes must come with, or `modified ` and the Last-Modified date, or of a `file:`
            URL `mtime ` and nanoseconds; empty when the URL itself is immutable.
    """

    url: str
    size: int
    validator: str = ""


_QUERY = re.compile(r'\?.*?(?=\|"[^"]+"$|\|\d+\|[^|]*$|$)')


def without_query(text: str) -> str:
    """A URL, or an identity that has one in it, as others may see it: its query may be a signature."""
    return _QUERY.sub("", text, count=1)


class Source(Struct, frozen=True, array_like=True):
    """One upstream file.

    Attributes:
        path: As published, `/`-separated, relative to the repository.
        identity: What names its content: `sha256:…` (LFS), `xet:…`, `git:…` (blob id), else `etag:URL|ETAG`, else
            `url:URL|SIZE|DATE`.
        locator: Where to fetch it.
        sha256: Published SHA-256 of the whole file in hex, or empty; confirmed once every byte is local.
    """

    path: str
    identity: str
    locator: Locator
    sha256: str = ""


class Published(Struct, frozen=True):
    """One file as a `Listing` tells it, before anything of it is here.

    Attributes:
        path: `/`-separated, relative to the repository.
        size: In bytes, exact.
        identity: As in `Source`.
        url: Pinned to the listing's revision where the server has such.
        sha256: Published SHA-256 of the whole file in hex, or empty.
        validator: As in `Locator`.
    """

    path: str
    size: int
    identity: str
    url: str
    sha256: str = ""
    validator: str = ""

    def source(self) -> Source:
        return Source(self.path, self.identity, Locator(self.url, self.size, self.validator), self.sha256)


class Listing(Struct, frozen=True):
    """What a remote says one model consists of; `origin`, `revision`, `requested` and `whole` as in `Manifest`."""

    origin: str
    revision: str
    requested: str
    files: tuple[Published, ...]
    whole: bool = True


class Span(Struct, frozen=True, array_like=True, gc=False):
    """Half-open `[start, stop)` of `sources[source]`: the unit that is stored, fetched and shared."""

    source: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


COMPUTED = -1
"""As `TensorInfo.span`: the bytes are no span but calculated on read."""


class Literal(Struct, frozen=True, array_like=True, tag="L"):
    """Bytes that no upstream file has: a synthesized header. `blob` is in the store, `size` bytes long."""

    blob: Digest
    size: int


class Extent(Struct, frozen=True, array_like=True, tag="E", gc=False):
    """Bytes `[start, stop)` *within* `spans[span]`; the whole span in every file that only concatenates."""

    span: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class Computed(Struct, frozen=True, array_like=True, tag="C"):
    """Elements calculated on read, each from those at its place in the inputs (`plan/compute.py` says how).

    Attributes:
        op: `cast`, `scale`, `add`, `linear` or `task_arithmetic`; `interleave` and `gather` take
            them from elsewhere in their input.
        dtype: Of the result, whose elements fill `size` bytes.
        inputs: All with as many elements as the result, but that of `gather`.
        dtypes: Of the inputs, one each.
        params: Numbers that the operation takes.
    """

    op: str
    dtype: str
    size: int
    inputs: tuple["Extent | Computed", ...]
    dtypes: tuple[str, ...]
    params: tuple[float, ...] = ()


Segment = Literal | Extent | Computed


class TensorInfo(Struct, frozen=True, array_like=True, gc=False):
    """A named tensor: dtype as safetensors spells it, or ggml one of a GGUF file, shape in elements.

    In a view (`Manifest.stack`) the tensors are those of its `model.safetensors`, in the order of its segments behind
    the header, several may share a span, and `span` is COMPUTED where the segment is.

    Attributes:
        span: `spans[span]` is its bytes (in a GGUF file with the padding behind it); COMPUTED where no span is.
        data: What it is made of where no span is and it is of no view: a tensor of a torch checkpoint may be a part of
            a storage, or scattered over it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    span: int
    data: "Extent | Computed | None" = None


class View(StrEnum):
    """Under which directory a file is shown."""

    BOTH = "both"
    MODEL = "model"  # org/name/
    ORIGINAL = "original"  # .cakefs/original/org/name/


class File(Struct, frozen=True, array_like=True):
    """One file shown: `segments` follow each other without gap and add up to `size`."""

    path: str
    size: int
    view: View
    segments: tuple[Segment, ...]


class LayerOrigin(Struct, frozen=True, array_like=True):
    """A layer of a published model, as `stack` names it."""

    model: str
    layer: int
    revision: str = ""


class StackLayer(Struct, frozen=True, array_like=True):
    """Layer `layer` of a view: made of one origin, or calculated from several as `note` says."""

    layer: int
    origins: tuple[LayerOrigin, ...]
    note: str = ""


class Manifest(Struct, frozen=True, array_like=True):
    """Stored description of one model at one revision. Immutable: an update is another manifest.

    Attributes:
        name: What it is shown as, such as `org/name`, `org/name@rev` or `my-view`.
        origin: Where it came from, such as `https://huggingface.co/org/name`.
        revision: Commit hash the URLs are pinned to; empty where the server has none.
        requested: Revision as the user wrote it, such as `main`.
        created: Unix seconds; also the mtime of every file shown.
        stack: Of a slice or merge, where each of its layers comes from; empty for what was published.
        whole: Nothing was published at the revision that is not here; false for what was found in an incomplete cache.
        substituted: Which tensors are near-equal ones of another model, in words; empty where none are.
    """

    name: str
    origin: str
    revision: str
    requested: str
    created: int
    sources: tuple[Source, ...]
    spans: tuple[Span, ...]
    tensors: tuple[TensorInfo, ...]
    files: tuple[File, ...]
    stack: tuple[StackLayer, ...] = ()
    substituted: str = ""
    whole: bool = True

    def __post_init__(self) -> None:
        check_manifest(self)

    def key(self, span: int) -> SpanKey:
        """The name of `spans[span]` across models."""
        s = self.spans[span]
        return SpanKey(self.sources[s.source].identity, s.start, s.stop)

    def shown(self, view: View) -> dict[str, File]:
        """Files of the model directory or of its original, by path."""
        return {f.path: f for f in self.files if f.view in (View.BOTH, view)}


class ManifestHead(Struct, frozen=True, array_like=True):
    """A `Manifest` of which only the small fields are decoded: where it, and each layer of a view, came from."""

    name: str
    origin: str
    revision: str
    requested: str
    created: int
    sources: tuple[Source, ...]
    spans: Raw = Raw()
    tensors: Raw = Raw()
    files: Raw = Raw()
    stack: tuple[StackLayer, ...] = ()
    substituted: str = ""
    whole: bool = True


def check_manifest(m: Manifest) -> None:
    """Raises InvalidFormat where indices dangle, spans leave their source, or segments do not add up."""
    sizes = [source.locator.size for source in m.sources]
    for span in m.spans:
        if not (0 <= span.source < len(sizes) and 0 <= span.start <= span.stop):
            raise InvalidFormat(f"manifest of {m.name}: bad span {span}")
        if span.stop > sizes[span.source]:
            raise InvalidFormat(f"manifest of {m.name}: span past the end of {m.sources[span.source].path}")
    count = len(m.spans)
    for tensor in m.tensors:
        if not COMPUTED <= tensor.span < count:
            raise InvalidFormat(f"manifest of {m.name}: tensor {tensor.name} has no span")
        if tensor.data is not None:
            _check_extents(m, [tensor.data], f"tensor {tensor.name}")
    for file in m.files:
        check_file(m, file)


def check_file(m: Manifest, file: File) -> None:
    if not is_safe_path(file.path):
        raise InvalidFormat(f"manifest of {m.name}: unsafe path {file.path!r}")
    if sum(s.size for s in file.segments) != file.size:
        raise InvalidFormat(f"manifest of {m.name}: segments of {file.path} do not add up to {file.size}")
    _check_extents(m, file.segments, file.path)


def _check_extents(m: Manifest, segments: Iterable[Segment], where: str) -> None:
    spans, count = m.spans, len(m.spans)
    for s in all_leaves(segments):
        span = spans[s.span] if 0 <= s.span < count else None
        if span is None or not 0 <= s.start <= s.stop <= span.stop - span.start:
            raise InvalidFormat(f"manifest of {m.name}: bad extent in {where}")


def leaves(segment: Segment) -> Sequence[Extent]:
    """The stored bytes that a segment is made of, in the order in which a calculation takes them."""
    if isinstance(segment, Extent):
        return (segment,)
    if isinstance(segment, Computed):
        return [leaf for part in segment.inputs for leaf in leaves(part)]
    return ()


def all_leaves(segments: Iterable[Segment]) -> Iterator[Extent]:
    """Of each of them in turn."""
    for segment in segments:
        if isinstance(segment, Extent):
            yield segment
        else:
            yield from leaves(segment)


def is_safe_path(path: str) -> bool:
    """True for a relative `/`-separated path that stays below its directory and can be a file name everywhere."""
    try:
        encoded = path.encode()
    except UnicodeEncodeError:  # a lone surrogate, as JSON and file names that are no UTF-8 bring in
        return False
    parts = encoded.split(b"/")
    return (
        len(encoded) < 4096
        and b"\0" not in encoded
        and all(part not in (b"", b".", b"..") and len(part) < 256 for part in parts)
    )


def encode_manifest(manifest: Manifest) -> bytes:
    return msgspec.msgpack.encode(manifest)


def decode_manifest(data: bytes | memoryview) -> Manifest:
    """Raises InvalidFormat on bytes that are no manifest."""
    return _decode(data, Manifest)


def decode_head(data: bytes | memoryview) -> ManifestHead:
    """Of an encoded manifest. Raises InvalidFormat."""
    return _decode(data, ManifestHead)


def _decode(data: bytes | memoryview, kind: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise InvalidFormat(f"not a manifest: {error}") from error
