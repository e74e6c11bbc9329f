"""Import: what is on the disk already is shown in place, without a copy and without a transfer; and what is borrowed is
given up before a wrong byte of it is served. Real caches, made by huggingface_hub itself; real mounts."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import snapshot_download

from cakefs.errors import StoreFull
from cakefs.store.borrowed import Stamp
from cakefs.store.scan import scan as genuine_scan
from tests import gguf_files as gguf
from tests.disks import small_disk
from tests.exporting import needs_root
from tests.hub import Hub
from tests.inside import Inside
from tests.models import CONFIG, llama, sharded, single, tensor
from tests.mounts import Cakefs, needs_fuse

MIB = 1 << 20


@pytest.fixture
def cakefs(hub: Hub, tmp_path: Path) -> Cakefs:
    """Most tests here change or take away a file that a mount borrows from, and that is said."""
    gone = r"WARNING .* (is gone or has changed|is gone, and it is known from nowhere else)"
    return Inside(tmp_path, hub, HF_HUB_CACHE=str(tmp_path / "cache")).provoking(gone)


def big(seed: int = 0, tensors: int = 3, size: int = 2 * MIB + 4096) -> bytes:
    """A model.safetensors of several chunks per tensor."""
    return single({f"model.layers.{i}.w": tensor(seed * 100 + i, size // 4) for i in range(tensors)})


def download(hub: Hub, cache: Path, repo: str, **how: Any) -> Path:
    """A snapshot, by the genuine client."""
    return Path(snapshot_download(repo, cache_dir=cache, endpoint=hub.endpoint, **how))


def taken_on_disk(store: Path) -> int:
    """Bytes of blobs and partials; the catalog's file grows by pages and is not counted."""
    return sum(p.stat().st_blocks * 512 for d in ("blobs", "partial") for p in (store / d).rglob("*") if p.is_file())


