"""The test hub itself: the real client must accept it, and its HTTP, its link and its end must be clean."""

import hashlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub import HfApi, errors, get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.hf_api import RepoFile

from tests.hub import Hub
from tests.hub.ask import ask

WEIGHTS = os.urandom(300_000)
FILES: dict[str, bytes | Path] = {
    "config.json": b'{"a": 1}',
    "empty.txt": b"",
    "model.safetensors": WEIGHTS,
    "sub/dir/odd name+é.json": b"{}",
    "sub/model.safetensors": WEIGHTS[:1000],
}


def link(hub: Hub, path: str = "model.safetensors", **headers: str) -> str:
    """A signed URL of the CDN."""
    return str(ask(f"{hub.endpoint}/org/name/resolve/main/{path}", "HEAD", **headers).headers["Location"])


# The real client


def test_snapshot_download_gives_every_file_as_it_is(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add_repo("org/name", FILES)
    got = Path(snapshot_download("org/name", endpoint=hub.endpoint, cache_dir=tmp_path, token=False))
    assert got.name == commit
    assert {p.relative_to(got).as_posix(): p.read_bytes() for p in got.rglob("*") if p.is_file()} == FILES
    assert hub.sent("*.safetensors") == len(WEIGHTS) + 1000
    assert hub.sent() == sum(len(data) for data in FILES.values() if isinstance(data, bytes))


def test_listing_is_paged_and_complete(tmp_path: Path) -> None:
    with Hub(page_size=2) as hub:
        commit = hub.add_repo("org/name", FILES)
        entries = list(HfApi(hub.endpoint, token=False).list_repo_tree("org/name", recursive=True))
        files = {e.path: e for e in entries if isinstance(e, RepoFile)}
        assert list(files) == sorted(FILES)
        assert [e.path for e in entries if e.path not in files] == ["sub", "sub/dir"]
        assert len(hub.requests) == 4
        large = files["model.safetensors"]
        assert large.lfs and large.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest() and large.size == len(WEIGHTS)
        top = HfApi(hub.endpoint, token=False).list_repo_tree("org/name", revision=commit[:8])
        assert [e.path for e in top] == ["config.json", "empty.txt", "model.safetensors", "sub"]


def test_an_older_commit_stays_served(hub: Hub, tmp_path: Path) -> None:
    first = hub.add_repo("org/name", {"config.json": b"old"})
    second = hub.add_repo("org/name", {"config.json": b"new"})
    api = HfApi(hub.endpoint, token=False)
    assert api.model_info("org/name").sha == second
    assert api.model_info("org/name", revision=first).sha == first
    assert api.list_repo_refs("org/name").branches[0].target_commit == second
    for revision, data in ((first, b"old"), ("main", b"new")):
        file = hf_hub_download(
            "org/name", "config.json", revision=revision, endpoint=hub.endpoint, cache_dir=tmp_path, token=False
        )
        assert Path(file).read_bytes() == data


def test_metadata_of_lfs_and_of_small_files(hub: Hub) -> None:
    commit = hub.add_repo("org/name", FILES)
    large = get_hf_file_metadata(hf_hub_url("org/name", "model.safetensors", endpoint=hub.endpoint), token=False)
    assert (large.commit_hash, large.size) == (commit, len(WEIGHTS))
    assert large.etag == hashlib.sha256(WEIGHTS).hexdigest()
    assert large.location.startswith(hub.cdn_endpoint) and "Signature=" in large.location
    small = get_hf_file_metadata(hf_hub_url("org/name", "config.json", endpoint=hub.endpoint), token=False)
    assert (small.commit_hash, small.size) == (commit, 8)
    assert small.etag == hashlib.sha1(b'blob 8\0{"a": 1}').hexdigest()
    siblings = HfApi(hub.endpoint, token=False).model_info("org/name", files_metadata=True).siblings or []
    assert {s.rfilename: s.blob_id for s in siblings}["config.json"] == small.etag
    (found,) = HfApi(hub.endpoint, token=False).get_paths_info("org/name", ["config.json", "none"], expand=True)
    assert isinstance(found, RepoFile) and (found.path, found.blob_id) == ("config.json", small.etag)
    assert found.last_commit and found.last_commit.oid == commit


@pytest.mark.parametrize(
    ("repo", "revision", "file", "token", "expected"),
    [
        ("org/none", "main", "config.json", False, errors.RepositoryNotFoundError),
        ("org/private", "main", "config.json", False, errors.RepositoryNotFoundError),
        ("org/private", "main", "config.json", "hf_other", errors.RepositoryNotFoundError),
        ("org/gated", "main", "config.json", False, errors.GatedRepoError),
        ("org/gated", "main", "model.safetensors", "hf_other", errors.GatedRepoError),
        ("org/name", "none", "config.json", False, errors.RevisionNotFoundError),
        ("org/name", "main", "none.json", False, errors.RemoteEntryNotFoundError),
        ("org/name", "main", "config.json", "hf_unknown", errors.HfHubHTTPError),
    ],
)
def test_refusals_are_the_right_exceptions(
    hub: Hub, repo: str, revision: str, file: str, token: str | bool, expected: type[Exception]
) -> None:
    hub.add_repo("org/name", FILES, token="hf_other")
    hub.add_repo("org/private", FILES, private=True)
    hub.add_repo("org/gated", FILES, gated=True)
    with pytest.raises(expected) as caught:
        get_hf_file_metadata(hf_hub_url(repo, file, revision=revision, endpoint=hub.endpoint), token=token)
    assert type(caught.value) is expected


def test_the_right_token_opens_and_never_leaves_the_hub(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("org/name", FILES, private=True, gated=True, token="hf_mine")
    snapshot_download("org/name", endpoint=hub.endpoint, cache_dir=tmp_path, token="hf_mine")
    assert {r.authorized for r in hub.requests if r.host == "localhost"} == {True}
    assert [r.authorized for r in hub.requests if r.host == "127.0.0.1"] == [False, False]
    ask(link(hub, Authorization="Bearer hf_mine"), Authorization="Bearer hf_mine")
    assert hub.requests[-1].stage == "cdn" and hub.requests[-1].authorized


def test_gated_metadata_are_readable(hub: Hub) -> None:
    commit = hub.add_repo("org/name", FILES, gated=True)
    api = HfApi(hub.endpoint, token=False)
    assert api.model_info("org/name").sha == commit and len(list(api.list_repo_tree("org/name"))) == 4
    with pytest.raises(errors.GatedRepoError):
        api.auth_check("org/name")


# HTTP


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(
    ("wanted", "status", "start", "stop"),
    [
        ("", 200, 0, 300_000),
        ("bytes=0-0", 206, 0, 1),
        ("bytes=5-199999", 206, 5, 200_000),
        ("bytes=299990-", 206, 299_990, 300_000),
        ("bytes=299990-400000", 206, 299_990, 300_000),
        ("bytes=-10", 206, 299_990, 300_000),
        ("bytes=-400000", 206, 0, 300_000),
        ("bytes=300000-", 416, 0, 0),
        ("bytes=5-4", 200, 0, 300_000),
        ("lines=1-2", 200, 0, 300_000),
    ],
)
def test_ranges(hub: Hub, tmp_path: Path, wanted: str, status: int, start: int, stop: int, on_disk: bool) -> None:
    (tmp_path / "file").write_bytes(WEIGHTS)
    reply = ask(hub.plain("a/b.bin", tmp_path / "file" if on_disk else WEIGHTS), Range=wanted)
    assert reply.status == status == hub.requests[0].status
    if status == 416:
        assert reply.headers["Content-Range"] == "bytes */300000"
        return
    assert reply.body == WEIGHTS[start:stop]
    assert reply.headers["Content-Range"] == (f"bytes {start}-{stop - 1}/300000" if status == 206 else None)
    assert (hub.requests[0].path, hub.requests[0].sent, hub.sent("a/*")) == ("a/b.bin", stop - start, stop - start)


def test_conditions_and_head(hub: Hub) -> None:
    url = hub.plain("f", WEIGHTS)
    head = ask(url, "HEAD", Range="bytes=1-2")
    assert (head.status, head.headers["Content-Length"], head.body) == (200, "300000", b"")
    etag = head.headers["ETag"]
    assert ask(url, If_None_Match=etag).status == 304
    assert ask(url, If_Range=etag, Range="bytes=1-2").status == 206
    assert ask(url, If_Range='"other"', Range="bytes=1-2").status == 200
    hub.plain("f", WEIGHTS[1:])
    assert ask(url, If_None_Match=etag).headers["ETag"] != etag
    bare = ask(hub.plain("g", WEIGHTS, etag="", ranges=False), Range="bytes=1-2")
    assert (bare.status, bare.headers["ETag"], bare.headers["Accept-Ranges"]) == (200, None, None)
    assert ask(url + "none").status == 404


def test_signed_urls_expire(hub: Hub) -> None:
    hub.add_repo("org/name", FILES)
    old = link(hub)
    assert ask(old).body == WEIGHTS
    assert ask(old.replace("Expires=1", "Expires=2")).status == 403
    hub.expire_links()
    assert (ask(old).status, ask(link(hub)).status) == (403, 200)
    hub.links.lifetime = -1
    assert ask(link(hub)).status == 403


def test_connections_are_kept(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(WEIGHTS)
    url = urlsplit(hub.plain("f", tmp_path / "file"))
    connection = http.client.HTTPConnection(url.netloc, timeout=20)
    for size in (10, 100_000, 300_000):
        connection.request("GET", url.path, headers={"Range": f"bytes=0-{size - 1}"})
        assert connection.getresponse().read() == WEIGHTS[:size]
    connection.close()
    assert hub.connections == 1 and [r.sent for r in hub.requests] == [10, 100_000, 300_000]


def test_what_an_aborted_client_never_got_is_not_counted(hub: Hub, tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.truncate(64 << 20)
    url = urlsplit(hub.plain("f", tmp_path / "file"))
    with socket.create_connection((url.hostname, url.port)) as client:
        client.sendall(f"GET {url.path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert client.recv(1 << 20)
    hub.down()  # waits for the connection's thread
    assert hub.requests[0].sent < 32 << 20


def test_rubbish_gets_400(hub: Hub) -> None:
    with socket.create_connection(("127.0.0.1", int(hub.cdn_endpoint.rpartition(":")[2]))) as client:
        client.sendall(b"rubbish\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 400 ")


# The link and the life of a hub


def test_down_and_up(hub: Hub) -> None:
    url = hub.plain("f", WEIGHTS)
    hub.fault("stall", "f")
    with socket.create_connection(("127.0.0.1", urlsplit(url).port)) as client:
        client.sendall(b"GET /plain/f HTTP/1.1\r\n\r\n")
        hub.wait_for("f")
        hub.down("cdn")
        assert client.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        ask(url)
    assert ask(hub.endpoint + "/api/models/none").status == 401
    hub.up()
    assert ask(url).body == WEIGHTS


def test_the_link_is_shared(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(WEIGHTS)
    urls = [hub.plain("f", WEIGHTS), hub.plain("g", tmp_path / "file")]
    hub.shape(rate=6e6, latency=0.01)
    start = time.monotonic()
    threads = [threading.Thread(target=ask, args=(url,)) for url in urls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - start >= 0.01 + 0.1 - 0.02  # the link may be ahead by its credit
    assert hub.sent() == 600_000


def test_closing_leaves_nothing_behind() -> None:
    before = threading.active_count()
    with Hub() as hub:
        url = urlsplit(hub.plain("f", WEIGHTS))
        idle = socket.create_connection((url.hostname, url.port))
        hub.fault("stall")
        stalled = socket.create_connection((url.hostname, url.port))
        stalled.sendall(b"GET /plain/f HTTP/1.1\r\n\r\n")
        hub.wait_for("f")
        hub.shape(rate=1000)
        slow = socket.create_connection((url.hostname, url.port))
        slow.sendall(b"GET /plain/f HTTP/1.1\r\n\r\n")
        hub.wait_for("f", count=2)
    for client in (idle, stalled, slow):
        client.close()
    assert threading.active_count() == before


def test_a_hub_in_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "org/name/sub").mkdir(parents=True)
    (tmp_path / "org/name/sub/model.safetensors").write_bytes(WEIGHTS)
    command = [sys.executable, "-m", "tests.hub", "--root", str(tmp_path), "--rate", "1e9"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as process:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        url = f"{said['endpoint']}/org/name/resolve/{said['repos']['org/name']}/sub/model.safetensors"
        assert ask(ask(url).headers["Location"]).body == WEIGHTS
        process.send_signal(signal.SIGTERM)
        assert json.loads(process.stdout.readline()) == {"requests": 2, "sent": len(WEIGHTS)}
    assert process.returncode == 0
