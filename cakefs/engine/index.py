"""Adding a model: listing -> headers and small files -> manifest. Reads kilobytes, whatever the model weighs.

    source text ─► listing (remotes) ─► indexes, headers, small files ─► plan/compose: manifest ─► catalog

Headers and small files are spans like any other: what another model brought is not fetched again.
"""

import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import NamedTuple

from cakefs.engine.known.naming import check_place, same_files, same_model
from cakefs.engine.known.shown import Local, Shown, put_model
from cakefs.engine.models.ggufview import fetch_tokenizers, show_gguf
from cakefs.engine.models.upstream import Unreadable, Upstream
from cakefs.engine.tasks import open_flat_nursery
from cakefs.errors import CorruptData, InvalidFormat, NotFound, UserError
from cakefs.formats import sharded
from cakefs.formats.torchckpt import is_index
from cakefs.model import SMALL_FILE_LIMIT, Listing, Manifest, Published
from cakefs.plan.compose import Header, build_manifest
from cakefs.plan.gguf_compose import is_gguf, split_sets
from cakefs.plan.present import checkpoint_files, is_safetensors, main_files, wanted_checkpoints, wanted_indexes
from cakefs.remotes.base import Remote
from cakefs.store.store import Store

GUESS_BUDGET = 64 * 1024  # Bytes fetched in the hope that they hold the header, over all files of a model.
GUESS_LIMIT = 32 * 1024
ORIGINAL_ONLY = "shown under .cakefs/original only"


class Added(NamedTuple):
    """What `add` did.

    Attributes:
        changed: False when the name stood for the very same manifest before.
        fetched: Bytes that came over the network for it.
        total: Bytes of the model directory's files; `local` of them are in the store.
        warnings: What of the repository is shown otherwise than the user may expect, and why.
    """

    manifest: Manifest
    manifest_id: str
    changed: bool
    fetched: int
    total: int
    local: int
    warnings: tuple[str, ...] = ()