def change(path: Path, at: int = -1) -> None:
    """Another byte, with the size and the inode kept."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def blob_of(snapshot: Path, name: str = "model.safetensors") -> Path:
    return (snapshot / name).resolve()


# The Hub cache


@needs_fuse
def test_a_downloaded_model_is_shown_in_place_offline(hub: Hub, cakefs: Cakefs, tmp_path: Path) -> None:
    published = big()
    hub.add_repo("org/name", {"config.json": CONFIG, "model.safetensors": published, "extra.bin": os.urandom(3 * MIB)})
    snapshot = download(hub, tmp_path / "cache", "org/name")
    hub.down()

    done = cakefs.json("import", "hub-cache", "--offline")
    assert [m["name"] for m in done["models"]] == ["org/name"] and done["skipped"] == []
    assert done["borrowed_bytes"] > 6 * MIB and done["stored_bytes"] < 10_000
    assert taken_on_disk(cakefs.store) < 10_000
    (model,) = cakefs.json("ls")
    assert model["verified"] and model["local_bytes"] == model["size"] and model["borrowed_bytes"] > 6 * MIB
    assert cakefs.json("status")["store"]["blob_bytes"] < 10_000
    with cakefs.mounted("--offline") as models:
        assert (models / "org/name/model.safetensors").read_bytes() == published
        assert (models / "org/name/config.json").read_bytes() == CONFIG
    assert taken_on_disk(cakefs.store) < 10_000
    assert blob_of(snapshot).read_bytes() == published


def test_importing_twice_reads_nothing(hub: Hub, cakefs: Cakefs, tmp_path: Path) -> None:
    hub.add_repo("org/name", {"model.safetensors": big()})
    download(hub, tmp_path / "cache", "org/name")
    cakefs.run("import", "hub-cache")
    listed = cakefs.json("ls")
    again = cakefs.json("import", "hub-cache")
    assert again["borrowed_bytes"] == again["stored_bytes"] == 0
    assert [m["changed"] for m in again["models"]] == [False]
    assert cakefs.json("ls") == listed


def test_add_of_a_cached_model_transfers_nothing_but_the_listing(hub: Hub, cakefs: Cakefs, tmp_path: Path) -> None:
    files = sharded(llama(4, width=512), 3) | {"config.json": CONFIG, "tokenizer.json": b"{}" * 5000}
    hub.add_repo("org/name", files)
    download(hub, tmp_path / "cache", "org/name")
    hub.reset()
    added = cakefs.json("add", "org/name")
    assert added["fetched_bytes"] == 0 and added["missing_bytes"] == 0
    assert hub.sent() == 0
    (model,) = cakefs.json("ls")
    assert model["verified"] and model["borrowed_bytes"]
    cakefs.run("pull", "org/name")
    assert hub.sent() == 0


@needs_fuse
@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME"])
def test_what_is_looked_up_in_a_mount_is_borrowed_from_the_cache_too(
    hub: Hub, cakefs: Cakefs, tmp_path: Path, variable: str
) -> None:
    """Also where HF_HUB_CACHE names what the mount shows, as the README advises."""
    files = sharded(llama(4, width=512), 3) | {"config.json": CONFIG}
    hub.add_repo("org/name", files)
    download(hub, tmp_path / "home/hub", "org/name")
    hub.reset()
    places = {"HF_HUB_CACHE": str(tmp_path / "home/hub")}
    if variable == "HF_HOME":
        places = {"HF_HUB_CACHE": str(cakefs.mountpoint / ".cakefs/hub"), "HF_HOME": str(tmp_path / "home")}
    with cakefs.mounted(**places) as models:
        assert (models / "org/name/model.safetensors").read_bytes() == single(llama(4, width=512))
    assert hub.sent() == 0
    (model,) = cakefs.json("ls")
    assert model["verified"] and model["borrowed_bytes"]


def test_plan_of_a_model_that_was_never_added_knows_what_add_will_borrow(
    hub: Hub, cakefs: Cakefs, tmp_path: Path
) -> None:
    shared, own = big(1), big(2)
    hub.add_repo("org/base", {"model.safetensors": shared})
    hub.add_repo("other/copy", {"model.safetensors": shared, "adapter/model.safetensors": own})
    snapshot = download(hub, tmp_path / "cache", "org/base")
    plan = cakefs.json("plan", "other/copy")
    assert plan["bytes"]["cached"] == 3 * (2 * MIB + 4096) == plan["bytes"]["missing"]
    assert {r["path"] for r in plan["requests"]} == {"adapter/model.safetensors"}
    assert Counter(t["state"] for t in plan["tensors"] if t["dtype"]) == {"cached": 3, "missing": 3}
    said = cakefs.run("plan", "other/copy").stdout
    assert "▓▓▓" in said and "3 tensors: in the Hub cache" in said
    cakefs.run("add", "other/copy")
    added = cakefs.json("plan", "other/copy")
    assert added["requests"] == plan["requests"] and added["bytes"]["cached"] == 0, "borrowed: it is here now"

    blob_of(snapshot).write_bytes(b"another size")
    cakefs.run("rm", "other/copy")
    cakefs.run("gc")
    assert cakefs.json("plan", "other/copy")["bytes"]["cached"] == 0


@pytest.mark.parametrize("command", ["pull", "export"])
def test_what_came_into_the_cache_after_the_model_was_added_is_not_fetched(
    hub: Hub, cakefs: Cakefs, tmp_path: Path, command: str
) -> None:
    data = big()
    hub.add_repo("org/name", {"model.safetensors": data, "other.npz": os.urandom(2 * MIB)})
    cakefs.run("add", "org/name")
    download(hub, tmp_path / "cache", "org/name", allow_patterns=["*.safetensors"])
    plan = cakefs.json("plan", "org/name")
    assert {r["path"] for r in plan["requests"]} == {"other.npz"} and plan["bytes"]["cached"] == 3 * (2 * MIB + 4096)
    hub.reset()
    cakefs.run(*{"pull": ["pull", "org/name"], "export": ["export", "org/name", str(tmp_path / "out")]}[command])
    assert hub.sent("*model.safetensors") == 0 and hub.sent("*other.npz") == 2 * MIB
    (model,) = cakefs.json("ls")
    assert model["verified"] and model["borrowed_bytes"] >= 6 * MIB


def test_a_cached_file_that_is_not_what_its_name_says_is_fetched_by_a_pull(
    hub: Hub, cakefs: Cakefs, tmp_path: Path
) -> None:
    hub.add_repo("org/name", {"model.safetensors": big()})
    cakefs.run("add", "org/name")
    change(blob_of(download(hub, tmp_path / "cache", "org/name")))
    hub.reset()
    done = cakefs.run("pull", "org/name")
    assert "does not have the bytes that its name promises" in done.stderr
    assert hub.sent("*model.safetensors") == 3 * (2 * MIB + 4096) and cakefs.json("ls")[0]["verified"]


def test_add_takes_from_the_cache_what_another_repository_left_there(hub: Hub, cakefs: Cakefs, tmp_path: Path) -> None:
    shared, own = big(1), big(2)
    hub.add_repo("org/base", {"model.safetensors": shared})
    hub.add_repo("other/copy", {"model.safetensors": shared, "adapter/model.safetensors": own})
    download(hub, tmp_path / "cache", "org/base")
    hub.reset()
    added = cakefs.json("add", "other/copy")
    assert hub.sent("*adapter/model.safetensors") < 100_000 and hub.sent("other/copy/model.safetensors") == 0
    assert added["local_bytes"] >= len(shared) and added["missing_bytes"] > 6 * MIB


def test_a_cache_that_repositories_share(hub: Hub, cakefs: Cakefs, tmp_path: Path) -> None:
    """As huggingface_hub 2.4 lays it out: a repository's blob is a link into the store of all."""
    published = big()
    hub.add_repo("org/name", {"config.json": CONFIG, "model.safetensors": published})
    cache = tmp_path / "cache"
    snapshot = download(hub, cache, "org/name")
    blob, xet = blob_of(snapshot), hashlib.sha256(b"xet").hexdigest()
    (cache / "blobs" / xet[:2]).mkdir(parents=True)
    (cache / "blobs/.huggingface-shared-blobs").write_text("1\n")
    shared = cache / "blobs" / xet[:2] / xet
    blob.rename(shared)
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    hub.reset()
    done = cakefs.json("import", "hub-cache")
    assert [m["name"] for m in done["models"]] == ["org/name"] and done["borrowed_bytes"] > 6 * MIB
    cakefs.run("pull", "org/name")
    assert hub.sent() == 0
    change(shared)
    assert cakefs.json("ls")[0]["borrowed_bytes"] == 0


