"""Small files of models, such as a config, as bytes: what `add` has stored of them."""

from collections.abc import Iterable

from cakefs.buffers import page_aligned
from cakefs.engine.local import stream
from cakefs.errors import CorruptData, UserError
from cakefs.model import MIB, Extent, Literal, Manifest, View
from cakefs.plan.view import ReadSmall
from cakefs.store.store import Store


def small_files(store: Store) -> ReadSmall:
    """Reads small files of models in a store; raises UserError for one that is not local: too large, or damaged."""
    return _SmallFiles(store)


class _SmallFiles:
    def __init__(self, store: Store) -> None:
        self._store = store

    def __call__(self, manifest: Manifest, path: str) -> bytes:
        return b"".join(self._pieces(manifest, path))

    def _pieces(self, manifest: Manifest, path: str) -> Iterable[bytes]:
        for segment in manifest.shown(View.MODEL)[path].segments:
            if isinstance(segment, Literal):
                yield self._store.literal(segment.blob)
                continue
            assert isinstance(segment, Extent)  # only weights are calculated
            key = manifest.key(segment.span)
            try:
                whole = b"".join(bytes(piece) for piece in stream(self._store, key, page_aligned(MIB)))
            except CorruptData as error:
                hint = f"cakefs pull {manifest.name} --files {path}"
                raise UserError(f"{path} of {manifest.name} is not in the store", hint=hint) from error
            yield whole[segment.start : segment.stop]
