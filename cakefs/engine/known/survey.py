"""What is in a store: models, their files, tensors and sources, and how much of each is local and shared. Only reads.

Imports nothing of the network, so that `cakefs ls` is quick. Over many models everything is read by few scans: one of
the spans, one of the partials, one of the manifests.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from cakefs.engine.known.shown import Local, Shown, outlines
from cakefs.errors import UserError
from cakefs.model import COMPUTED, File, Manifest, TensorInfo, View, leaves, without_query
from cakefs.plan.requests import ChunkRef, span_chunks
from cakefs.plan.view import Bytes, parts_of, tensor_data
from cakefs.store.borrowing import Borrowing
from cakefs.store.layout import check_vacant
from cakefs.store.models import ModelRecord
from cakefs.store.store import Store


class ModelSummary(NamedTuple):
    """Attributes:
    added: Unix seconds.
    size: Bytes of the files in the model's directory; `local_bytes` of them are in the store.
    shared_bytes: The part of `local_bytes` whose blobs other models refer to as well.
    borrowed_bytes: The part of `local_bytes` that lies in files of somebody else.
    complete: Everything is local.
    verified: And every upstream file with a published SHA-256 was found to have it; there is at least one.
    substituted: As in `Manifest`; such a model is never verified.
    pinned: No limit and no `evict` takes its bytes.
    """

    name: str
    origin: str
    revision: str
    added: int
    size: int
    local_bytes: int
    shared_bytes: int
    complete: bool
    verified: bool
    borrowed_bytes: int = 0
    substituted: str = ""
    pinned: bool = False

    @property
    def state(self) -> str:
        """The one word for it; two where it is not what was published."""
        if self.verified:
            return "verified"
        here = "complete" if self.complete else f"{100 * self.local_bytes // max(1, self.size)} %"
        return f"{here}, substituted" if self.substituted else here


class FileSummary(NamedTuple):
    """A file shown; `view` says where."""

    path: str
    view: str
    size: int
    local_bytes: int

    @property
    def in_model(self) -> bool:
        """In the model's directory, not only among the originals."""
        return self.view != View.ORIGINAL


class SourceSummary(NamedTuple):
    """An upstream file.

    Attributes:
        verified: None while its SHA-256 was not computed here.
        dtypes: How many tensors of each type it has, the most frequent first.
    """

    path: str
    url: str
    identity: str
    size: int
    sha256: str
    verified: bool | None
    dtypes: dict[str, int]


