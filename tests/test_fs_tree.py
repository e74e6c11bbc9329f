"""The inode table: what is shown where, what keeps its inode, what the kernel may remember."""

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cakefs.fs.nodes import ROOT, Directory, FileNode, Folder, NameDir, Node
from cakefs.fs.tree import Tree
from cakefs.model import View
from tests.fs_child import FakeLibrary, build_manifest

CONFIG = {"config.json": {"text": "{}"}}


class World:
    """A library whose models are set by assignment, and a tree of it."""

    def __init__(self, **models: Any) -> None:
        self.state: dict[str, Any] = {"generation": 1, "models": {}}
        self.library = FakeLibrary(lambda: self.state)
        self.now = 1000.0
        self.lookups: Counter[int] = Counter()
        self.tree = Tree(self.library, lambda: self.now)
        for name, files in models.items():
            self.add(name, files)

    def add(self, name: str, files: dict[str, Any], **more: Any) -> None:
        self.state["models"][name] = {"files": files, **more}
        self.state["generation"] += 1

    def remove(self, name: str) -> None:
        del self.state["models"][name]
        self.state["generation"] += 1

    def find(self, path: str) -> Node | None:
        """Walks as the kernel does, one counted lookup each."""
        node: Node = self.tree.node(ROOT)
        for name in filter(None, path.split("/")):
            assert isinstance(node, Directory)
            child = self.tree.child(node, name)
            if child is None:
                return None
            self.tree.retain(child)
            self.lookups[child.ino] += 1
            node = child
        return node

    def ls(self, path: str = "") -> list[str]:
        node = self.find(path)
        assert isinstance(node, Directory)
        return list(self.tree.listing(node))

    def ino(self, path: str) -> int:
        node = self.find(path)
        assert node is not None, path
        return node.ino


def world(models: dict[str, dict[str, Any]]) -> World:
    made = World()
    for name, files in models.items():
        made.add(name, files)
    return made


def test_names_with_and_without_a_slash_are_directories() -> None:
    w = world({"org/name": CONFIG, "org/name@main": CONFIG, "my-view": CONFIG, "a/b/c": CONFIG})
    assert w.ls() == [".cakefs", "a", "my-view", "org"]
    assert w.ls("org") == ["name", "name@main"]
    assert w.ls("a/b/c") == w.ls("my-view") == ["config.json"]


def test_listings_are_sorted_by_bytes_and_folders_come_from_paths() -> None:
    files = {
        path: {"text": ""} for path in ("model.safetensors", "é", "model-0", "B", "1_Pooling/config.json", "a/b/c")
    }
    w = world({"m": files})
    assert w.ls("m") == ["1_Pooling", "B", "a", "model-0", "model.safetensors", "é"]
    assert w.ls("m/a/b") == ["c"]


def test_views_differ_in_what_they_show() -> None:
    w = world(
        {
            "org/m": {
                "model.safetensors": {"size": 9, "view": "model"},
                "model-1.safetensors": {"size": 4, "view": "original"},
                "config.json": {"text": "{}"},
            }
        }
    )
    assert w.ls("org/m") == ["config.json", "model.safetensors"]
    assert w.ls(".cakefs/original/org/m") == ["config.json", "model-1.safetensors"]
    assert w.ls(".cakefs") == ["hub", "original", "status.json"]


def test_a_file_in_both_views_is_one_inode_and_directories_are_not() -> None:
    w = world({"m": {"sub/a": {"text": "A"}}})
    assert w.ino("m/sub/a") == w.ino(".cakefs/original/m/sub/a")
    assert w.ino("m/sub") != w.ino(".cakefs/original/m/sub")


def test_two_files_of_one_path_in_different_views_differ() -> None:
    manifest = build_manifest("m", {"files": {"a": {"size": 3, "view": "model"}}})
    assert manifest.shown(View.MODEL) and not manifest.shown(View.ORIGINAL)
    w = world({"m": {"a": {"size": 3, "view": "model"}}, "n": {"a": {"size": 3, "view": "original"}}})
    assert w.find(".cakefs/original/m/a") is None and w.find("n/a") is None


def test_inodes_are_the_same_after_a_remount() -> None:
    first, second = (world({"org/m": {"x/y": {"size": 5}}}) for _ in range(2))
    second.add("org/other", CONFIG)
    for path in ("org", "org/m", "org/m/x", "org/m/x/y"):
        assert first.ino(path) == second.ino(path)


def test_an_updated_model_has_new_inodes_and_the_old_ones_stay_what_they_were() -> None:
    w = world({"org/m": {"x/y": {"size": 5}}})
    old = [w.find(path) for path in ("org/m", "org/m/x", "org/m/x/y")]
    w.add("org/m", {"x/y": {"size": 6}})
    new = [w.find(path) for path in ("org/m", "org/m/x", "org/m/x/y")]
    assert {n.ino for n in old if n}.isdisjoint({n.ino for n in new if n})
    assert isinstance(old[2], FileNode) and old[2].file.size == 5 and w.tree.node(old[2].ino) is old[2]
    assert isinstance(old[1], Folder) and w.tree.child(old[1], "y") is old[2]
    assert isinstance(new[2], FileNode) and new[2].file.size == 6


def test_added_and_removed_models_are_seen_at_the_next_look() -> None:
    w = world({"org/m": CONFIG})
    org = w.find("org")
    assert isinstance(org, NameDir)
    assert w.find("org/n") is None
    w.now = 2000.0
    w.add("org/n", CONFIG)
    assert w.find("org/n") is not None and w.ls("org") == ["m", "n"]
    assert w.tree.mtime(org) == 2000
    w.remove("org/m")
    w.remove("org/n")
    assert w.find("org") is None and w.tree.listing(org) == ()


