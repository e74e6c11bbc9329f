"""Finding models on a disk: caches as they are found in the wild, and what is no model."""

import hashlib
import json
from pathlib import Path

import pytest
import trio

from cakefs.engine.disk import folder, hubcache, ollama
from cakefs.engine.disk.folder import name_of
from cakefs.engine.disk.found import MOST_FILES
from cakefs.engine.models.sources import local_path
from cakefs.errors import CakeError, NotFound, RemoteChanged, UserError
from cakefs.model import ByteRange, Locator, Published
from cakefs.remotes.base import read
from cakefs.remotes.files import Files, file_locator, file_path
from tests.models import single, tensor

COMMIT = "c" * 40
SHA256, GIT = "a" * 64, "b" * 40
HUB = "https://hub.test"


def snapshot(cache: Path, files: dict[str, str], repo: str = "models--org--name", commit: str = COMMIT) -> Path:
    """A snapshot of links; `files` are the names of their blobs, by path."""
    top = cache / repo / "snapshots" / commit
    for path, blob in files.items():
        target = cache / repo / "blobs" / blob
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.encode() * 100)
        (top / path).parent.mkdir(parents=True, exist_ok=True)
        (top / path).symlink_to(target)
    return top


def refer(cache: Path, name: str, commit: str = COMMIT, repo: str = "models--org--name") -> None:
    ref = cache / repo / "refs" / name
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(commit)


def test_names_of_blobs_are_what_files_claim_to_be(tmp_path: Path) -> None:
    snapshot(tmp_path, {"model.safetensors": SHA256, "sub/config.json": GIT})
    refer(tmp_path, "main")
    (found,), skipped = hubcache.find(tmp_path, HUB)
    assert (found.name, found.listing.origin, found.listing.revision, found.listing.requested, skipped) == (
        "org/name",
        f"{HUB}/org/name",
        COMMIT,
        "main",
        [],
    )
    assert {(f.path, f.identity, f.sha256) for f in found.listing.files} == {
        ("model.safetensors", f"sha256:{SHA256}", SHA256),
        ("sub/config.json", f"git:{GIT}", ""),
    }
    assert found.listing.files[1].url == f"{HUB}/org/name/resolve/{COMMIT}/sub/config.json"


def test_a_snapshot_of_plain_files(tmp_path: Path) -> None:
    """As where links cannot be made: nothing says what a file is."""
    top = tmp_path / "models--gpt2/snapshots" / COMMIT
    top.mkdir(parents=True)
    (top / "config.json").write_bytes(b"{}")
    with (top / "model.safetensors").open("wb") as file:
        file.truncate(2 << 20)
    (found,), _ = hubcache.find(tmp_path, HUB)
    assert found.name == f"gpt2@{COMMIT}"
    assert {f.path: f.identity for f in found.listing.files} == {"config.json": "git:", "model.safetensors": "sha256:"}


def test_the_commits_own_list_says_what_is_missing(tmp_path: Path) -> None:
    top = snapshot(tmp_path, {"model.safetensors": SHA256})
    refer(tmp_path, "main")
    entry = {"size": 1700, "blob_id": GIT, "lfs_sha256": "d" * 64, "lfs_size": 1700}
    files = {"model.safetensors": entry, "README.md": {"size": 3, "blob_id": GIT}}
    tree = top.parent.parent / "trees" / f"{COMMIT}.json"
    tree.parent.mkdir()
    tree.write_text(json.dumps({"format_version": 1, "files": files}))
    (found,), _ = hubcache.find(tmp_path, HUB)
    assert [f.identity for f in found.listing.files] == ["sha256:" + "d" * 64]
    files["more.safetensors"] = entry
    tree.write_text(json.dumps({"format_version": 1, "files": files}))
    none, (skipped,) = hubcache.find(tmp_path, HUB)
    assert none == [] and skipped == ("org/name", "more.safetensors is not in the cache")


@pytest.mark.parametrize("tree", ["", "[]", '{"format_version": 2}', '{"format_version": 1, "files": {"a": 1}}'])
def test_a_list_that_makes_no_sense_is_not_believed(tmp_path: Path, tree: str) -> None:
    top = snapshot(tmp_path, {"model.safetensors": SHA256})
    (top.parent.parent / "trees").mkdir()
    (top.parent.parent / "trees" / f"{COMMIT}.json").write_text(tree)
    (found,), _ = hubcache.find(tmp_path, HUB)
    assert [f.identity for f in found.listing.files] == [f"sha256:{SHA256}"]


def test_what_is_no_model_in_a_cache(tmp_path: Path) -> None:
    snapshot(tmp_path, {"data.parquet": SHA256}, repo="datasets--org--name")
    snapshot(tmp_path, {"config.json": GIT}, repo="models--org--config")
    snapshot(tmp_path, {"model.safetensors": SHA256}, repo="models--org--odd", commit="no-commit")
    (tmp_path / "models--org--empty").mkdir()
    (tmp_path / "models--a-file").touch()
    found, skipped = hubcache.find(tmp_path, HUB)
    assert found == [] and skipped == [(f"org/config@{COMMIT}", "no weights are in the cache")]
    assert hubcache.find(tmp_path / "absent", HUB) == ([], [])