def test_snapshots_are_shown_by_their_branch_and_by_their_commit(hub: Hub, cakefs: Cakefs, tmp_path: Path) -> None:
    first = hub.add_repo("org/name", {"model.safetensors": big(1)})
    download(hub, tmp_path / "cache", "org/name")
    hub.add_repo("org/name", {"model.safetensors": big(2)})
    download(hub, tmp_path / "cache", "org/name")
    hub.add_repo("org/name", {"model.safetensors": big(3)}, branch="dev")
    download(hub, tmp_path / "cache", "org/name", revision="dev")
    done = cakefs.json("import", "hub-cache")
    assert {m["name"] for m in done["models"]} == {"org/name", f"org/name@{first}", "org/name@dev"}


def test_what_is_not_all_in_the_cache_is_skipped_and_named(hub: Hub, cakefs: Cakefs, tmp_path: Path) -> None:
    hub.add_repo("org/name", sharded(llama(4, width=512), 3))
    snapshot = download(hub, tmp_path / "cache", "org/name")
    (snapshot / "model-00002-of-00003.safetensors").unlink()
    done = cakefs.json("import", "hub-cache")
    assert done["models"] == [] and done["skipped"][0]["what"] == "org/name"
    assert "model-00002-of-00003.safetensors" in done["skipped"][0]["why"]
    assert cakefs.json("ls") == []


def test_a_snapshot_without_its_readme_is_shown_and_grows_with_add(hub: Hub, cakefs: Cakefs, tmp_path: Path) -> None:
    hub.add_repo("org/name", {"model.safetensors": big(), "README.md": b"read me", "model.bin": os.urandom(2 * MIB)})
    download(hub, tmp_path / "cache", "org/name", allow_patterns="*.safetensors")
    done = cakefs.json("import", "hub-cache")
    assert [m["name"] for m in done["models"]] == ["org/name"]
    added = cakefs.json("add", "org/name")
    assert added["changed"] and added["fetched_bytes"] == len(b"read me")
    assert cakefs.json("import", "hub-cache")["models"][0]["changed"] is False, "and it stays grown"


@pytest.mark.parametrize("how", ["import", "add"])
def test_a_blob_that_is_not_what_its_name_says_is_not_taken(hub: Hub, cakefs: Cakefs, tmp_path: Path, how: str) -> None:
    published = big()
    hub.add_repo("org/name", {"config.json": CONFIG, "model.safetensors": published})
    snapshot = download(hub, tmp_path / "cache", "org/name")
    blob = blob_of(snapshot)
    change(blob)
    if how == "import":
        done = cakefs.run("import", "hub-cache")
        assert "model.safetensors does not have the bytes that its name promises" in done.stderr
        assert cakefs.json("ls") == []
        assert cakefs.json("status")["store"]["borrowed_bytes"] == 0
    hub.reset()
    done = cakefs.run("add", "org/name")
    assert how == "import" or f"{blob} does not have the bytes that its name promises" in done.stderr
    assert cakefs.json("ls")[0]["borrowed_bytes"] == 0
    cakefs.run("pull", "org/name")
    assert hub.sent("org/name/model.safetensors") >= len(published)
    assert cakefs.json("ls")[0]["verified"]


