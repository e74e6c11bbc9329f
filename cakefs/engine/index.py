"""Adding a model: listing -> headers and small files -> manifest. Reads kilobytes, whatever the model weighs.

    source text ─► listing (remotes) ─► indexes, headers, small files ─► plan/compose: manifest ─► catalog

Headers and small files are spans like any other: what another model brought is not fetched again.
"""

import hashlib
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import trio

from cakefs.engine.local import stream
from cakefs.engine.survey import Local, Shown
from cakefs.engine.tasks import open_flat_nursery
from cakefs.errors import CorruptData, InvalidFormat, NotFound, UserError
from cakefs.formats import safetensors, sharded
from cakefs.model import (
    MIB,
    SMALL_FILE_LIMIT,
    ByteRange,
    File,
    Listing,
    Locator,
    Manifest,
    Published,
    SpanKey,
    View,
)
from cakefs.plan.compose import build_manifest
from cakefs.plan.present import is_safetensors, wanted_indexes
from cakefs.remotes.base import Remote, read
from cakefs.store.store import Store

GUESS_BUDGET = 64 * 1024  # Bytes fetched in the hope that they hold the header, over all files of a model.
GUESS_LIMIT = 32 * 1024
AT_ONCE = 16  # Requests for headers and small files on their way together.


class Added(NamedTuple):
    """What `add` did.

    Attributes:
        changed: False when the name stood for the very same manifest before.
        fetched: Bytes that came over the network for it.
        total: Bytes of the model directory's files; `local` of them are in the store, `shared` by other models' doing.
    """

    manifest: Manifest
    manifest_id: str
    changed: bool
    fetched: int
    total: int
    local: int