class TensorSummary(NamedTuple):
    """A tensor.

    Attributes:
        digest: Of its blob; empty unless all of it is local, and for one that is no blob by itself.
        source: The upstream file that it is in, or the first of several.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    local_bytes: int
    digest: str
    source: str


class StoreSummary(NamedTuple):
    """Attributes:
    borrowed_bytes: In files of somebody else, and not counted in `blob_bytes`.
    limit: Bytes that it may take; 0 for no limit.
    """

    models: int
    blobs: int
    blob_bytes: int
    partial_bytes: int
    borrowed_bytes: int = 0
    limit: int = 0


def open_store(path: Path) -> Store:
    """Raises UserError when there is none: looking at a store does not make one."""
    return Store.open(path, create=False)


def find_model(store: Store, name: str) -> Manifest:
    """The manifest a name stands for. Raises UserError."""
    require_models(store, [name])
    return store.catalog.models.manifest(store.catalog.models.all()[name].manifest)


def require_models(store: Store, names: Iterable[str]) -> None:
    """Raises UserError for a name that stands for nothing here."""
    known = store.catalog.models.all()
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            brings = f"`cakefs add {name}` brings it" if "/" in name else "`cakefs add` brings more"
            hint = f"did you mean {near[0]}? Else {brings}" if near else f"`cakefs ls` says what there is, {brings}"
            raise UserError(f"no model {name!r} here", hint=hint)


def missing_chunks(store: Store, manifest: Manifest, span: int) -> list[ChunkRef]:
    """What of a span is not in the store yet."""
    key = manifest.key(span)
    if store.has(key):
        return []
    content = store.content(key)
    if content is None:
        return list(span_chunks(span, 0, key.size))
    return [ChunkRef(span, chunk) for chunk in content.missing(0, key.size)]


def summarize_store(path: Path) -> StoreSummary:
    """All zero where there is no store yet."""
    if not _exists(path):
        return StoreSummary(0, 0, 0, 0)
    with open_store(path) as store:
        usage = store.usage()
        borrowed = Borrowing(store).bytes()
        models, limit = len(store.catalog.models.all()), store.catalog.numbers.limit()
        return StoreSummary(models, usage.blob_count, usage.blob_bytes, usage.partial_bytes, borrowed, limit)


def summarize_models(path: Path) -> list[ModelSummary]:
    """All models by name; none where there is no store yet."""
    if not _exists(path):
        return []
    with open_store(path) as store:
        return summarize(store, store.catalog.models.all(), Local.of_all(store))


def summarize(store: Store, records: Mapping[str, ModelRecord], local: Local) -> list[ModelSummary]:
    """Models by name; sharing counts among these."""
    models = [outlined for _, outlined in sorted(outlines(store, records).items())]
    shown = [model.shown() for model in models]
    found = [one.here(local) for one in shown]
    users = Counter(digest for here in found for digest in here.blobs)
    shared = {digest for digest, times in users.items() if times > 1}
    confirmed, borrowed = _Confirmations(store), store.catalog.borrowed.digests()
    return [
        ModelSummary(
            model.name,
            model.origin,
            model.revision,
            records[model.name].added,
            size=one.size,
            local_bytes=here.bytes,
            shared_bytes=here.bytes_in(shared),
            complete=here.complete,
            verified=here.complete and not model.substituted and confirmed.all_of(one.published),
            borrowed_bytes=here.bytes_in(borrowed),
            substituted=model.substituted,
            pinned=records[model.name].pinned,
        )
        for model, one, here in zip(models, shown, found, strict=True)
    ]


def summarize_files(manifest: Manifest, local: Local) -> list[FileSummary]:
    def summary(file: File) -> FileSummary:
        return FileSummary(file.path, file.view, file.size, Shown.of(manifest, [file]).here(local).bytes)

    return [summary(file) for file in sorted(manifest.files, key=lambda f: (f.view == View.ORIGINAL, f.path))]


def summarize_sources(store: Store, manifest: Manifest) -> list[SourceSummary]:
    confirmed = _Confirmations(store)
    dtypes: dict[str, Counter[str]] = {source.path: Counter() for source in manifest.sources}
    for tensor, data in _tensors(manifest):
        dtypes[_source(manifest, data)][tensor.dtype] += 1
    return [
        SourceSummary(
            s.path,
            without_query(s.locator.url),
            without_query(s.identity),
            s.locator.size,
            s.sha256,
            confirmed.of(s.identity),
            dict(dtypes[s.path].most_common()),
        )
        for s in manifest.sources
    ]


def summarize_tensors(manifest: Manifest, local: Local) -> list[TensorSummary]:
    """In the order of the manifest."""
    found = []
    for tensor, data in _tensors(manifest):
        source = _source(manifest, data)
        if tensor.span == COMPUTED:
            parts = [(e.size, min(e.size, local.size(manifest.key(e.span)))) for e in leaves(data)]
            here = data.size * sum(p[1] for p in parts) // max(1, sum(p[0] for p in parts))
            found.append(TensorSummary(tensor.name, tensor.dtype, tensor.shape, data.size, here, "", source))
            continue
        key = manifest.key(tensor.span)
        here, digest = local.size(key), local.digest(key)
        found.append(TensorSummary(tensor.name, tensor.dtype, tensor.shape, key.size, here, digest, source))
    return found


def _tensors(manifest: Manifest) -> Iterator[tuple[TensorInfo, Bytes]]:
    """What each is made of."""
    views = parts_of(manifest) if manifest.stack else {}
    for tensor in manifest.tensors:
        yield tensor, views[tensor.name].data if tensor.name in views else tensor_data(manifest, tensor)


def _source(manifest: Manifest, data: Bytes) -> str:
    return manifest.sources[manifest.spans[leaves(data)[0].span].source].path


def is_verified(store: Store, manifest: Manifest, shown: Shown) -> bool:
    """Complete, and every published SHA-256 was met."""
    here = shown.here(Local.of_model(store, manifest)).complete and not manifest.substituted
    return here and _Confirmations(store).all_of(shown.published)


class _Confirmations:
    """Outcomes of whole-file checks, each looked up once."""

    def __init__(self, store: Store) -> None:
        self._catalog = store.catalog
        self._known: dict[str, bool | None] = {}

    def of(self, identity: str) -> bool | None:
        """None while the file was not hashed here."""
        if identity not in self._known:
            verified = self._catalog.verified(identity)
            self._known[identity] = None if verified is None else verified.ok
        return self._known[identity]

    def all_of(self, published: Collection[str]) -> bool:
        """True when there are published hashes, and all of them were met."""
        return bool(published) and all(map(self.of, published))


def _exists(path: Path) -> bool:
    """Raises UserError for a place where no store can be made."""
    check_vacant(path)
    return (path / "format").exists()