def test_a_small_file_that_is_not_what_its_name_says(hub: Hub, cakefs: Cakefs, tmp_path: Path) -> None:
    hub.add_repo("org/name", {"config.json": CONFIG, "model.safetensors": big()})
    snapshot = download(hub, tmp_path / "cache", "org/name")
    change(blob_of(snapshot, "config.json"))
    hub.reset()
    cakefs.run("add", "org/name")
    assert hub.sent() == hub.sent("org/name/config.json") == len(CONFIG)


# A file that lends, and changes


def truncate(path: Path) -> None:
    path.chmod(0o644)
    os.truncate(path, path.stat().st_size // 2)


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[:-1] + b"!")
    os.replace(other, path)


def touch(path: Path) -> None:
    os.utime(path)


CHANGES: Mapping[str, Callable[[Path], None]] = {
    "changed": change,
    "truncated": truncate,
    "deleted": Path.unlink,
    "replaced": replace,
    "touched": touch,
}


@needs_fuse
@pytest.mark.parametrize("how", CHANGES)
def test_a_file_that_lends_and_is_changed_while_open(hub: Hub, cakefs: Cakefs, tmp_path: Path, how: str) -> None:
    published = big()
    hub.add_repo("org/name", {"config.json": CONFIG, "model.safetensors": published})
    blob = blob_of(download(hub, tmp_path / "cache", "org/name"))
    cakefs.run("import", "hub-cache")
    hub.reset()
    with cakefs.mounted() as models:
        path = models / "org/name/model.safetensors"
        fd = os.open(path, os.O_RDONLY)
        try:
            # One page of each tensor is read, and its chunk checked: the rest of that chunk must not be trusted later.
            assert os.pread(fd, 4096, 8192) == published[8192:12288]
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            assert hub.sent() == 0
            CHANGES[how](blob)
            got = b"".join(os.pread(fd, 1 << 16, at) for at in range(0, len(published), 1 << 16))
            assert got == published
        finally:
            os.close(fd)
        assert hub.sent("org/name/model.safetensors") > 0
    cakefs.run("verify", "org/name")
    cakefs.run("pull", "org/name")
    (model,) = cakefs.json("ls")
    assert model["verified"] and model["borrowed_bytes"] == 0


@pytest.mark.parametrize("how", CHANGES)
def test_a_file_that_lends_and_is_changed_between(hub: Hub, cakefs: Cakefs, tmp_path: Path, how: str) -> None:
    published = big()
    hub.add_repo("org/name", {"model.safetensors": published})
    blob = blob_of(download(hub, tmp_path / "cache", "org/name"))
    cakefs.run("import", "hub-cache")
    CHANGES[how](blob)
    hub.reset()
    listed = cakefs.run("ls", "--json")
    (model,) = json.loads(listed.stdout)
    assert not model["complete"] and str(blob) in listed.stderr
    cakefs.run("verify", "org/name")
    cakefs.run("pull", "org/name")
    if how == "touched":
        assert hub.sent() == 0, "it was hashed anew, and is what its name says"
    else:
        assert hub.sent() >= len(published) - 10_000
    assert cakefs.json("ls")[0]["verified"]


def test_verify_counts_what_is_gone_as_missing_and_not_as_bad(hub: Hub, cakefs: Cakefs, tmp_path: Path) -> None:
    hub.add_repo("org/name", {"model.safetensors": big()})
    blob = blob_of(download(hub, tmp_path / "cache", "org/name"))
    cakefs.run("import", "hub-cache")
    blob.unlink()
    assert cakefs.json("verify", "org/name")["org/name"]["bad"] == []


def test_a_rotten_byte_is_fetched_and_the_users_file_not_mended(hub: Hub, cakefs: Cakefs, tmp_path: Path) -> None:
    """The disk gives another byte, and size and time are what they were."""
    published = big()
    hub.add_repo("org/name", {"model.safetensors": published})
    blob = blob_of(download(hub, tmp_path / "cache", "org/name"))
    cakefs.run("import", "hub-cache")
    status = blob.stat()
    change(blob)
    os.utime(blob, ns=(status.st_atime_ns, status.st_mtime_ns))
    rotten = blob.read_bytes()
    done = cakefs.run("verify", "org/name", "--repair")
    assert "BAD" in done.stdout
    cakefs.run("pull", "org/name")
    assert cakefs.json("ls")[0]["verified"] and blob.read_bytes() == rotten


