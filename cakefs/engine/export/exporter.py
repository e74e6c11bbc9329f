"""Ordinary files of what a model shows, outside the store and without FUSE: by sharing blocks where the disk can.

    look: what is there already: equal is done, another is refused ─► fetch what is missing ─► write each file:
        bytes that can be shared ─► clones of blobs, not read
        all others               ─► checked, calculated, fetched again where damaged ─► written

A file that upstream published keeps its bytes, is read through, and must have the published SHA-256. A safetensors file
that was made here (of shards, of layers, by a recipe) may be laid out for sharing instead (plan/export.py).

What is not shared is written from the buffer in which it was checked: 0.6 s of CPU per GiB, and 0.65 s by
copy_file_range (2) after the check, which has to read every byte all the same.

All of a file is fetched before it is written, so a model must fit below the limit of the store; many models, or files
of one, one after the other need no more than the largest (`--file`). Fetching and giving up part by part was left out:
shards could no longer be held against their published SHA-256 where a file is merged of them, and an interrupted export
would have to fetch again what only the unfinished file has.
"""

import hashlib
import os
from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import trio

from cakefs.engine import jobs
from cakefs.engine.export.forms import Form, Source, as_shown, for_sharing
from cakefs.engine.export.target import Unfinished, block_size, reported
from cakefs.engine.fetch import Fetcher
from cakefs.engine.reading import Reading
from cakefs.errors import CorruptData, UserError
from cakefs.model import MIB, ByteRange, File, Manifest
from cakefs.plan.export import shareable, upstream_of
from cakefs.plan.ranges import subtract
from cakefs.store.files import holds_bytes, make_directory
from cakefs.store.store import Store

_CLONES = 256  # Between two looks at what else there is to do.


class Reflink(StrEnum):
    """Whether bytes may share blocks with the store, and whether a file is laid out for that."""

    AUTO = "auto"  # where the disk can; what upstream published keeps its bytes
    ALWAYS = "always"  # every safetensors file is laid out for it; an error where the disk cannot
    NEVER = "never"


class Wish(NamedTuple):
    """A file of the manifest, and where it is to be."""

    file: File
    path: Path


class Written(NamedTuple):
    """What became of a wish.

    Attributes:
        cloned: Bytes that share blocks with the store.
        written: False when the file was there already.
        aligned: Laid out for sharing: its tensors are those of the file that is shown, its bytes are not.
        confirmed: It has the SHA-256 that upstream published for it.
    """

    path: Path
    size: int
    cloned: int
    written: bool
    aligned: bool
    confirmed: bool


