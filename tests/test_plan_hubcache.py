"""The cache shape, held against the Hub's own client where it has a function for it."""

import hashlib
from pathlib import Path

import msgspec
import pytest
from huggingface_hub import _tree_cache
from huggingface_hub.file_download import repo_folder_name

from cakefs.model import Listing, Locator, Manifest, ManifestHead, Published, Source, decode_head, encode_manifest
from cakefs.plan import hubcache
from cakefs.plan.compose import build_manifest
from cakefs.plan.hubcache import HubPlace, HubRepo
from cakefs.plan.wish import Wish

A, B = "a" * 40, "b" * 40


def head(
    origin: str = "https://hf.co/org/name", revision: str = A, requested: str = "main", url: str = ""
) -> ManifestHead:
    url = url or f"{origin}/resolve/{revision}/config.json"
    return ManifestHead("any", origin, revision, requested, 7, (Source("config.json", "git:1", Locator(url, 2)),))


def test_a_commit_of_a_hub_has_a_place() -> None:
    assert hubcache.place_of(head()) == HubPlace("org/name", A, "main", 7)
    assert hubcache.place_of(head("http://localhost:80/gpt2")) == HubPlace("gpt2", A, "main", 7)
    # the Hub's own name may differ from the one that was asked for
    renamed = head(url=f"https://hf.co/Org/Name/resolve/{A}/config.json")
    assert hubcache.place_of(renamed) == HubPlace("org/name", A, "main", 7)


@pytest.mark.parametrize(
    "other",
    [
        head("merge of org/name", ""),
        head("https://hf.co/org/name/resolve/main/model.safetensors", requested=""),
        head("https://host/dir/model.safetensors", ""),
        head(revision="main"),
        head(url="file:///x/config.json"),
        ManifestHead("any", "https://hf.co/org/name", A, "main", 7, ()),
    ],
)
def test_nothing_else_has(other: ManifestHead) -> None:
    assert hubcache.place_of(other) is None


def test_the_head_is_that_of_the_manifest() -> None:
    source = Source("f", "git:1", Locator("u", 2))
    manifest = Manifest("org/name", "origin", A, "v1", 5, (source,), (), (), ())
    head = decode_head(encode_manifest(msgspec.structs.replace(manifest, whole=False)))
    assert (head.name, head.origin, head.revision, head.requested, head.created) == ("org/name", "origin", A, "v1", 5)
    assert head.sources == (source,) and not head.whole and not head.substituted
    older = msgspec.msgpack.encode(msgspec.to_builtins(manifest)[:9])
    assert decode_head(older).whole and hubcache.place_of(decode_head(older)) is None


@pytest.mark.parametrize("repo", ["org/name", "gpt2", "01-ai/Yi-1.5-6B"])
def test_folders_are_named_as_the_client_names_them(repo: str) -> None:
    assert hubcache.folder_name(repo) == repo_folder_name(repo_id=repo, repo_type="model")
    assert hubcache.repo_of(hubcache.folder_name(repo)) == repo


@pytest.mark.parametrize(
    "name", ["datasets--org--name", "models--", "models--a--b--c", ".locks", "blobs", "models--.git"]
)
def test_other_folders_stand_for_no_repository(name: str) -> None:
    assert hubcache.repo_of(name) is None and hubcache.wish_for_folder(name) is None


def test_a_ref_is_what_was_added_last_for_it() -> None:
    places = {
        "id1": HubPlace("org/name", A, "main", 1),
        "id2": HubPlace("org/name", B, "main", 2),
        "id3": HubPlace("org/name", A, "v1", 3),
        "id4": HubPlace("org/name", B, B, 4),
        "id5": HubPlace("gpt2", A, "refs/pr/1", 5),
    }
    assert hubcache.repositories(places) == {
        "models--org--name": HubRepo("org/name", {A: "id3", B: "id4"}, {"main": B, "v1": A}, {A, B}),
        "models--gpt2": HubRepo("gpt2", {A: "id5"}, {"refs/pr/1": A}, {A}),
    }


def test_an_incomplete_commit_gives_way_to_the_whole_one() -> None:
    part, whole = HubPlace("org/name", A, "main", 9, False), HubPlace("org/name", A, "v1", 1)
    (repo,) = hubcache.repositories({"part": part}).values()
    assert repo == HubRepo("org/name", {A: "part"}, {"main": A}, set())
    (repo,) = hubcache.repositories({"part": part, "whole": whole}).values()
    assert repo == HubRepo("org/name", {A: "whole"}, {"main": A, "v1": A}, {A})


def test_what_a_client_wants_that_looks_for_what_is_not_there() -> None:
    repo = HubRepo("org/name", {A: "id"}, {"v1": A}, {A})
    assert hubcache.wish_for_folder("models--org--name") == Wish("org/name", None, "org/name")
    assert hubcache.wish_for_commit(repo, B) == Wish("org/name", B, f"org/name@{B}", ("main", "v1"))
    assert hubcache.wish_for_commit(repo, "main") is None
    assert hubcache.wish_for_ref(repo, "main") == Wish("org/name", None, "org/name")
    assert hubcache.wish_for_ref(repo, "v2") == Wish("org/name", "v2", "org/name@v2")
    for other in (B, "refs", "main.0a1b2c3d.tmp", ".x"):
        assert hubcache.wish_for_ref(repo, other) is None


def test_absent_names_are_files_when_they_have_an_ending() -> None:
    for name in ("adapter_config.json", "tokenizer.model", "chat_template.jinja", "model.fp16.safetensors", "x.py"):
        assert hubcache.looks_like_file(name)
    for name in ("1_Pooling", "additional_chat_templates", "unet", "v1.5", "custom_generate"):
        assert not hubcache.looks_like_file(name)


def published(path: str, data: bytes, identity: str, sha256: str = "") -> Published:
    return Published(path, len(data), identity, f"https://hf.co/org/name/resolve/{A}/{path}", sha256)


def test_the_client_reads_the_list_of_files(tmp_path: Path) -> None:
    sha256 = hashlib.sha256(b"gguf").hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize 4\n".encode()
    files = (
        published("config.json", b"{}", "git:" + "1" * 40),
        published("x/y.gguf", b"gguf", f"sha256:{sha256}", sha256),
    )
    manifest = build_manifest("org/name", Listing("https://hf.co/org/name", A, "main", files), {}, {}, 1, lambda _: "")
    text = hubcache.tree_listing(manifest)
    assert text is not None
    (tmp_path / "trees").mkdir()
    (tmp_path / "trees" / f"{A}.json").write_bytes(text)
    assert _tree_cache.read_tree_cache(str(tmp_path), A) == {
        "config.json": _tree_cache.TreeCacheEntry(2, "1" * 40),
        "x/y.gguf": _tree_cache.TreeCacheEntry(
            4, hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest(), sha256, 4
        ),
    }


def test_no_list_is_better_than_one_with_a_gap() -> None:
    files = (published("big.bin", b"1234", "xet:" + "0" * 64),)
    manifest = build_manifest("org/name", Listing("https://hf.co/org/name", A, "main", files), {}, {}, 1, lambda _: "")
    assert hubcache.tree_listing(manifest) is None
