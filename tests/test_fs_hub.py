"""The cache shape of the Hugging Face client, and names that are wished for, as the inode table has them."""

import errno

import pytest

from cakefs.errors import AccessDenied, CakeError, InvalidFormat, NotFound, RemoteUnavailable, StoreFull, UserError
from cakefs.fs.answer import demand_errno
from cakefs.fs.hub import TAG
from cakefs.fs.nodes import Directory, TextNode
from cakefs.fs.tree import GONE_S
from cakefs.plan.hubcache import HubPlace
from cakefs.plan.wish import Wish
from tests.test_fs_tree import CONFIG, World

A, B = "a" * 40, "b" * 40
REPO = ".cakefs/hub/models--org--name"
SHARDED = {
    "model.safetensors": {"size": 9, "view": "model"},
    "model-1.safetensors": {"size": 4, "view": "original"},
    "config.json": {"text": "{}"},
    "1_Pooling/config.json": {"text": "{}"},
}


@pytest.fixture
def w() -> World:
    made = World()
    made.add("org/name", SHARDED, hub=["org/name", A, "main", 1])
    made.add("other", CONFIG)
    return made


def text(w: World, path: str) -> bytes | None:
    node = w.find(path)
    return node.text if isinstance(node, TextNode) else None


def is_dir(w: World, path: str) -> bool:
    return isinstance(w.find(path), Directory)


def test_the_view_has_the_folders_of_a_cache_and_only_models_of_a_hub(w: World) -> None:
    assert w.ls(".cakefs/hub") == [".locks", TAG, "models--org--name"]
    assert (text(w, f".cakefs/hub/{TAG}") or b"").startswith(b"Signature: 8a477f597d28d172789f06886806bc55\n")
    assert w.ls(REPO) == [".no_exist", "blobs", "refs", "snapshots", "trees"]
    assert w.ls(f"{REPO}/blobs") == [] and w.ls(".cakefs/hub/.locks/models--org--name") == []
    assert w.ls(f"{REPO}/refs") == ["main"] and text(w, f"{REPO}/refs/main") == A.encode()


def test_a_snapshot_has_what_was_published_and_nothing_beside_it(w: World) -> None:
    assert w.ls(f"{REPO}/snapshots") == [A]
    assert w.ls(f"{REPO}/snapshots/{A}") == ["1_Pooling", "config.json", "model-1.safetensors"]
    assert w.ino(f"{REPO}/snapshots/{A}/config.json") == w.ino("org/name/config.json")
    assert w.ino(f"{REPO}/snapshots/{A}") != w.ino(".cakefs/original/org/name")


def test_every_name_that_a_commit_has_not_is_known_to_be_absent(w: World) -> None:
    absent = f"{REPO}/.no_exist/{A}"
    for name in ("adapter_config.json", "model.safetensors", "1_Pooling/x.json", "2_Normalize/config.json", "a/b/c.py"):
        assert text(w, f"{absent}/{name}") == b"", name
    for name in ("config.json", "model-1.safetensors", "1_Pooling/config.json"):
        assert w.find(f"{absent}/{name}") is None, name
    assert is_dir(w, f"{absent}/1_Pooling") and w.ls(absent) == []
    assert w.find(f"{REPO}/.no_exist/{B}") is None


def test_of_an_incomplete_commit_nothing_is_known_to_be_absent() -> None:
    w = World()
    w.add("org/name", SHARDED, hub=["org/name", A, "main", 1, False])
    assert w.ls(f"{REPO}/snapshots") == [A] and text(w, f"{REPO}/refs/main") == A.encode()
    assert w.ls(f"{REPO}/.no_exist") == w.ls(f"{REPO}/trees") == []
    assert w.find(f"{REPO}/.no_exist/{A}") is None and w.find(f"{REPO}/trees/{A}.json") is None


def test_a_ref_with_a_slash_is_a_folder(w: World) -> None:
    w.add("org/name@refs/pr/1", CONFIG, hub=["org/name", B, "refs/pr/1", 2])
    assert w.ls(f"{REPO}/refs") == ["main", "refs"] and w.ls(f"{REPO}/refs/refs/pr") == ["1"]
    assert text(w, f"{REPO}/refs/refs/pr/1") == B.encode()
    assert w.ls(f"{REPO}/snapshots") == [A, B]


def test_a_ref_that_moves_is_another_inode(w: World) -> None:
    before = w.find(f"{REPO}/refs/main")
    w.add(f"org/name@{B}", CONFIG, hub=["org/name", B, "main", 2])
    after = w.find(f"{REPO}/refs/main")
    assert before is not None and after is not None and before.ino != after.ino
    assert text(w, f"{REPO}/refs/main") == B.encode()
    assert after.entry_timeout == 0