class Exporter:
    """Exports files of one manifest: `look`, `fetch`, `write`.

    Args:
        original: Keep the bytes of every file as they are.
        force: Replace files that are something else.
    """

    def __init__(
        self, store: Store, reading: Reading, manifest: Manifest, *, reflink: Reflink, original: bool, force: bool
    ) -> None:
        self._store = store
        self._reading = reading
        self._manifest = manifest
        self._reflink = reflink
        self._original = original
        self._force = force

    async def look(self, wish: Wish, progress: jobs.Progress) -> Written | None:
        """The wish fulfilled, or None when the file is yet to be written.

        Raises:
            UserError: Something else is there, and is not to be replaced.
        """
        path, size = wish.path, _size_there(wish.path)
        if size is None:
            return None
        shown = as_shown(self._store, self._manifest, wish.file)
        for form in (shown, await self._laid_out(shown, path)):
            if form is not None and form.file.size == size and await self._holds(path, form, progress):
                return Written(path, size, 0, False, form.aligned, bool(self._published(form)))
        if not self._force:
            raise UserError(f"{path} is there, and something else", hint="--force to replace it")
        return None

    async def fetch(self, fetcher: Fetcher, wishes: Sequence[Wish], progress: jobs.Progress) -> None:
        """What `pull` does, for these."""
        await jobs.pull(self._store, fetcher, self._manifest, [wish.file for wish in wishes], progress)

    async def write(self, wish: Wish, progress: jobs.Progress) -> Written:
        """Puts the file in its place once it is whole; what a failure leaves beside it, the next time goes on with.

        Raises:
            UserError: It cannot be written there, or not be cloned and must be.
            StoreFull: The disk is full.
            CorruptData: It does not have the published SHA-256.
        """
        shown = as_shown(self._store, self._manifest, wish.file)
        with reported(wish.path):
            make_directory(wish.path.parent)
        form = await self._laid_out(shown, wish.path)
        done = await self._fill(wish.path, form, progress) if form is not None else None
        if done is None:
            done = await self._fill(wish.path, shown, progress)
        assert done is not None, "only what is laid out anew may turn out useless"
        return done

    async def _laid_out(self, shown: Form, path: Path) -> Form | None:
        """Another layout of the file, if it is wanted."""
        if self._original or self._reflink is Reflink.NEVER:
            return None
        if self._reflink is Reflink.AUTO and upstream_of(self._manifest, shown.file) is not None:
            return None
        return await for_sharing(self._reading, shown, block_size(path.parent))

    def _published(self, form: Form) -> str:
        """The SHA-256 that the bytes must have, or nothing."""
        source = None if form.aligned else upstream_of(self._manifest, form.file)
        return source.sha256 if source is not None else ""

    async def _holds(self, path: Path, form: Form, progress: jobs.Progress) -> bool:
        """Whether a file of the right size has the bytes; told by the published hash where there is one."""
        published = self._published(form)
        with reported(path), path.open("rb", buffering=0) as file:
            if published:
                return await _sha256(file, progress) == published

            def equal(data: memoryview, offset: int) -> bool:
                return holds_bytes(file.fileno(), data, offset)

            return await Source(self._reading, form).feed(ByteRange(0, form.file.size), equal, progress)

    async def _fill(self, path: Path, form: Form, progress: jobs.Progress) -> Written | None:
        """None where a layout for sharing turns out useless: nothing can be shared."""
        size, published = form.file.size, self._published(form)
        hasher = hashlib.sha256() if published else None
        unfinished = Unfinished.open(path, size)
        try:
            shared = await self._share(unfinished, form)
            if form.aligned and not shared:
                return None
            cloned = sum(part.size for part in shared)
            rest = [(part, True) for part in subtract([ByteRange(0, size)], shared)]
            if hasher is not None:
                rest = sorted(rest + [(part, False) for part in shared])
            else:
                progress(cloned)
            source = Source(self._reading, form)
            for part, missing in rest:
                await source.feed(part, partial(_keep, unfinished if missing else None, hasher), progress)
            if hasher is not None and hasher.hexdigest() != published:
                unfinished.discard()
                hint = f"cakefs verify --repair {self._manifest.name}, then again"
                raise CorruptData(f"{path}: the bytes do not have the published SHA-256", hint=hint)
            await trio.to_thread.run_sync(partial(unfinished.finish, replace=self._force))
        finally:
            unfinished.close()
        return Written(path, size, cloned, True, form.aligned, bool(published))

    async def _share(self, unfinished: Unfinished, form: Form) -> list[ByteRange]:
        """Clones what can be cloned; returns it, rising."""
        shared: list[ByteRange] = []
        if self._reflink is Reflink.NEVER:
            return shared
        block = block_size(unfinished.path.parent)
        always = self._reflink is Reflink.ALWAYS
        for count, part in enumerate(shareable(self._manifest, form.file, block)):
            blob = self._store.clonable(self._manifest.key(part.span))
            record = self._store.catalog.find(self._manifest.key(part.span)) if blob is None and always else None
            if record is not None and record.places:
                what = f"the bytes of {form.file.path} are borrowed, and not at whole blocks of their file"
                raise UserError(what, hint="cakefs import --copy makes them the store's own; --reflink auto copies")
            if blob is not None and unfinished.clone(blob, part.start, part.size, part.offset):
                shared.append(ByteRange(part.offset, part.offset + part.size))
            elif blob is not None and always:
                where = f"{unfinished.path.parent} cannot share blocks with {self._store.path}"
                raise UserError(where, hint="both must be on one XFS or btrfs; --reflink auto copies instead")
            elif blob is not None and not shared:
                break  # Nor will the others.
            if count % _CLONES == 0:
                await trio.lowlevel.checkpoint()
        return shared


def _size_there(path: Path) -> int | None:
    """Of what is at a path: None for nothing, -1 for what has no bytes. Raises UserError for a directory."""
    with reported(path):
        if not os.path.lexists(path):
            return None
        if path.is_dir():
            raise UserError(f"{path} is there, and a directory")
        return path.stat().st_size if path.is_file() else -1


def _keep(unfinished: Unfinished | None, hasher: "hashlib._Hash | None", data: memoryview, offset: int) -> bool:
    """Writes and hashes, where it is given what to do that with."""
    if unfinished is not None:
        unfinished.put(offset, data)
    if hasher is not None:
        hasher.update(data)
    return True


async def _sha256(file: BinaryIO, progress: jobs.Progress) -> str:
    hasher = hashlib.sha256()
    while data := await trio.to_thread.run_sync(file.read, 4 * MIB):
        await trio.to_thread.run_sync(hasher.update, data)
        progress(len(data))
    return hasher.hexdigest()
