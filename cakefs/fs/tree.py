"""The inode table and the directory shapes of the mount. No pyfuse3, no waiting.

    /                       NameDir(MODEL, "")       changes when models come and go
      org/                  NameDir(MODEL, "org")
        name/               Folder                   one manifest in one view: never changes
          onnx/model.onnx   Folder, FileNode
      .cakefs/              ServiceDir
        status.json         StatusNode
        original/           NameDir(ORIGINAL, "")    the same once more, with the files as published
        hub/                HubDir                   and once more, as the Hugging Face cache has it: `fs/hub.py`

Invariants:
- An inode stands for one (manifest, view, path) for ever, also across mounts: its number is a hash of exactly that. An
  updated model is another manifest and therefore other inodes, so the kernel may keep pages and entries of a Folder as
  long as it likes. A file shown in both views is one inode with two names.
- Where a model's name is also the prefix of other names, one NameDir shows both; what the model has itself wins. Its
  number differs from that of the plain Folder, so the kernel drops what it knew when the one becomes the other.
- What may be the namespace of a model to be had on demand is an empty NameDir that no listing shows: the kernel asks
  for `org` before it asks for `org/name`. Only a lookup of the latter is a wish.
- A node is in the table exactly while the kernel counts references to it. A Shape lives as long as a node needs it.
"""

from collections.abc import Callable, Mapping
from weakref import WeakValueDictionary

from cakefs.fs.hub import HubDir, HubView
from cakefs.fs.library import Library
from cakefs.fs.nodes import (
    FIRST_HASHED,
    HUB_NAME,
    ORIGINAL_NAME,
    ROOT,
    SERVICE_NAME,
    STATUS_NAME,
    Directory,
    FileNode,
    Folder,
    Key,
    NameDir,
    Node,
    ServiceDir,
    Shape,
    StatusNode,
    encode_name,
    inode_number,
)
from cakefs.model import View, is_safe_path
from cakefs.plan.wish import Wish, may_be_namespace, wish_for

# Seconds for which a model that was removed is not brought back by those who still look at it.
GONE_S = 60.0


class Names:
    """The table of models at one generation: which names there are, and what stands below each prefix of them."""

    def __init__(self, generation: int | None, models: Mapping[str, str], seen: int) -> None:
        self.generation = generation
        self.seen = seen
        self.models = {name: manifest for name, manifest in models.items() if is_safe_path(name)}
        self.below: dict[str, set[str]] = {"": set()}
        for name in self.models:
            while name:
                prefix, _, last = name.rpartition("/")
                self.below.setdefault(prefix, set()).add(last)
                name = prefix