def test_what_is_borrowed_is_not_stored_again_by_a_pull(hub: Hub, cakefs: Cakefs, tmp_path: Path) -> None:
    tensors = {f"model.layers.{i}.w": tensor(i, MIB // 2) for i in range(3)}
    hub.add_repo("org/base", {"model.safetensors": single(tensors)})
    tune = single(tensors | {"model.layers.2.w": tensor(9, MIB // 2)})
    hub.add_repo("org/tune", {"model.safetensors": tune})
    snapshot = download(hub, tmp_path / "cache", "org/base")
    cakefs.run("import", "hub-cache")
    cakefs.run("add", "org/tune")
    cakefs.run("pull", "org/tune")
    assert taken_on_disk(cakefs.store) < 2 * MIB + 20_000, "the layer that differs"
    refused = cakefs.run("export", "org/base", str(tmp_path / "out"), "--reflink", "always", check=False)
    assert refused.returncode == 2 and "are borrowed" in refused.stderr
    blob_of(snapshot).unlink()
    cakefs.run("export", "org/tune", str(tmp_path / "out"))
    assert (tmp_path / "out/model.safetensors").read_bytes() == tune


def test_a_blob_in_two_files_survives_the_loss_of_one(hub: Hub, cakefs: Cakefs, tmp_path: Path) -> None:
    same = big()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(same)
        cakefs.run("import", str(tmp_path / name))
    (tmp_path / "one/model.safetensors").unlink()
    assert [m["complete"] for m in cakefs.json("ls")] == [True, True]
    (tmp_path / "two/model.safetensors").unlink()
    assert [m["complete"] for m in cakefs.json("ls")] == [False, False]


def test_gc_rm_and_quarantine_leave_the_users_files_alone(hub: Hub, cakefs: Cakefs, tmp_path: Path) -> None:
    hub.add_repo("org/name", {"config.json": CONFIG, "model.safetensors": big()})
    snapshot = download(hub, tmp_path / "cache", "org/name")
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "cache").rglob("*") if p.is_file()}
    cakefs.run("import", "hub-cache")
    cakefs.run("verify", "org/name", "--repair")
    cakefs.run("evict", "org/name")
    cakefs.run("rm", "org/name")
    freed = cakefs.json("gc")
    assert freed["bytes"] < 100_000
    assert cakefs.json("status")["store"]["borrowed_bytes"] == 0
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "cache").rglob("*") if p.is_file()} == before
    assert blob_of(snapshot).exists()


@needs_fuse
def test_an_idle_mount_keeps_no_deleted_file_open(hub: Hub, cakefs: Cakefs, tmp_path: Path) -> None:
    hub.add_repo("org/name", {"model.safetensors": big()})
    blob = blob_of(download(hub, tmp_path / "cache", "org/name"))
    cakefs.run("import", "hub-cache")
    with cakefs.mounted() as models:
        (models / "org/name/model.safetensors").read_bytes()
        files = Path(f"/proc/{cakefs.status()['pid']}/fd")

        def is_open() -> bool:
            return any(os.readlink(fd).startswith(str(blob)) for fd in files.iterdir() if fd.is_symlink())

        assert is_open()
        blob.unlink()
        deadline = time.monotonic() + 60
        while is_open():
            assert time.monotonic() < deadline, "the disk would stay full"
            time.sleep(0.1)


# Directories and files


@needs_fuse
def test_a_directory_is_a_model(cakefs: Cakefs, tmp_path: Path) -> None:
    tensors = llama(4, width=512)
    home = tmp_path / "mine"
    home.mkdir()
    for name, data in (sharded(tensors, 3) | {"config.json": CONFIG, ".hidden": b"x"}).items():
        (home / name).write_bytes(data)
    done = cakefs.json("import", str(home), "--as", "me/mine")
    assert done["borrowed_bytes"] > 1_000_000 and done["models"][0]["name"] == "me/mine"
    with cakefs.mounted("--offline") as models:
        assert (models / "me/mine/model.safetensors").read_bytes() == single(tensors)
        assert (models / ".cakefs/original/me/mine/config.json").read_bytes() == CONFIG
    assert taken_on_disk(cakefs.store) < 20_000


def test_add_of_a_path_does_the_same(cakefs: Cakefs, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/model.safetensors").write_bytes(big())
    added = cakefs.json("add", str(tmp_path / "mine"), "--offline")
    assert added["name"] == "mine" and added["missing_bytes"] == 0 and added["fetched_bytes"] == 0
    added = cakefs.json("add", str(tmp_path / "mine/model.safetensors"), "--as", "alone")
    assert added["name"] == "alone" and added["missing_bytes"] == 0
    refused = cakefs.run("add", str(tmp_path / "absent"), check=False)
    assert refused.returncode == 10 and "does not exist" in refused.stderr


def test_a_directory_that_was_changed_is_imported_again(cakefs: Cakefs, tmp_path: Path) -> None:
    home = tmp_path / "mine"
    home.mkdir()
    (home / "model.safetensors").write_bytes(big(1))
    (home / "notes.txt").write_bytes(b"first")
    cakefs.run("import", str(home))
    (home / "model.safetensors").write_bytes(big(2))
    (home / "notes.txt").unlink()
    again = cakefs.json("import", str(home))
    assert again["models"][0]["changed"] and again["models"][0]["local_bytes"] == again["models"][0]["size"]
    assert [f["path"] for f in cakefs.json("show", "mine")["files"]] == ["model.safetensors"]


@needs_fuse
@pytest.mark.parametrize("offline", [True, False])
def test_a_file_that_vanished_is_named(cakefs: Cakefs, tmp_path: Path, offline: bool) -> None:
    home = tmp_path / "mine"
    home.mkdir()
    (home / "model.safetensors").write_bytes(big())
    cakefs.run("import", str(home))
    (home / "model.safetensors").unlink()
    with cakefs.mounted(*(["--offline"] * offline)) as models:
        with (models / "mine/model.safetensors").open("rb") as file, pytest.raises(OSError):
            file.seek(MIB)
            file.read(4096)
        assert str(home / "model.safetensors") in cakefs.log()
    done = cakefs.run("pull", "mine", check=False, **({"HF_HUB_OFFLINE": "1"} if offline else {}))
    assert done.returncode and str(home / "model.safetensors") in done.stderr


def test_a_file_that_came_back_is_read_again(cakefs: Cakefs, tmp_path: Path) -> None:
    home = tmp_path / "mine"
    home.mkdir()
    file = home / "model.safetensors"
    file.write_bytes(big())
    cakefs.run("import", str(home))
    file.rename(tmp_path / "away")
    assert not cakefs.json("ls")[0]["complete"]
    (tmp_path / "away").rename(file)
    cakefs.run("import", str(home))
    (model,) = cakefs.json("ls")
    assert model["complete"] and model["borrowed_bytes"] > 6 * MIB


def test_what_is_in_a_directory_is_not_fetched_from_the_hub(hub: Hub, cakefs: Cakefs, tmp_path: Path) -> None:
    ggml = gguf.make([], [gguf.info(n, (MIB // 4,), 0, i * MIB) for i, n in enumerate("ab")], os.urandom(2 * MIB))
    files = {"model.safetensors": big(), "model-q8.gguf": ggml, "model.onnx": os.urandom(3 * MIB)}
    (tmp_path / "mine").mkdir()
    for name, data in files.items():
        (tmp_path / "mine" / name).write_bytes(data)
    cakefs.run("import", str(tmp_path / "mine"))
    hub.add_repo("org/name", files)
    added = cakefs.json("add", "org/name")
    assert added["fetched_bytes"] == added["missing_bytes"] == 0 and hub.sent() == 0


def test_an_import_goes_on_where_it_was_interrupted(
    hub: Hub, cakefs: Cakefs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo("org/name", {f"part{i}/model.safetensors": big(i, tensors=1 + i) for i in range(3)})
    download(hub, tmp_path / "cache", "org/name")
    read: list[str] = []

    ended, failing = threading.Semaphore(0), True

    def scan(stamp: Stamp, *rest: Any) -> Any:
        """The smallest fails, after the others."""
        if stamp.size < 3 * MIB and failing:
            assert ended.acquire(timeout=60) and ended.acquire(timeout=60)
            raise StoreFull("no room")
        read.append(str(stamp))
        done = genuine_scan(stamp, *rest)
        ended.release()
        return done

    monkeypatch.setattr("cakefs.engine.disk.adopt.scan", scan)
    assert cakefs.run("import", "hub-cache", check=False).returncode == StoreFull.exit_code
    assert cakefs.json("ls") == [] and len(read) == 2
    failing = False
    cakefs.run("import", "hub-cache")
    assert len(set(read)) == len(read) == 3
    assert cakefs.json("ls")[0]["verified"]


def test_models_are_read_side_by_side_and_what_two_of_them_have_once(
    hub: Hub, cakefs: Cakefs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seed in (("org/a", 0), ("org/b", 1), ("org/c", 0)):
        hub.add_repo(name, {"model.safetensors": big(seed)})
        download(hub, tmp_path / "cache", name)
    together = threading.Barrier(2)
    read: list[Stamp] = []

    def scan(stamp: Stamp, *rest: Any) -> Any:
        read.append(stamp)
        together.wait(60)  # raises unless two come
        return genuine_scan(stamp, *rest)

    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr("cakefs.engine.disk.adopt.scan", scan)
    done = cakefs.json("import", "hub-cache")
    assert [model["name"] for model in done["models"]] == ["org/a", "org/b", "org/c"]
    assert len(read) == 2
    assert all(model["verified"] for model in cakefs.json("ls"))


def test_what_is_wrong_with_one_of_many_is_named_in_their_order(hub: Hub, cakefs: Cakefs, tmp_path: Path) -> None:
    for name in ("org/a", "org/b", "org/c"):
        hub.add_repo(name, {"model.safetensors": big(ord(name[-1]))})
        snapshot = download(hub, tmp_path / "cache", name)
        if name != "org/b":
            change(blob_of(snapshot))
    done = cakefs.json("import", "hub-cache")
    assert [model["name"] for model in done["models"]] == ["org/b"]
    assert [one["what"] for one in done["skipped"]] == ["org/a", "org/c"]


@needs_fuse
def test_imports_mounts_and_gc_at_once(hub: Hub, cakefs: Cakefs, tmp_path: Path) -> None:
    """Many processes on one store: nothing lost, nothing double, nothing stuck."""
    models = {f"org/m{i}": {"model.safetensors": big(i // 2), "config.json": CONFIG} for i in range(4)}
    for name, files in models.items():
        hub.add_repo(name, files)
        download(hub, tmp_path / "cache", name)
    cakefs.run("add", "org/m0")
    with cakefs.mounted() as mount:

        def command(*arguments: str) -> "subprocess.Popen[bytes]":
            return subprocess.Popen([sys.executable, "-m", "cakefs", *arguments], env=cakefs.environment)

        running = [command("import", "hub-cache", *copy) for copy in ([], [], ["--copy"])]
        running += [command("gc"), command("add", "org/m3"), command("pull", "org/m0")]
        assert [process.wait(100) for process in running] == [0] * len(running)
        cakefs.run("gc")
        for name, files in models.items():
            for path, data in files.items():
                assert (mount / name / path).read_bytes() == data
    assert all(model["verified"] for model in cakefs.json("ls"))
    assert not any((cakefs.store / "partial").iterdir())


def test_copies_are_our_own(hub: Hub, cakefs: Cakefs, tmp_path: Path) -> None:
    published = big()
    hub.add_repo("org/name", {"model.safetensors": published})
    snapshot = download(hub, tmp_path / "cache", "org/name")
    cakefs.run("import", "hub-cache")
    done = cakefs.json("import", "hub-cache", "--copy")
    assert done["stored_bytes"] > 6 * MIB
    shutil.rmtree(tmp_path / "cache")
    hub.reset()
    (model,) = cakefs.json("ls")
    assert model["verified"] and model["borrowed_bytes"] == 0
    assert cakefs.json("verify", "org/name")["org/name"]["bad"] == []
    cakefs.run("pull", "org/name")
    assert hub.sent() == 0 and not snapshot.exists()


@needs_root
@pytest.mark.parametrize("first", [True, False])
def test_copies_from_another_file_system(hub: Hub, cakefs: Cakefs, tmp_path: Path, first: bool) -> None:
    """Borrowed before, or not: the kernel copies no range from one file system to another."""
    hub.add_repo("org/name", {"model.safetensors": big()})
    download(hub, tmp_path / "cache", "org/name")
    with small_disk(tmp_path / "disk", "64m") as disk:
        os.chmod(disk, 0o700)
        elsewhere = {"CAKEFS_STORE": str(disk / "store")}
        if not first:
            cakefs.run("import", "hub-cache", **elsewhere)
        cakefs.run("import", "hub-cache", "--copy", **elsewhere)
        (model,) = json.loads(cakefs.run("ls", "--json", **elsewhere).stdout)
        assert model["verified"] and model["borrowed_bytes"] == 0 and model["local_bytes"] > 6 * MIB


def test_what_was_borrowed_and_is_lost_is_fetched_again_by_a_repair(hub: Hub, cakefs: Cakefs, tmp_path: Path) -> None:
    hub.add_repo("org/name", {"model.safetensors": big()})
    download(hub, tmp_path / "cache", "org/name")
    cakefs.run("add", "org/name")
    shutil.rmtree(tmp_path / "cache")
    assert cakefs.json("verify", "org/name", "--repair")["org/name"]["fetched_bytes"] > 6 * MIB
    assert cakefs.json("ls")[0]["verified"]


@needs_fuse
def test_a_mount_of_cakefs_lends_nothing(hub: Hub, cakefs: Cakefs, tmp_path: Path) -> None:
    hub.add_repo("org/name", {"config.json": CONFIG, "model.safetensors": big()})
    cakefs.run("add", "org/name")
    with cakefs.mounted() as models:
        done = cakefs.run("import", str(models / "org/name"), "--as", "loop", check=False)
        assert done.returncode == 2 and "served by cakefs itself" in done.stderr
        cache = models / ".cakefs/hub"
        (tmp_path / "link").symlink_to(cache)
        done = cakefs.run("import", "hub-cache", check=False, HF_HUB_CACHE=str(tmp_path / "link"))
        assert done.returncode == 2 and "is what cakefs shows" in done.stderr
        home = tmp_path / "home"  # Whoever has the mount's cache in HF_HUB_CACHE may have had another one before.
        done = cakefs.run("import", "hub-cache", check=False, HF_HUB_CACHE=str(cache), HF_HOME=str(home))
        assert done.returncode == 10 and f"no Hub cache at {home}/hub" in done.stderr
        assert cakefs.json("add", "org/name")["changed"] is False


def test_odd_things_in_a_directory_are_skipped_and_named(cakefs: Cakefs, tmp_path: Path) -> None:
    home = tmp_path / "mine"
    home.mkdir()
    (home / "model.safetensors").write_bytes(big())
    (home / "dangling").symlink_to("nowhere")
    os.mkfifo(home / "fifo")
    (home / "empty.txt").touch()
    done = cakefs.json("import", str(home))
    assert {Path(s["what"]).name: s["why"] for s in done["skipped"]} == {
        "dangling": "a link to nothing",
        "fifo": "no regular file",
    }
    assert {f["path"] for f in cakefs.json("show", "mine")["files"]} == {"model.safetensors", "empty.txt"}


# Ollama


def ollama_layer(root: Path, kind: str, data: bytes, **more: str) -> dict[str, object]:
    digest = hashlib.sha256(data).hexdigest()
    (root / "blobs").mkdir(parents=True, exist_ok=True)
    (root / "blobs" / f"sha256-{digest}").write_bytes(data)
    return {
        "mediaType": f"application/vnd.ollama.image.{kind}",
        "digest": f"sha256:{digest}",
        "size": len(data),
        **more,
    }


def ollama_model(root: Path, name: str, layers: list[dict[str, object]]) -> None:
    config = ollama_layer(root, "config", b'{"model_family": "llama"}')
    path = root / "manifests/registry.ollama.ai" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schemaVersion": 2, "config": config, "layers": layers}))


@needs_fuse
def test_models_of_ollama(cakefs: Cakefs, tmp_path: Path) -> None:
    root = tmp_path / "ollama"
    tensors = llama(2, width=512)
    layers = [ollama_layer(root, "tensor", single({n: t}), name=n) for n, t in tensors.items()]
    ollama_model(root, "library/tiny/1b", [*layers, ollama_layer(root, "json", CONFIG, name="config.json")])
    ggml = gguf.make([], [gguf.info(n, (MIB // 4,), 0, i * MIB) for i, n in enumerate("ab")], os.urandom(2 * MIB))
    ollama_model(root, "library/ggml/q8", [ollama_layer(root, "model", ggml)])
    opaque = b"NOT-GGUF" + os.urandom(3 * MIB)
    ollama_model(root, "me/own/latest", [ollama_layer(root, "model", opaque), ollama_layer(root, "template", b"{{ }}")])
    broken = ollama_layer(root, "model", b"GGUF gone")
    (root / "blobs" / str(broken["digest"]).replace(":", "-")).unlink()
    ollama_model(root, "library/broken/latest", [broken])
    done = json.loads(cakefs.run("import", "ollama", "--json", "--offline", OLLAMA_MODELS=str(root)).stdout)
    assert [m["name"] for m in done["models"]] == ["ollama/ggml:q8", "ollama/tiny:1b", "ollama/me/own:latest"]
    assert done["skipped"][0]["what"] == "ollama/broken:latest" and "is missing" in done["skipped"][0]["why"]
    with cakefs.mounted("--offline") as models:
        assert (models / "ollama/tiny:1b/model.safetensors").read_bytes() == single(tensors)
        assert (models / "ollama/tiny:1b/config.json").read_bytes() == CONFIG
        assert (models / "ollama/ggml:q8/model.gguf").read_bytes() == ggml
        assert (models / "ollama/me/own:latest/model.bin").read_bytes() == opaque
        assert (models / "ollama/me/own:latest/template").read_bytes() == b"{{ }}"
    assert [t["name"] for t in cakefs.json("show", "ollama/ggml:q8", "--tensors")["tensors"]] == ["a", "b"]
    assert taken_on_disk(cakefs.store) < 100_000
