"""The pyfuse3 operations: kernel requests in, tree nodes and reader bytes out.

Rules kept here:
- A read is answered in full or with an error. A short answer before the end of the file becomes zeros or SIGBUS.
- A failed read is answered after a pause: the kernel asks again at once and, under MAP_POPULATE, for ever.
- No direct_io on a model's file (mmap would fail), no flush (every close would cost a request), no waiting in lookup,
  except for a model that nobody has added yet.
- The buffer of a hit is valid until the engine is called again: nothing is awaited between it and the reply.
"""

import errno
import os
import stat
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any, NamedTuple

import msgspec
import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, StatvfsData

from cakefs.errors import CakeError, NotFound
from cakefs.fs.answer import Complaints, answered, demand_errno, read_errno
from cakefs.fs.hub import HubDir
from cakefs.fs.library import FileReader, Library
from cakefs.fs.nodes import (
    STATUS_NAME,
    Directory,
    FileNode,
    Node,
    StatusNode,
    TextNode,
    decode_name,
    encode_name,
)
from cakefs.fs.tree import Tree

XATTR_PREFIX = b"user.cakefs."
FAILURE_PAUSE_S = 0.5
STALLED_S = 5.0  # A read that waits for longer counts as stalled.


@dataclass(slots=True)
class Counters:
    """Requests of the kernel since the mount began; `hits` are reads answered without waiting."""

    lookups: int = 0
    opens: int = 0
    open_files: int = 0
    reads: int = 0
    hits: int = 0
    bytes: int = 0
    failures: int = 0


class Handle(NamedTuple):
    """`counters` are the mount's own, or others that nobody reads: looking at the counters must not change them."""

    reader: FileReader
    label: str
    counters: Counters


class TextReader:
    """A text as it was when opened, so that a slow reader sees one consistent version."""

    def __init__(self, text: bytes) -> None:
        self._text = text
        self.size = len(text)

    def try_read(self, offset: int, size: int) -> memoryview | None:
        return memoryview(self._text)[offset : offset + size]

    async def read(self, offset: int, size: int) -> memoryview | bytes:
        return self._text[offset : offset + size]

    def close(self) -> None:
        """Nothing is held."""


