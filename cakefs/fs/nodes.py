"""The kinds of inodes and what the kernel may assume of each; the shape of one manifest's directory."""

import hashlib
from collections.abc import Mapping

from cakefs.model import File, View

ROOT = 1
FIRST_HASHED = 16  # inode numbers below are given by hand, and those nodes stay
SERVICE_NAME = ".cakefs"
STATUS_NAME = "status.json"
ORIGINAL_NAME = "original"
HUB_NAME = "hub"
FIXED_HUB = 5

# Seconds that the kernel may trust what it was told. Models come and go by other processes; the rest is immutable.
BRIEFLY = 1.0
FOREVER = 10 * 365 * 86400.0

Key = tuple[str, ...]


class Shape:
    """The folders of one manifest in one view: `folders[path][name]` is a file, or None for a folder."""

    def __init__(self, manifest_id: str, view: View, name: str, created: int, files: Mapping[str, File]) -> None:
        self.manifest_id = manifest_id
        self.view = view
        self.model = name
        self.created = created
        self.folders: dict[str, dict[str, File | None]] = {"": {}}
        for path, file in files.items():
            parent, _, name = path.rpartition("/")
            self._folder(parent)[name] = file

    def _folder(self, path: str) -> dict[str, File | None]:
        if path not in self.folders:
            parent, _, name = path.rpartition("/")
            self._folder(parent)[name] = None
            self.folders[path] = {}
        return self.folders[path]

    def subfolders(self, path: str) -> int:
        return sum(file is None for file in self.folders[path].values())


class Node:
    """One inode. `lookups` is the kernel's count of references to it."""

    entry_timeout = FOREVER
    attr_timeout = FOREVER
    nlink = 1

    def __init__(self, ino: int, key: Key, mtime: int) -> None:
        self.ino = ino
        self.key = key
        self.mtime = mtime
        self.lookups = 0


class FileNode(Node):
    def __init__(self, ino: int, key: Key, shape: Shape, file: File) -> None:
        super().__init__(ino, key, shape.created)
        self.manifest_id = shape.manifest_id
        self.file = file
        self.label = f"{shape.model}/{file.path}"
        self.nlink = 2 if file.view is View.BOTH else 1


class StatusNode(Node):
    """The live counters; its size is that of the text at the moment."""

    attr_timeout = 0.0


class TextNode(Node):
    """A small file whose bytes are made here. Found anew each time: what it is the text of may change."""

    entry_timeout = 0.0

    def __init__(self, ino: int, key: Key, mtime: int, text: bytes) -> None:
        super().__init__(ino, key, mtime)
        self.text = text


class Directory(Node):
    """Base of all directories. `parent` is an inode number; `path` says where in `shape`, if files of one are here."""

    negative_timeout = FOREVER
    shape: Shape | None = None
    path = ""

    def __init__(self, ino: int, key: Key, mtime: int, parent: int) -> None:
        super().__init__(ino, key, mtime)
        self.parent = parent


class ServiceDir(Directory):
    nlink = 4


class Folder(Directory):
    """A folder of a model, or the whole of it when `path` is empty."""

    shape: Shape

    def __init__(self, ino: int, key: Key, parent: int, shape: Shape, shown_as: str, path: str) -> None:
        super().__init__(ino, key, shape.created, parent)
        self.shape = shape
        self.shown_as = shown_as
        self.path = path
        self.nlink = 2 + shape.subfolders(path)
        self.entry_timeout = FOREVER if path else BRIEFLY


class NameDir(Directory):
    """Models, or longer prefixes, below `prefix`; with the files of the model of that very name, if there is one."""

    entry_timeout = BRIEFLY
    attr_timeout = BRIEFLY
    negative_timeout = 0.0

    def __init__(
        self, ino: int, key: Key, mtime: int, parent: int, view: View, prefix: str, shape: Shape | None = None
    ) -> None:
        super().__init__(ino, key, shape.created if shape else mtime, parent)
        self.view = view
        self.prefix = prefix
        self.shape = shape


def inode_number(key: Key) -> int:
    """62 bits of a hash, clear of the few fixed numbers and of the sign bit."""
    digest = hashlib.blake2b("\0".join(key).encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return max(int.from_bytes(digest) >> 2, FIRST_HASHED)


def encode_name(name: str) -> bytes:
    """As the kernel spells it. UTF-8 whatever the locale: names come from upstream, not from this machine."""
    return name.encode("utf-8", "surrogateescape")


def decode_name(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
