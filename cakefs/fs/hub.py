"""`.cakefs/hub`: nodes of the Hugging Face cache shape that `plan/hubcache.py` describes.

Nothing is written here, and the client need not: what it would write, it finds. It first looks whether a file is known
to be absent, so `.no_exist/<commit>` has an empty file of every name that the commit has not (its listing is empty). It
records what a branch stands for, so `refs` follows what was added last. And it looks for the commit that the Hub names:
an unknown one can be had on demand.
"""

from collections.abc import Callable
from typing import Protocol

from cakefs.fs.library import Library
from cakefs.fs.nodes import BRIEFLY, FIXED_HUB, HUB_NAME, SERVICE_NAME, Directory, Key, Node, Shape, TextNode
from cakefs.model import View
from cakefs.plan import hubcache
from cakefs.plan.hubcache import HubPlace, HubRepo
from cakefs.plan.wish import Wish

LOCKS = ".locks"
TAG = "CACHEDIR.TAG"
TAG_TEXT = b"Signature: 8a477f597d28d172789f06886806bc55\n# Shown by cakefs: nothing here needs a backup.\n"
PARTS = (".no_exist", "blobs", "refs", "snapshots", "trees")


class HubDir(Directory):
    """A folder of the cache shape; `place` is its path below the view."""

    entry_timeout = BRIEFLY
    attr_timeout = BRIEFLY
    negative_timeout = 0.0

    def __init__(self, ino: int, key: Key, mtime: int, parent: int, place: tuple[str, ...]) -> None:
        super().__init__(ino, key, mtime, parent)
        self.place = place


class Names(Protocol):
    """The table of models at one generation."""

    generation: int | None
    models: dict[str, str]
    seen: int


class Inodes(Protocol):
    """What this view needs of the tree."""

    def names(self) -> Names: ...
    def shape(self, manifest_id: str, view: View) -> Shape: ...
    def folder(self, parent: int, shape: Shape, shown_as: str, path: str) -> Node: ...
    def intern(self, key: Key, make: Callable[[int], Node]) -> Node: ...


class HubView:
    """Made by the tree, once; `root` is its directory."""

    def __init__(self, library: Library, inodes: Inodes, mtime: int, parent: int) -> None:
        self._library = library
        self._inodes = inodes
        self.root = HubDir(FIXED_HUB, ("hub",), mtime, parent, ())
        self._generation: int | None = None
        self._places: dict[str, HubPlace | None] = {}
        self._repos: dict[str, HubRepo] = {}

    def listing(self, directory: HubDir) -> set[str]:
        repos = self._current()
        match directory.place:
            case ():
                return {*repos, LOCKS, TAG}
            case (".locks",):
                return set(repos)
            case (folder,) if folder in repos:
                return set(PARTS)
            case (folder, "snapshots") if folder in repos:
                return set(repos[folder].commits)
            case (folder, ".no_exist") if folder in repos:
                return repos[folder].whole
            case (folder, "trees") if folder in repos:
                return {f"{commit}.json" for commit in repos[folder].whole}
            case (folder, "refs", *above) if folder in repos:
                prefix = "".join(f"{part}/" for part in above)
                return {r[len(prefix) :].partition("/")[0] for r in repos[folder].refs if r.startswith(prefix)}
        return set()

    def child(self, directory: HubDir, name: str) -> Node | None:
        repos, place = self._current(), directory.place
        if name in self.listing(directory):
            return self._listed(directory, name)
        match place:
            case (folder, ".no_exist", commit, *above) if folder in repos and commit in repos[folder].whole:
                return self._absent(directory, repos[folder].commits[commit], above, name)
        return None

    def wish(self, directory: HubDir, name: str) -> Wish | None:
        """The model that a client wants that looks for an entry that is not there."""
        repos = self._current()
        match directory.place:
            case ():
                return hubcache.wish_for_folder(name)
            case (folder, "snapshots" | ".no_exist") if folder in repos:
                return hubcache.wish_for_commit(repos[folder], name)
            case (folder, "trees") if folder in repos and name.endswith(".json"):
                return hubcache.wish_for_commit(repos[folder], name.removesuffix(".json"))
            case (folder, "refs") if folder in repos:
                return hubcache.wish_for_ref(repos[folder], name)
        return None

    def subfolders(self, directory: HubDir) -> int:
        entries = self.listing(directory)
        match directory.place:
            case (_, "trees"):
                return 0
            case (folder, "refs", *above):
                known = self._current()[folder].refs if folder in self._current() else {}
                return len(entries - {r.rpartition("/")[2] for r in known if r.split("/")[:-1] == above})
        return len(entries - {TAG})

    def _current(self) -> dict[str, HubRepo]:
        names = self._inodes.names()
        if names.generation != self._generation:
            ids = set(names.models.values())
            self._places = {id: self._places[id] if id in self._places else self._library.hub_place(id) for id in ids}
            self._repos = hubcache.repositories({id: place for id, place in self._places.items() if place is not None})
            self._generation = names.generation
        return self._repos

    def _listed(self, directory: HubDir, name: str) -> Node | None:
        repos, place = self._current(), directory.place
        match place:
            case () if name == TAG:
                return self._text(directory, name, TAG_TEXT)
            case (folder, "snapshots"):
                shape = self._inodes.shape(repos[folder].commits[name], View.ORIGINAL)
                shown_as = "/".join((SERVICE_NAME, HUB_NAME, *place, name))
                return self._inodes.folder(directory.ino, shape, shown_as, "")
            case (folder, "trees"):
                manifest = self._library.manifest(repos[folder].commits[name.removesuffix(".json")])
                text = hubcache.tree_listing(manifest)
                return None if text is None else self._text(directory, name, text)
            case (folder, "refs", *above):
                commit = repos[folder].refs.get("/".join((*above, name)))
                return self._folder(directory, name) if commit is None else self._text(directory, name, commit.encode())
        return self._folder(directory, name)

    def _absent(self, directory: HubDir, manifest_id: str, above: list[str], name: str) -> Node | None:
        """What a commit does not have, as an empty file; or the way to it, where the name is that of a folder."""
        folders = self._inodes.shape(manifest_id, View.ORIGINAL).folders
        here = folders.get("/".join(above), {})
        if name in here:
            return self._folder(directory, name) if here[name] is None else None
        return self._text(directory, name, b"") if hubcache.looks_like_file(name) else self._folder(directory, name)

    def _folder(self, directory: HubDir, name: str) -> Node:
        place = (*directory.place, name)
        key = ("hub", *place)
        mtime = self._inodes.names().seen
        return self._inodes.intern(key, lambda ino: HubDir(ino, key, mtime, directory.ino, place))

    def _text(self, directory: HubDir, name: str, text: bytes) -> Node:
        # The text is part of it: an inode stands for the same bytes for ever.
        key = ("text", *directory.place, name, text.decode())
        return self._inodes.intern(key, lambda ino: TextNode(ino, key, directory.mtime, text))