def test_files_are_found_by_what_they_claim_and_by_their_size(tmp_path: Path) -> None:
    snapshot(tmp_path, {"model.safetensors": SHA256, "config.json": GIT})
    wanted = [
        Published("x.safetensors", 1700, f"sha256:{SHA256}", "u"),
        Published("y.safetensors", 1699, f"sha256:{SHA256}", "u"),
        Published("config.json", 1100, f"git:{GIT}", "u"),
        Published("other", 1100, "etag:u", "u"),
    ]
    found = hubcache.files_with(tmp_path, wanted)
    assert {path: file.name for path, file in found.items()} == {"x.safetensors": SHA256, "config.json": GIT}
    assert hubcache.files_with(tmp_path / "absent", wanted) == {}


def test_too_many_files_are_no_model(tmp_path: Path) -> None:
    for number in range(MOST_FILES + 1):
        (tmp_path / str(number)).touch()
    with pytest.raises(UserError, match="that is no model"):
        folder.find(tmp_path, "x")


def test_names_that_cannot_be_shown(tmp_path: Path) -> None:
    (tmp_path / "good.txt").touch()
    (tmp_path / b"bad-\xff".decode("utf-8", "surrogateescape")).touch()
    found, skipped = folder.find(tmp_path, "x")
    assert list(found.paths) == ["good.txt"] and [s.why for s in skipped] == ["its name cannot be shown"]


def layer(root: Path, kind: str, data: bytes, **more: str) -> dict[str, object]:
    digest = hashlib.sha256(data).hexdigest()
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    (root / "blobs" / f"sha256-{digest}").write_bytes(data)
    media = f"application/vnd.ollama.image.{kind}"
    return {"mediaType": media, "digest": f"sha256:{digest}", "size": len(data), **more}


def test_layers_of_ollama_become_files(tmp_path: Path) -> None:
    path = tmp_path / "manifests/registry.ollama.ai/library/m/t"
    path.parent.mkdir(parents=True)
    licences = [layer(tmp_path, "license", text) for text in (b"one", b"two")]
    layers = [layer(tmp_path, "model", b"GGUF1"), layer(tmp_path, "model", b"GGUF2"), *licences]
    path.write_text(json.dumps({"config": layer(tmp_path, "config", b"{}"), "layers": layers}))
    (found,), _ = ollama.find(tmp_path)
    assert sorted(found.paths) == ["LICENSE", "LICENSE-2", "model-2.gguf", "model.gguf", "ollama.json"]


@pytest.mark.parametrize(
    ("layers", "why"),
    [
        ([("json", b"{}", "../../etc/passwd")], "cannot be shown"),
        ([("tensor", single({"data": tensor(i, 9)}), f"t{i}") for i in range(2)], "call a tensor 'data'"),
        ([("tensor", b"\xff" * 50, "t")], "tensors/t.safetensors"),
    ],
)
def test_models_of_ollama_that_cannot_be_shown(tmp_path: Path, layers: list[tuple[str, bytes, str]], why: str) -> None:
    path = tmp_path / "manifests/registry.ollama.ai/library/m/t"
    path.parent.mkdir(parents=True)
    made = [layer(tmp_path, kind, data, name=name) for kind, data, name in layers]
    path.write_text(json.dumps({"layers": made}))
    (path.parent / "broken").write_text("{")
    none, skipped = ollama.find(tmp_path)
    assert none == [] and [s.what for s in skipped] == ["ollama/m:broken", "ollama/m:t"]
    assert why in skipped[1].why and "no manifest" in skipped[0].why


@pytest.mark.parametrize(
    ("text", "local"),
    [("org/name", False), ("gpt2", False), ("https://x/y.gguf", False), ("x.gguf", False)]
    + [(path, True) for path in ("/a", "./a", "../a", "~/a", ".", "..")],
)
def test_a_path_is_told_by_how_it_is_written(text: str, local: bool) -> None:
    assert (local_path(text) is not None) == local


def test_a_file_that_is_here_needs_no_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.gguf").touch()
    monkeypatch.chdir(tmp_path)
    assert local_path("x.gguf") == Path("x.gguf") and name_of(Path("x.gguf")) == "x"
    assert name_of(Path()) == tmp_path.name


def test_files_as_a_remote(tmp_path: Path) -> None:
    path = tmp_path / "ü #?.bin"
    path.write_bytes(bytes(range(256)) * 8192)
    locator = file_locator(path, path.stat())
    assert file_path(locator.url) == path and file_path("https://x") is None
    known = Locator("https://hub.test/x", locator.size)
    files = Files(known={known.url: path})

    def get(asked: Locator, start: int, stop: int) -> bytes:
        return trio.run(read, files, asked, ByteRange(start, stop))

    assert get(locator, 5, 9) == get(known, 5, 9) == bytes(range(5, 9))
    assert get(locator, 100, 2_000_000) == path.read_bytes()[100:2_000_000]
    with pytest.raises(NotFound):
        get(Locator("https://hub.test/y", 5), 0, 5)
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(RemoteChanged, match="has changed since it was added"):
        get(locator, 0, 5)
    path.unlink()
    with pytest.raises(NotFound, match="is gone"):
        get(locator, 0, 5)
    path.mkdir()
    with pytest.raises(CakeError, match="cannot read"):
        get(known, 0, 5)