class Indexer:
    """Turns listings into manifests in the store.

    Args:
        remote: Already bounded in retries and concurrency.
    """

    def __init__(self, store: Store, remote: Remote) -> None:
        self._store = store
        self._remote = remote
        self._fetched = 0
        self._limit = trio.CapacityLimiter(AT_ONCE)

    async def add(self, listing: Listing, name: str, *, update: bool = False) -> Added:
        """Stores what is needed to show the model, then its name; a failure leaves no name behind.

        Args:
            update: Let a name that stands for something else now stand for this.

        Raises:
            CakeError: UserError for a name that is taken, InvalidFormat for a header or index that breaks its format,
                and whatever the remote raises.
        """
        self._fetched = 0
        indexes = set(wanted_indexes([p.path for p in listing.files]))
        tensors = [p for p in listing.files if is_safetensors(p.path)]
        whole = [p for p in listing.files if not is_safetensors(p.path) and _is_wanted_whole(p, indexes)]
        bodies: dict[str, bytes] = {}
        headers: dict[str, safetensors.Header] = {}
        guess = min(GUESS_LIMIT, GUESS_BUDGET // max(1, len(tensors)))

        async def fetch_whole(published: Published) -> None:
            bodies[published.path] = await self._whole(published)

        async def fetch_header(published: Published) -> None:
            headers[published.path] = await self._header(published, guess)

        await _each(fetch_whole, whole)
        parsed = {path: sharded.parse_index(bodies[path], path) for path in indexes}
        await _each(fetch_header, tensors)
        manifest = build_manifest(name, listing, headers, parsed, int(time.time()), self._store.put_literal)
        return self._put(manifest, update=update)

    def _put(self, manifest: Manifest, *, update: bool) -> Added:
        catalog, changed = self._store.catalog, True
        before = catalog.models().get(manifest.name)
        old = self._readable(before.manifest) if before is not None else None
        if old is not None:
            if same_model(old, manifest):
                manifest, changed = old, False
            elif not update:
                raise _taken(old, manifest)
        check_place(self._store, manifest)
        manifest_id = before.manifest if before and not changed else catalog.put_model(manifest)
        shown = Shown(manifest)
        local = shown.local_bytes(Local.of_model(self._store, manifest))
        return Added(manifest, manifest_id, changed, self._fetched, shown.size, local)

    def _readable(self, manifest_id: str) -> Manifest | None:
        """None for one that is damaged: adding the model again is what mends it."""
        try:
            return self._store.catalog.manifest(manifest_id)
        except (CorruptData, InvalidFormat, NotFound):
            return None

    async def _whole(self, published: Published) -> bytes:
        """A small file, checked against its published hash where there is one."""
        key = SpanKey(published.identity, 0, published.size)
        if published.size == 0:
            return b""
        known = self._known(key)
        if known is not None:
            return known
        data = await self._fetch(published, 0, published.size)
        check_published(published, data)
        self._store.put_span(key, data)
        return data

    async def _header(self, published: Published, guess: int) -> safetensors.Header:
        """The header of a safetensors file, in one request when the guess is large enough, else in two."""
        known = self._known_header(published)
        if known is not None:
            return known
        if published.size < 8:
            raise InvalidFormat(f"{published.path}: {published.size} bytes is too short for safetensors")
        data = await self._fetch(published, 0, min(max(guess, 8), published.size))
        size = safetensors.header_size(data[:8], published.path)
        if size > published.size:
            raise InvalidFormat(f"{published.path}: header of {size} bytes in a file of {published.size}")
        if size > len(data):
            data += await self._fetch(published, len(data), size)
        header = safetensors.parse_header(data[:size], published.size, published.path)
        self._store.put_span(SpanKey(published.identity, 0, size), data[:size])
        return header

    def _known_header(self, published: Published) -> safetensors.Header | None:
        """The header of the same file in another model."""
        for start, stop in self._store.catalog.spans(published.identity):
            if start == 0 and (data := self._known(SpanKey(published.identity, 0, stop), safetensors.HEADER_LIMIT)):
                try:
                    return safetensors.parse_header(data, published.size, published.path)
                except InvalidFormat:
                    continue
        return None

    def _known(self, key: SpanKey, limit: int = 64 * MIB) -> bytes | None:
        if key.size > limit or not self._store.has(key):
            return None
        try:
            return b"".join(bytes(piece) for piece in stream(self._store, key, memoryview(bytearray(MIB))))
        except CorruptData:
            self._store.drop_span(key)
            return None

    async def _fetch(self, published: Published, start: int, stop: int) -> bytes:
        locator = Locator(published.url, published.size, published.validator)
        async with self._limit:
            data = await read(self._remote, locator, ByteRange(start, stop))
        self._fetched += len(data)
        return data


async def _each(function: Callable[[Published], Awaitable[None]], items: Iterable[Published]) -> None:
    """Runs an async function over all items together."""
    async with open_flat_nursery() as nursery:
        for item in items:
            nursery.start_soon(function, item)


def _is_wanted_whole(published: Published, indexes: set[str]) -> bool:
    if published.path in indexes and published.size > sharded.INDEX_LIMIT:
        raise InvalidFormat(f"{published.path}: an index of {published.size} bytes")
    return published.size <= SMALL_FILE_LIMIT or published.path in indexes


def check_published(published: Published, data: bytes) -> None:
    """Raises CorruptData where whole-file bytes do not have the hash that the listing names them by."""
    algorithm, _, expected = published.identity.partition(":")
    if algorithm == "git":
        actual = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    elif published.sha256:
        expected, actual = published.sha256, hashlib.sha256(data).hexdigest()
    else:
        return
    if actual != expected:
        raise CorruptData(f"{published.path}: the bytes that came do not have the published hash", hint="try again")


def same_model(a: Manifest, b: Manifest) -> bool:
    """Whether two manifests show the same content at the same revision; only the day of adding may differ."""
    return (a.origin, a.revision, a.sources, a.spans, a.files) == (b.origin, b.revision, b.sources, b.spans, b.files)


def _taken(old: Manifest, new: Manifest) -> UserError:
    if old.origin != new.origin:
        return UserError(f"{old.name} is already here, from {old.origin}", hint="--as NAME, or --update to replace it")
    at = f" at {old.revision[:12]}, not at {new.revision[:12]}" if old.revision != new.revision else ", and has changed"
    return UserError(f"{old.name} is already here{at}", hint="--update to follow, or --as NAME to have both")


def check_place(store: Store, manifest: Manifest) -> None:
    """Refuses a name that a file of another model would hide in the mount, or whose files would hide another model."""
    name, known = manifest.name, store.catalog.models()
    for other in known:
        outer, inner = (other, name) if name.startswith(other + "/") else (name, other)
        if not inner.startswith(outer + "/"):
            continue
        files = manifest if outer == name else store.catalog.manifest(known[outer].manifest)
        first = inner[len(outer) + 1 :].partition("/")[0]
        if any(path.partition("/")[0] == first for path in files.shown(View.MODEL)):
            raise UserError(f"{inner} would be hidden by a file of {outer}", hint="choose another --as NAME")


def model_name(name: str) -> str:
    """A name to show a model under, checked. Raises UserError."""
    parts = name.split("/")
    if any(p in ("", ".", "..") or p.startswith(".") or not p.isprintable() or len(p.encode()) > 200 for p in parts):
        raise UserError(f"bad model name {name!r}", hint="use org/name or a plain word, without a leading dot")
    return name


def chosen_files(manifest: Manifest, patterns: Sequence[str]) -> list[File]:
    """Files of the model directory whose path matches any of the globs; all without a glob."""
    files = manifest.shown(View.MODEL).items()
    return [file for path, file in files if not patterns or any(fnmatchcase(path, p) for p in patterns)]