def test_directories_count_their_folders(w: World) -> None:
    counted = {path: w.find(path) for path in (".cakefs/hub", REPO, f"{REPO}/refs", f"{REPO}/trees", f"{REPO}/blobs")}
    links = {path: w.tree.links(node) for path, node in counted.items() if node is not None}
    assert links == {".cakefs/hub": 4, REPO: 7, f"{REPO}/refs": 2, f"{REPO}/trees": 2, f"{REPO}/blobs": 2}


def test_a_removed_model_leaves_the_view(w: World) -> None:
    refs = w.find(f"{REPO}/refs")
    w.remove("org/name")
    assert w.ls(".cakefs/hub") == [".locks", TAG] and w.find(REPO) is None
    assert isinstance(refs, Directory) and w.tree.listing(refs) == () and w.tree.child(refs, "main") is None


def test_no_model_is_read_twice_for_the_view(w: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    place = w.library.hub_place

    def hub_place(manifest_id: str) -> HubPlace | None:
        asked.append(manifest_id)
        return place(manifest_id)

    monkeypatch.setattr(w.library, "hub_place", hub_place)
    for _ in range(3):
        w.ls(".cakefs/hub")
    w.add("third", CONFIG)
    w.ls(".cakefs/hub")
    assert len(asked) == len(set(asked)) == 3


# Wishes


def wish(w: World, path: str) -> Wish | None:
    parent, _, name = path.rpartition("/")
    directory = w.find(parent)
    assert isinstance(directory, Directory), path
    assert w.tree.child(directory, name) is None, path
    return w.tree.wish(directory, name)


@pytest.fixture
def demanding(w: World) -> World:
    w.state["upstream"] = {}
    return w


def test_an_unknown_namespace_is_an_empty_folder_that_no_listing_shows(demanding: World) -> None:
    w = demanding
    assert w.ls("acme") == [] and w.ls() == [".cakefs", "org", "other"]
    assert w.find("autorun.inf") is None and w.find(".git") is None
    before = w.ino("acme")
    w.add("acme/new", CONFIG)
    assert w.ino("acme") == before and w.ls("acme") == ["new"]


def test_wishes_come_from_two_levels_and_from_the_cache_shape(demanding: World) -> None:
    w = demanding
    assert wish(w, "acme/new") == Wish("acme/new", None, "acme/new")
    assert wish(w, "org/name@v1") == Wish("org/name", "v1", "org/name@v1")
    assert wish(w, ".cakefs/hub/models--acme--new") == Wish("acme/new", None, "acme/new")
    moved = Wish("org/name", B, f"org/name@{B}", ("main",))
    assert wish(w, f"{REPO}/snapshots/{B}") == wish(w, f"{REPO}/.no_exist/{B}") == moved
    assert wish(w, f"{REPO}/trees/{B}.json") == moved
    assert wish(w, f"{REPO}/refs/v1") == Wish("org/name", "v1", "org/name@v1")


def test_nothing_else_is_a_wish(demanding: World) -> None:
    w = demanding
    for path in ("org/name/adapter_config.json", "other/x", "org/.git", ".cakefs/original/acme", ".cakefs/x"):
        assert wish(w, path) is None, path
    for path in (".cakefs/hub/blobs", f"{REPO}/x", f"{REPO}/refs/{B}", f"{REPO}/snapshots/main", f"{REPO}/blobs/{B}"):
        assert wish(w, path) is None, path


def test_without_a_source_there_are_neither_wishes_nor_namespaces(w: World) -> None:
    assert w.find("acme") is None and wish(w, "org/new") is None and wish(w, ".cakefs/hub/models--a--b") is None


def test_a_name_that_is_taken_is_no_wish(demanding: World) -> None:
    demanding.add("acme/mine", CONFIG)
    assert wish(demanding, ".cakefs/hub/models--acme--mine") is None


def test_a_removed_model_is_not_brought_back_by_those_who_still_look(demanding: World) -> None:
    w = demanding
    w.find("org/name/config.json")
    w.remove("org/name")
    assert wish(w, "org/name") is None and wish(w, REPO) is None
    w.now += GONE_S - 1
    w.add("third", CONFIG)
    assert wish(w, "org/name") is None
    w.now += 2
    assert wish(w, "org/name") is not None


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotFound("x"), errno.ENOENT),
        (RemoteUnavailable("x"), errno.ENOENT),
        (UserError("x"), errno.ENOENT),
        (AccessDenied("x"), errno.EACCES),
        (InvalidFormat("x"), errno.EIO),
        (StoreFull("x"), errno.EIO),
    ],
)
def test_what_a_refused_lookup_says(error: CakeError, code: int) -> None:
    assert demand_errno(error) == code