class Indexer:
    """Turns listings into manifests in the store.

    Args:
        remote: Already bounded in retries and concurrency.
    """

    def __init__(self, store: Store, remote: Remote) -> None:
        self._store = store
        self._remote = remote
        self._upstream = Upstream(store, remote)
        self._warnings: list[str] = []

    async def add(self, listing: Listing, name: str, *, update: bool = False) -> Added:
        """Stores what is needed to show the model, then its name; a failure leaves no name behind.

        Args:
            update: Let a name that stands for something else now stand for this.

        Raises:
            CakeError: As `compose` and `put`.
        """
        return self.put(await self.compose(listing, name), update=update)

    async def compose(self, listing: Listing, name: str) -> Manifest:
        """The manifest; headers and small files are in the store then.

        Raises:
            CakeError: InvalidFormat for a header or index of the safetensors of the model that breaks its format, and
                whatever the remote raises.
        """
        self._upstream, self._warnings = Upstream(self._store, self._remote), []
        files = {published.path: published for published in listing.files}
        checkpoints = wanted_checkpoints(files)
        if not files:
            self._warnings.append("there is no file in it")
        try:
            indexes = await self._indexes(files, checkpoints)
            headers = await self._headers(files, indexes, checkpoints)
            put, warn = self._store.put_literal, self._warnings.append
            manifest = build_manifest(name, listing, headers, indexes, int(time.time()), put, warn)
            await fetch_tokenizers(manifest, self._store, lambda path: self._upstream.whole(files[path]))
            return show_gguf(manifest, self._store, put)
        except InvalidFormat as error:  # it names the file, and every model has one of that name
            raise InvalidFormat(f"{name}: {error.message}", hint=error.hint) from error

    async def _indexes(
        self, files: Mapping[str, Published], checkpoints: Mapping[str, str]
    ) -> dict[str, sharded.Index]:
        """Those that files are merged by; one of torch checkpoints that is broken is a warning, and left out."""
        of_torch = [path for path in checkpoints.values() if is_index(path)]
        wanted = [*wanted_indexes(files), *of_torch]
        bodies: dict[str, bytes] = {}

        async def fetch(path: str) -> None:
            if files[path].size <= sharded.INDEX_LIMIT:
                bodies[path] = await self._upstream.whole(files[path])

        await _each(fetch, wanted)
        indexes: dict[str, sharded.Index] = {}
        for path in wanted:
            try:
                if path not in bodies:
                    raise InvalidFormat(f"{path}: an index of {files[path].size} bytes")
                indexes[path] = sharded.parse_index(bodies[path], path)
            except InvalidFormat as error:
                if path not in of_torch:
                    raise
                self._warnings.append(f"{path} and its shards are {ORIGINAL_ONLY}: {error.message}")
        return indexes

    async def _headers(
        self, files: Mapping[str, Published], indexes: Mapping[str, sharded.Index], checkpoints: Mapping[str, str]
    ) -> dict[str, Header]:
        """What can be read of large files; small ones are in the store afterwards.

        A file that is no part of a model's own safetensors and breaks its format is a warning, and left out.
        """
        main, torch = main_files(files, indexes), checkpoint_files(checkpoints, indexes)
        tensors = sum(map(is_safetensors, files))
        guess = min(GUESS_LIMIT, GUESS_BUDGET // max(1, tensors))
        headers: dict[str, Header] = {}
        problems: dict[str, tuple[str, str]] = {}  # not the errors: what they were raised in is megabytes
        ggufs = sorted((path for path in files if is_gguf(path)), key=lambda path: (files[path].size, path))
        parts = {part for split in split_sets(ggufs).values() for part in split}

        async def look(path: str) -> None:
            published, upstream = files[path], self._upstream
            try:
                if is_safetensors(path):
                    headers[path] = await upstream.safetensors_header(published, guess)
                elif is_gguf(path):
                    headers[path] = await upstream.gguf_header(published, whole=path in parts)
                elif path in torch:
                    headers[path] = await upstream.checkpoint(published)
                elif published.size <= SMALL_FILE_LIMIT:
                    await upstream.whole(published)
            except Unreadable as error:
                problems[path] = error.message, error.hint

        for path in ggufs[-1:]:  # by it the headers of the others are read
            await look(path)
        await _each(look, [path for path in files if path not in ggufs[-1:]])
        for path, (message, hint) in sorted(problems.items()):
            if path in main:
                raise InvalidFormat(message, hint=hint)
            self._warnings.append(f"{path} is {ORIGINAL_ONLY if path in torch else 'shown as it is'}: {message}")
        return headers

    def put(self, manifest: Manifest, *, update: bool = False) -> Added:
        """Shows the model under its name. Raises UserError for a name that is taken."""
        catalog, changed = self._store.catalog, True
        before = catalog.models.all().get(manifest.name)
        old = self._readable(before.manifest) if before is not None else None
        if old is not None:
            if same_model(old, manifest):
                manifest, changed = old, False
            elif not (update or same_files(old, manifest) or _has_grown(old, manifest)):
                raise _taken(old, manifest)
        check_place(self._store, manifest)
        shown = Shown.of(manifest)
        manifest_id = before.manifest if before and not changed else put_model(self._store, manifest, shown)
        local = shown.here(Local.of_model(self._store, manifest)).bytes
        return Added(manifest, manifest_id, changed, self._upstream.fetched, shown.size, local, tuple(self._warnings))

    def _readable(self, manifest_id: str) -> Manifest | None:
        """None for one that is damaged: adding the model again is what mends it."""
        try:
            return self._store.catalog.models.manifest(manifest_id)
        except (CorruptData, InvalidFormat, NotFound):
            return None


async def _each(function: Callable[[str], Awaitable[None]], items: Iterable[str]) -> None:
    """Runs an async function over all items together."""
    async with open_flat_nursery() as nursery:
        for item in items:
            nursery.start_soon(function, item)


def _has_grown(old: Manifest, new: Manifest) -> bool:
    """Whether the one is the same revision with further files: it was added from a cache that had not all of them."""
    same = old.revision and (old.origin, old.revision) == (new.origin, new.revision)
    return bool(same) and {*old.sources} < {*new.sources}


def _taken(old: Manifest, new: Manifest) -> UserError:
    if old.origin != new.origin:
        return UserError(f"{old.name} is already here, from {old.origin}", hint="--as NAME, or --update to replace it")
    at = f" at {old.revision[:12]}, not at {new.revision[:12]}" if old.revision != new.revision else ", and has changed"
    return UserError(f"{old.name} is already here{at}", hint="--update to follow, or --as NAME to have both")