def test_a_name_that_is_a_model_and_a_prefix_shows_both() -> None:
    w = world({"me": {"config.json": {"text": "{}"}, "sub/x": {"text": ""}}, "me/view": CONFIG})
    assert w.ls("me") == ["config.json", "sub", "view"]
    assert w.ls("me/view") == ["config.json"] and w.ls("me/sub") == ["x"]


def test_the_models_own_entries_win_over_names_below_it() -> None:
    w = world({"me": {"sub/x": {"text": ""}, "file": {"text": ""}}, "me/sub": CONFIG, "me/file": CONFIG})
    assert w.ls("me") == ["file", "sub"] and w.ls("me/sub") == ["x"]
    assert isinstance(w.find("me/file"), FileNode)


def test_a_directory_gets_another_inode_when_models_appear_below_it() -> None:
    """The kernel may have been told that the name is absent for ever."""
    w = world({"me": CONFIG})
    before, file = w.find("me"), w.ino("me/config.json")
    assert isinstance(before, Folder) and before.negative_timeout > 1e6
    w.add("me/view", CONFIG)
    merged = w.find("me")
    assert isinstance(merged, NameDir) and merged.ino != before.ino and merged.negative_timeout == 0
    assert w.ino("me/config.json") == file
    w.remove("me/view")
    assert w.ino("me") == before.ino


def test_timeouts_are_short_at_the_names_and_long_inside_models() -> None:
    w = world({"org/m": {"x/y": {"size": 5}}})
    brief = [w.find(path) for path in ("", "org", "org/m", ".cakefs/original", ".cakefs/original/org")]
    assert [n.entry_timeout for n in brief if n] == [1.0] * 5
    for path in ("org/m/x", "org/m/x/y", ".cakefs", ".cakefs/status.json"):
        node = w.find(path)
        assert node is not None and node.entry_timeout > 1e6
    status = w.find(".cakefs/status.json")
    assert status is not None and status.attr_timeout == 0


def test_directories_count_their_subdirectories() -> None:
    w = world({"org/m": {"x/y": {"size": 5}, "z/y": {"size": 1}, "f": {"size": 1}}, "org": {"own/f": {"size": 1}}})
    links = {
        path: w.tree.links(w.find(path) or w.tree.node(ROOT)) for path in ("", "org", "org/m", "org/m/x", "org/m/f")
    }
    assert links == {"": 4, "org": 4, "org/m": 4, "org/m/x": 2, "org/m/f": 2}


def test_forgotten_inodes_leave_the_table_but_for_the_fixed_ones() -> None:
    w = world({f"org/m{i}": {"x/y": {"size": 5}} for i in range(50)})
    empty = len(w.tree)
    for _ in range(3):
        for i in range(50):
            w.find(f"org/m{i}/x/y")
        w.find(".cakefs/status.json")
    full = len(w.tree)
    assert full == empty + 1 + 3 * 50
    for ino, lookups in w.lookups.items():
        w.tree.forget(ino, lookups - 1)
    assert len(w.tree) == full
    for ino in w.lookups:
        w.tree.forget(ino, 1)
    assert len(w.tree) == empty
    assert w.ls("org/m3/x") == ["y"] and w.ls(".cakefs") == ["hub", "original", "status.json"]


def test_the_table_of_models_is_read_only_when_it_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    w = world({"org/m": CONFIG})
    asked: list[int] = []
    names = w.library.names

    def counted() -> dict[str, str]:
        asked.append(1)
        return names()

    monkeypatch.setattr(w.library, "names", counted)
    for _ in range(10):
        w.find("org/m/config.json")
        w.find("org/absent")
    assert len(asked) == 1
    w.add("org/n", CONFIG)
    assert w.ls("org") == ["m", "n"] and len(asked) == 2


def test_unsafe_and_reserved_names_are_not_shown() -> None:
    w = world({"../x": CONFIG, "a//b": CONFIG, "/abs": CONFIG, ".cakefs": CONFIG, "good": CONFIG})
    assert w.ls() == [".cakefs", "good"] and w.ls(".cakefs") == ["hub", "original", "status.json"]


PART = st.sampled_from(["a", "b", "model", "é", "x.json"])
PATH = st.lists(PART, min_size=1, max_size=3).map("/".join)


@given(st.dictionaries(PATH, st.sets(PATH, min_size=1, max_size=6), max_size=6), st.randoms())
def test_what_is_listed_is_found_and_nothing_else(models: dict[str, set[str]], rng: random.Random) -> None:
    """A walk over listings meets exactly the inodes that lookups give, whatever the names, and each is a tree."""
    w = world({name: {path: {"size": 1} for path in sorted(paths)} for name, paths in models.items()})
    seen: set[int] = set()
    queue: list[Node] = [w.tree.node(ROOT)]
    files = 0
    while queue:
        node = queue.pop()
        if not isinstance(node, Directory):
            files += isinstance(node, FileNode)
            continue
        assert node.ino not in seen, "a directory in two places"
        seen.add(node.ino)
        names = list(w.tree.listing(node))
        assert names == sorted(set(names), key=str.encode)
        assert w.tree.child(node, "no such name") is None
        rng.shuffle(names)
        for name in names:
            child = w.tree.child(node, name)
            assert child is not None and w.tree.child(node, name) is not None
            w.tree.retain(child)
            queue.append(child)
    assert files >= (2 if models else 0)