class Ops(pyfuse3.Operations):
    """Handlers by their pyfuse3 names; what is not defined here is ENOSYS, which the kernel takes as "do without".

    Args:
        facts: Shown in status.json beside the library's own counters.
    """

    supports_dot_lookup = False

    def __init__(self, library: Library, *, uid: int, gid: int, facts: dict[str, object] | None = None) -> None:
        super().__init__()
        self._library = library
        self._tree = Tree(library, time.time)
        self._uid = uid
        self._gid = gid
        self._facts = facts or {}
        self._handles = count(1)
        self._files: dict[int, Handle] = {}
        self._listings: dict[int, tuple[Directory, tuple[str, ...]]] = {}
        self._waiting: dict[int, float] = {}  # since when, of the reads that wait
        self.counters = Counters()
        self.complaints = Complaints()

    def close(self) -> None:
        """Closes what the kernel had no time to release."""
        while self._files:
            self._files.popitem()[1].reader.close()

    # Names and attributes

    @answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        self.counters.lookups += 1
        directory = self._directory(parent_inode)
        node = self._tree.child(directory, decode_name(name)) or await self._demanded(directory, decode_name(name))
        if node is not None:
            entry = self._attributes(node)
            self._tree.retain(node)
            return entry
        if not directory.negative_timeout:
            raise FUSEError(errno.ENOENT)
        absent = EntryAttributes()
        absent.st_ino = 0  # pyfuse3's way to say ENOENT, to be remembered
        absent.entry_timeout = directory.negative_timeout
        return absent

    async def _demanded(self, directory: Directory, name: str) -> Node | None:
        """The entry that a model brings which is added because this name was looked up."""
        wish = self._tree.wish(directory, name)
        if wish is None:
            return None
        try:
            await self._library.demand(wish)
        except CakeError as error:
            raise FUSEError(demand_errno(error)) from None
        return self._tree.child(directory, name)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for ino, lookups in inode_list:
            self._tree.forget(ino, lookups)

    @answered
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return self._attributes(self._node(inode))

    def _node(self, ino: int) -> Node:
        try:
            return self._tree.node(ino)
        except KeyError:
            raise FUSEError(errno.ESTALE) from None

    def _directory(self, ino: int) -> Directory:
        node = self._node(ino)
        if not isinstance(node, Directory):
            raise FUSEError(errno.ENOTDIR)
        return node

    def _attributes(self, node: Node) -> EntryAttributes:
        is_dir = isinstance(node, Directory)
        entry = EntryAttributes()
        entry.st_ino = node.ino
        entry.entry_timeout = node.entry_timeout
        entry.attr_timeout = node.attr_timeout
        entry.st_mode = (stat.S_IFDIR | 0o555) if is_dir else (stat.S_IFREG | 0o444)
        entry.st_nlink = self._tree.links(node)
        entry.st_uid = self._uid
        entry.st_gid = self._gid
        entry.st_blksize = 4096  # llama.cpp aligns to it
        entry.st_size = self._size(node)
        entry.st_blocks = -(-entry.st_size // 512)  # of absent bytes too: with 0, `tar -S` archives zeros
        mtime = time.time_ns() if isinstance(node, StatusNode) else self._tree.mtime(node) * 1_000_000_000
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = mtime
        return entry

    def _size(self, node: Node) -> int:
        if isinstance(node, FileNode):
            return node.file.size
        if isinstance(node, TextNode):
            return len(node.text)
        return len(self._status_text()) if isinstance(node, StatusNode) else 0

    def status(self) -> dict[str, object]:
        """The counters of this mount and of what is below it, fit for JSON."""
        return {
            **self._library.status(),
            "mount": {**self._facts, **asdict(self.counters), **self._waits(), "inodes": len(self._tree)},
        }

    def _status_text(self) -> bytes:
        return msgspec.json.format(msgspec.json.encode(self.status()), indent=2) + b"\n"  # fast, also for 1,000 models

    # Directories: a listing is fixed at opendir, so that offsets into it stay right whatever happens meanwhile

    @answered
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        directory = self._directory(inode)
        handle = next(self._handles)
        self._listings[handle] = (directory, (".", "..", *self._tree.listing(directory)))
        return handle

    @answered
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        directory, names = self._listings[fh]
        for index in range(start_id, len(names)):
            name = names[index]
            node, entry = self._listed(directory, name)
            if entry is None:
                continue
            if not pyfuse3.readdir_reply(token, encode_name(name), entry, index + 1):
                return
            if node is not None:
                self._tree.retain(node)

    def _listed(self, directory: Directory, name: str) -> tuple[Node | None, EntryAttributes | None]:
        """The node to count and what to say of it; (None, None) for what is gone or broken: it must not hide others."""
        if name in (".", ".."):
            dots = EntryAttributes()
            dots.st_ino = directory.ino if name == "." else directory.parent
            dots.st_mode = stat.S_IFDIR | 0o555
            return None, dots
        try:
            node = self._tree.child(directory, name)
            return (node, self._attributes(node)) if node is not None else (None, None)
        except CakeError as error:
            self.complaints.about(f"listing {name}", error)
            return None, None

    async def releasedir(self, fh: int) -> None:
        self._listings.pop(fh, None)

    # Files

    @answered
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & (os.O_TRUNC | os.O_CREAT):
            raise FUSEError(errno.EROFS)
        node = self._node(inode)
        handle = next(self._handles)
        if isinstance(node, StatusNode):
            self._files[handle] = Handle(TextReader(self._status_text()), STATUS_NAME, Counters())
            return FileInfo(fh=handle, direct_io=True, keep_cache=False)
        if isinstance(node, TextNode):
            self._files[handle] = Handle(TextReader(node.text), "/".join(node.key[1:-1]), Counters())
            return FileInfo(fh=handle, keep_cache=True)
        if not isinstance(node, FileNode):
            raise FUSEError(errno.EISDIR)
        try:
            reader = self._library.open(node.manifest_id, node.file)
        except NotFound:
            raise FUSEError(errno.ESTALE) from None  # removed a moment ago: the kernel then looks the name up anew
        self._files[handle] = Handle(reader, node.label, self.counters)
        self.counters.opens += 1
        self.counters.open_files += 1
        return FileInfo(fh=handle, keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> memoryview | bytes:  # type: ignore[override]  # any buffer
        try:
            reader, _, counters = self._files[fh]
            counters.reads += 1
            data: memoryview | bytes | None = reader.try_read(off, size)
            if data is None:
                data = await self._wait_for(reader, off, size)
            else:
                counters.hits += 1
            length = len(data)
            if length != size and length != max(0, min(size, reader.size - off)):
                raise AssertionError(f"{length} bytes read where {size} at {off} of {reader.size} were asked for")
            counters.bytes += length
            return data
        except Exception as error:
            raise await self._failed(fh, off, size, error) from None

    async def _wait_for(self, reader: FileReader, off: int, size: int) -> memoryview | bytes:
        ticket = next(self._handles)
        self._waiting[ticket] = trio.current_time()
        try:
            return await reader.read(off, size)
        finally:
            del self._waiting[ticket]

    def waiting(self) -> int:
        """Reads that wait for the disk or the network now."""
        return len(self._waiting)

    def stalled(self) -> int:
        """Those that wait for longer than they should."""
        now = trio.current_time()
        return sum(now - since >= STALLED_S for since in self._waiting.values())

    def activity(self) -> tuple[int, ...]:
        """Differs from its earlier value when somebody asked for something meanwhile."""
        c = self.counters
        return (c.lookups, c.opens, c.reads, c.bytes, c.failures)

    def _waits(self) -> dict[str, float]:
        """What is worth knowing of the reads that wait; none ever does for long while all is well."""
        now = trio.current_time()
        times = [now - since for since in self._waiting.values()]
        return {"waiting": len(times), "stalled": self.stalled(), "longest_wait_s": round(max(times, default=0.0), 1)}

    async def _failed(self, fh: int, off: int, size: int, error: Exception) -> FUSEError:
        """What a read that failed is answered with, after a pause."""
        self.counters.failures += 1
        label = self._files[fh].label if fh in self._files else f"handle {fh}"
        self.complaints.about(f"cannot read {label}, bytes {off}-{off + size}", error)
        await trio.sleep(FAILURE_PAUSE_S)
        return FUSEError(read_errno(error))

    @answered
    async def release(self, fh: int) -> None:
        file = self._files.pop(fh)
        file.counters.open_files -= 1
        file.reader.close()

    async def forget_refuted(self) -> None:
        """As long as the mount lives: makes the kernel drop pages that turned out to be wrong."""
        while True:
            identity = await self._library.refuted()
            for node in self._tree.files():
                try:
                    if self._library.uses(node.manifest_id, node.file, identity):
                        # In a thread: it waits for reads of these pages, which we answer.
                        await trio.to_thread.run_sync(_drop_pages, node.ino, abandon_on_cancel=True)
                except CakeError as error:
                    self.complaints.about(f"dropping pages of {node.label}", error)

    # Extended attributes and the file system as a whole

    @answered
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        value = self._xattrs(self._node(inode)).get(name) if name.startswith(XATTR_PREFIX) else None
        if value is None:
            raise FUSEError(errno.ENODATA)
        return value

    @answered
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        return sorted(self._xattrs(self._node(inode)))

    def _xattrs(self, node: Node) -> dict[bytes, bytes]:
        if isinstance(node, FileNode):
            known = self._library.xattrs(node.manifest_id, node.file)
        elif isinstance(node, Directory) and node.shape is not None and not node.path:
            known = self._library.xattrs(node.shape.manifest_id, None)
        elif isinstance(node, HubDir):
            known = {"view": b"hub"}  # so that nobody borrows files of a cache that is this very mount
        else:
            known = {}
        return {XATTR_PREFIX + name.encode(): value for name, value in known.items()}

    @answered
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        store = self._library.statvfs()
        data = StatvfsData()
        for field in ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail"):
            setattr(data, f"f_{field}", getattr(store, f"f_{field}"))
        data.f_namemax = 255
        return data

    # Read-only: the `ro` of the mount refuses these before they come here, unless somebody remounts it

    async def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise FUSEError(errno.EROFS)

    mknod = mkdir = unlink = rmdir = symlink = rename = link = create = _refuse
    setattr = write = setxattr = removexattr = _refuse


def _drop_pages(ino: int) -> None:
    try:
        pyfuse3.invalidate_inode(ino)
    except OSError as error:
        if error.errno != errno.ENOENT:  # else the kernel has forgotten it already
            raise CakeError(f"the kernel keeps pages of inode {ino}: {error}") from error