class Tree:
    """All inodes that the kernel knows.

    Args:
        clock: Unix seconds; the mtime of a name level is when a change was first seen there.
    """

    def __init__(self, library: Library, clock: Callable[[], float]) -> None:
        self._library = library
        self._clock = clock
        self._names = Names(None, {}, int(clock()))
        self._shapes: WeakValueDictionary[tuple[str, View], Shape] = WeakValueDictionary()
        now = self._names.seen
        self._root = NameDir(ROOT, ("names", View.MODEL, "", ""), now, ROOT, View.MODEL, "")
        self._service = ServiceDir(2, ("service",), now, ROOT)
        self._status = StatusNode(3, ("status",), now)
        self._original = NameDir(4, ("names", View.ORIGINAL, "", ""), now, 2, View.ORIGINAL, "")
        self._hub = HubView(library, self, now, 2)
        self._fixed = {STATUS_NAME: self._status, ORIGINAL_NAME: self._original, HUB_NAME: self._hub.root}
        self._nodes: dict[int, Node] = {n.ino: n for n in (self._root, self._service, *self._fixed.values())}
        self._gone: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def node(self, ino: int) -> Node:
        """Raises KeyError for a number that the kernel cannot have from here."""
        return self._nodes[ino]

    def files(self) -> list[FileNode]:
        """Those that the kernel knows."""
        return [node for node in self._nodes.values() if isinstance(node, FileNode)]

    def child(self, directory: Directory, name: str) -> Node | None:
        """The entry of that name. Not yet in the table: `retain` what the kernel is told of."""
        if isinstance(directory, ServiceDir):
            return self._fixed.get(name)
        if isinstance(directory, Folder):
            return self._in_folder(directory, directory.shape, directory.path, name)
        if isinstance(directory, NameDir):
            return self._in_names(directory, name)
        return self._hub.child(directory, name) if isinstance(directory, HubDir) else None

    def wish(self, directory: Directory, name: str) -> Wish | None:
        """The model to be had on demand that a name stands for which is not there."""
        if not self._library.on_demand:
            return None
        wish = None
        if isinstance(directory, HubDir):
            wish = self._hub.wish(directory, name)
        elif isinstance(directory, NameDir) and directory.view is View.MODEL and directory.shape is None:
            wish = wish_for(directory.prefix, name)
        if wish is None or wish.name in self.names().models:
            return None
        return None if self._clock() - self._gone.get(wish.name, -GONE_S) < GONE_S else wish

    def listing(self, directory: Directory) -> tuple[str, ...]:
        """Names of all entries, sorted by their bytes."""
        if isinstance(directory, ServiceDir):
            found = set(self._fixed)
        elif isinstance(directory, Folder):
            found = set(directory.shape.folders[directory.path])
        elif isinstance(directory, NameDir):
            found = set(self.names().below.get(directory.prefix, ()))
            found.update(directory.shape.folders[""] if directory.shape else ())
            found.update({SERVICE_NAME} if directory is self._root else ())
        elif isinstance(directory, HubDir):
            found = self._hub.listing(directory)
        return tuple(sorted(found, key=encode_name))

    def links(self, node: Node) -> int:
        """st_nlink; for the name levels as of now."""
        if isinstance(node, HubDir):
            return 2 + self._hub.subfolders(node)
        if not isinstance(node, NameDir):
            return node.nlink
        own = node.shape.folders[""] if node.shape else {}
        below = self.names().below.get(node.prefix, set())
        return 2 + len(below - own.keys()) + sum(file is None for file in own.values()) + (node is self._root)

    def mtime(self, node: Node) -> int:
        if isinstance(node, NameDir) and node.shape is None:
            return self.names().seen
        return node.mtime

    def retain(self, node: Node) -> None:
        """Counts one reference that the kernel got."""
        node.lookups += 1
        self._nodes[node.ino] = node

    def forget(self, ino: int, count: int) -> None:
        """Takes back references; the node goes with the last one."""
        node = self._nodes.get(ino)
        if node is not None:
            node.lookups -= count
            if node.lookups <= 0 and ino >= FIRST_HASHED:
                del self._nodes[ino]

    def names(self) -> Names:
        """The generation is read before the names: a change in between is seen next time."""
        generation = self._library.generation()
        if generation != self._names.generation:
            before, now = self._names.models, self._clock()
            self._names = Names(generation, self._library.names(), int(now))
            self._gone = {name: when for name, when in self._gone.items() if now - when < GONE_S}
            self._gone |= dict.fromkeys(before.keys() - self._names.models.keys(), now)
        return self._names

    def _in_names(self, directory: NameDir, name: str) -> Node | None:
        if directory is self._root and name == SERVICE_NAME:
            return self._service
        if directory.shape and name in directory.shape.folders[""]:
            return self._in_folder(directory, directory.shape, "", name)
        names = self.names()
        full = f"{directory.prefix}/{name}" if directory.prefix else name
        if name not in names.below.get(directory.prefix, ()):
            return self._namespace(directory, name) if directory is self._root else None
        shape = self.shape(names.models[full], directory.view) if full in names.models else None
        manifest = shape.manifest_id if shape else ""
        if full in names.below:
            key: Key = ("names", directory.view, full, manifest)
            return self.intern(
                key, lambda ino: NameDir(ino, key, names.seen, directory.ino, directory.view, full, shape)
            )
        assert shape is not None  # a name with nothing below it is a model
        return self.folder(directory.ino, shape, full, "")

    def _namespace(self, root: NameDir, name: str) -> Node | None:
        if not self._library.on_demand or not may_be_namespace(name):
            return None
        key = ("names", root.view, name, "")
        return self.intern(key, lambda ino: NameDir(ino, key, self.names().seen, root.ino, root.view, name))

    def _in_folder(self, directory: Folder | NameDir, shape: Shape, path: str, name: str) -> Node | None:
        entries = shape.folders[path]
        if name not in entries:
            return None
        file = entries[name]
        if file is None:
            shown_as = directory.shown_as if isinstance(directory, Folder) else directory.prefix
            return self.folder(directory.ino, shape, shown_as, f"{path}/{name}" if path else name)
        key = ("file", shape.manifest_id, file.view, file.path)
        return self.intern(key, lambda ino: FileNode(ino, key, shape, file))

    def folder(self, parent: int, shape: Shape, shown_as: str, path: str) -> Node:
        # The name is part of it: a directory, unlike a file, must not appear in two places.
        key = ("folder", shape.view, shown_as, shape.manifest_id, path)
        return self.intern(key, lambda ino: Folder(ino, key, parent, shape, shown_as, path))

    def intern(self, key: Key, make: Callable[[int], Node]) -> Node:
        """The node of that key: the one that the kernel knows, or a new one."""
        ino = inode_number(key)
        while (node := self._nodes.get(ino)) is not None and node.key != key:
            ino += 1
        return node if node is not None else make(ino)

    def shape(self, manifest_id: str, view: View) -> Shape:
        shape = self._shapes.get((manifest_id, view))
        if shape is None:
            manifest = self._library.manifest(manifest_id)
            shape = Shape(manifest_id, view, manifest.name, manifest.created, manifest.shown(view))
            self._shapes[manifest_id, view] = shape
        return shape
