"""list_repo by the real client of the Hub: what a listing holds, and each way it can fail."""

import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256

import huggingface_hub
import pytest
import trio

from cakefs.errors import AccessDenied, CakeError, InvalidFormat, NotFound, RemoteUnavailable, UserError
from cakefs.model import ByteRange, Listing, Locator, Published
from cakefs.remotes.base import make_listing, read
from cakefs.remotes.http import HttpRemote
from cakefs.remotes.hub import list_repo
from tests.hub import Hub
from tests.hub.odd import listening, saying

TOKEN = "hf_SecretSecretSecret"
FILES = {
    "model.safetensors": b"weights" * 1000,
    "config.json": b"{}",
    "deep/er/tokenizer #1?.json": b"[1]",
    "deep/größe.bin": b"\x00" * 99,
}


@pytest.fixture(scope="module")
def module_hub() -> Iterator[Hub]:
    with Hub(page_size=3) as hub:
        hub.add_repo("org/name", FILES)
        hub.add_repo("org/gated", FILES, gated=True, token=TOKEN)
        hub.add_repo("org/private", FILES, private=True, token=TOKEN)
        hub.add_repo("org/other", FILES, token="hf_other")
        yield hub
        huggingface_hub.close_session()


@pytest.fixture
def hub(module_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    module_hub.reset()
    yield module_hub
    module_hub.clear_faults()


def listed(hub: Hub, repo: str = "org/name", revision: str | None = None, token: str | None = None) -> Listing:
    async def main() -> Listing:
        with trio.fail_after(60):
            return await list_repo(repo, revision, endpoint=hub.endpoint, token=token)

    return trio.run(main)


def test_a_listing_names_content_by_the_best_hash_and_pins_the_commit(hub: Hub) -> None:
    listing = listed(hub)
    commit = hub.api.repos["org/name"].branches["main"]
    assert (listing.origin, listing.revision, listing.requested) == (f"{hub.endpoint}/org/name", commit, "main")
    assert [f.path for f in listing.files] == sorted(FILES)
    files = {f.path: f for f in listing.files}
    for path, data in FILES.items():
        assert files[path].size == len(data)
        assert files[path].validator == ""
        assert files[path].url.startswith(f"{hub.endpoint}/org/name/resolve/{commit}/")
    digest = sha256(FILES["model.safetensors"]).hexdigest()
    assert files["model.safetensors"].identity == f"sha256:{digest}"
    assert files["model.safetensors"].sha256 == digest
    assert files["config.json"].identity == "git:9e26dfeeb6e641a33dae4961196235bdb965b21b"
    assert files["config.json"].sha256 == ""


def test_a_listing_follows_the_pages(hub: Hub) -> None:
    assert len(listed(hub).files) == len(FILES)
    assert sum("/tree/" in r.target for r in hub.requests) == 2


def test_every_file_listed_can_be_fetched(hub: Hub) -> None:
    listing = listed(hub)

    async def main() -> None:
        async with HttpRemote() as http:
            for file in listing.files:
                data = await read(http, Locator(file.url, file.size, file.validator), ByteRange(0, file.size))
                assert data == FILES[file.path]

    trio.run(main)


def test_a_xet_hash_names_a_file_without_a_sha256(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.hub.repos import Entry

    info = Entry.info
    monkeypatch.setattr(Entry, "info", lambda self: {**info(self), "xetHash": "ab" * 32})
    identities = {f.path: f.identity for f in listed(hub).files}
    assert identities["config.json"] == "xet:" + "ab" * 32
    assert identities["model.safetensors"].startswith("sha256:")


def test_revisions(hub: Hub) -> None:
    first = hub.add_repo("org/moving", {"a": b"1"})
    second = hub.add_repo("org/moving", {"a": b"22"})
    pr = hub.add_repo("org/moving", {"a": b"333"}, branch="refs/pr/1")
    assert listed(hub, "org/moving").revision == second
    assert listed(hub, "org/moving", first).revision == first
    assert listed(hub, "org/moving", first).files[0].size == 1
    assert listed(hub, "org/moving", "refs/pr/1").revision == pr
    assert listed(hub, "org/moving", "refs/pr/1").requested == "refs/pr/1"


def test_an_empty_repository(hub: Hub) -> None:
    hub.add_repo("org/empty", {})
    assert listed(hub, "org/empty").files == ()


# -- who may see what --------------------------------------------------------------------------------------------------


def failure(hub: Hub, kind: type[CakeError], repo: str = "org/name", **arguments: str) -> CakeError:
    with pytest.raises(kind) as caught:
        listed(hub, repo, **arguments)
    error = caught.value
    assert type(error) is kind
    assert error.message.isprintable()
    assert TOKEN not in error.message + error.hint + repr(error)
    return error


def test_an_unknown_repository(hub: Hub) -> None:
    error = failure(hub, NotFound, "org/none")
    assert error.message.startswith(f"org/none not found on {hub.endpoint.removeprefix('http://')} (401: ")
    assert "HF_TOKEN" in error.hint
    assert "(404: " in failure(hub, NotFound, "org/none", token=TOKEN).message


def test_an_unknown_revision(hub: Hub) -> None:
    error = failure(hub, NotFound, revision="nope")
    assert "org/name on" in error.message and "no revision 'nope'" in error.message


def test_a_private_repository(hub: Hub) -> None:
    failure(hub, NotFound, "org/private")
    failure(hub, NotFound, "org/private", token="hf_other")
    assert len(listed(hub, "org/private", token=TOKEN).files) == len(FILES)


def test_a_gated_repository_can_be_listed_by_everyone(hub: Hub) -> None:
    """Its files are refused later, with the hint to accept the licence."""
    assert len(listed(hub, "org/gated").files) == len(FILES)


def test_a_gated_repository_whose_listing_is_refused(hub: Hub) -> None:
    hub.fault("403", "org/gated", times=None, stage="api", headers={"X-Error-Code": "GatedRepo"})
    error = failure(hub, AccessDenied, "org/gated", token=TOKEN)
    assert "refused org/gated (403: " in error.message
    assert "accept its licence" in error.hint


def test_a_token_that_the_server_repeats_is_not_shown_in_part_either(hub: Hub) -> None:
    hub.fault("403", "org/name", stage="api", headers={"X-Error-Message": "x" * 190 + TOKEN})
    error = failure(hub, AccessDenied, token=TOKEN)
    assert "x" * 100 in error.message and TOKEN[:6] not in error.message


def test_a_disabled_repository(hub: Hub) -> None:
    message = "Access to this resource is disabled."
    hub.fault("403", times=None, stage="api", headers={"X-Error-Message": message})
    assert message in failure(hub, AccessDenied).message


def test_a_bad_token(hub: Hub) -> None:
    error = failure(hub, AccessDenied, token="hf_wrong")
    assert "(401: Invalid credentials in Authorization header)" in error.message
    assert "hf auth login" in error.hint


def test_only_the_given_token_is_sent(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    listed(hub)
    assert not any(r.authorized for r in hub.requests)
    hub.reset()
    listed(hub, token="hf_test")
    assert all(r.authorized for r in hub.requests)


def test_a_token_that_cannot_be_sent(hub: Hub) -> None:
    assert "characters that no token has" in failure(hub, UserError, token=TOKEN + "\n" + TOKEN).message


# -- trouble -----------------------------------------------------------------------------------------------------------


def test_a_rate_limit(hub: Hub) -> None:
    hub.fault("429", stage="api", headers={"RateLimit": '"api";r=0;t=255'})
    error = failure(hub, RemoteUnavailable)
    assert isinstance(error, RemoteUnavailable)
    assert error.retry_after == 256
    assert "(429: " in error.message


@pytest.mark.parametrize(
    ("kind", "options"),
    [("429", {"retry_after": 0.2}), ("503", {}), ("drop", {}), ("reset", {"after": 10})],
)
def test_trouble_that_passes_is_not_seen(hub: Hub, kind: str, options: dict[str, float]) -> None:
    fault = hub.fault(kind, "org/name", stage="api", **options)  # type: ignore[arg-type]
    assert listed(hub).files
    assert fault.hits == 1


@pytest.mark.parametrize("status", ["500", "502", "503"])
def test_a_hub_in_trouble(hub: Hub, status: str) -> None:
    hub.fault(status, times=None, stage="api")
    assert f"cannot list org/name now ({status}: " in failure(hub, RemoteUnavailable).message


@pytest.mark.parametrize("status", ["400", "418"])
def test_an_answer_that_nobody_expects(hub: Hub, status: str) -> None:
    hub.fault(status, times=None, stage="api")
    assert f"({status}: " in failure(hub, InvalidFormat).message


def test_a_connection_that_breaks(hub: Hub) -> None:
    hub.fault("drop", stage="api", times=None)
    assert "no answer from localhost:" in failure(hub, RemoteUnavailable).message


def test_nobody_there(hub: Hub) -> None:
    hub.down()
    try:
        assert "Connection refused" in failure(hub, RemoteUnavailable).message
    finally:
        hub.up()


def test_a_hub_that_never_answers(hub: Hub) -> None:
    fault = hub.fault("stall", stage="api", times=None)

    async def main() -> None:
        with pytest.raises(RemoteUnavailable, match=r"no list of org/name from localhost:\d+ within 0 s"):
            await list_repo("org/name", endpoint=hub.endpoint, token=None, timeout_s=0.3)

    trio.run(main)
    fault.release()
    hub.wait_for(count=3)  # The abandoned question goes on in its thread, to its end.


def test_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = failure(hub, RemoteUnavailable)
    assert error.message == "org/name cannot be listed offline"
    assert "HF_HUB_OFFLINE" in error.hint
    assert hub.requests == []


@pytest.mark.parametrize("repo", ["a/b/c", "org/..", "-x", "org/na me", ""])
def test_a_name_that_cannot_be_one(hub: Hub, repo: str) -> None:
    assert "not the name of a model" in failure(hub, UserError, repo).message
    assert hub.requests == []


# -- answers that break their format -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a//b", "a/../../b", "nul\0.bin", "\udc80", "x" * 300, ""])
def test_a_path_that_leaves_the_repository(hub: Hub, path: str) -> None:
    hub.add_repo("org/evil", {path: b"1"})
    assert "lists an unsafe path: " in failure(hub, InvalidFormat, "org/evil").message


@pytest.mark.parametrize("paths", [["a", "a/b"], ["a/b/c", "a/b"], ["a", "a"]])
def test_paths_that_cannot_be_side_by_side(paths: list[str]) -> None:
    with pytest.raises(InvalidFormat, match="origin lists "):
        make_listing("origin", "", "", [Published(path, 1, "git:1", "http://x/") for path in paths])


@pytest.mark.parametrize(
    "change",
    [{"oid": "xyz"}, {"oid": None}, {"size": "5"}, {"size": -1}, {"path": 5}, {"lfs": {"oid": "1"}}],
    ids=str,
)
def test_a_malformed_entry(hub: Hub, monkeypatch: pytest.MonkeyPatch, change: dict[str, object]) -> None:
    from tests.hub.repos import Entry

    info = Entry.info
    monkeypatch.setattr(Entry, "info", lambda self: {**info(self), **change})
    message = failure(hub, InvalidFormat).message
    assert "org/name" in message and ("unexpected answer" in message or "malformed" in message)


def test_a_listing_without_end_is_none(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cakefs.remotes.hub.MAX_ENTRIES", len(FILES))  # without its directories
    assert f"has more than {len(FILES)} files" in failure(hub, InvalidFormat).message


def test_an_answer_of_a_million_levels_is_none(hub: Hub) -> None:
    deep = b"[" * 1_000_000
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(deep)}\r\n\r\n"
    with listening(saying(head.encode() + deep)) as port:
        hub.fault("redirect", stage="api", to=f"http://127.0.0.1:{port}/")
        assert "unexpected answer for org/name" in failure(hub, InvalidFormat).message


def test_the_token_does_not_follow_a_listing_that_is_redirected(hub: Hub) -> None:
    hub.fault("redirect", stage="api", to=hub.plain("elsewhere", b"{}"))
    failure(hub, InvalidFormat, token="hf_test")
    first, second = hub.requests
    assert (first.stage, first.authorized) == ("api", True)
    assert (second.path, second.authorized) == ("elsewhere", False)


def test_the_token_does_not_follow_a_listing_that_goes_on_elsewhere(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of a mirror may that has two names."""
    with Hub(page_size=3) as other:
        other.add_repo("org/name", FILES)
        monkeypatch.setattr(hub.api, "endpoint", other.endpoint)
        assert len(listed(hub, token="hf_test").files) == len(FILES)
        assert [r.authorized for r in hub.requests] == [True, True]
        assert [r.authorized for r in other.requests] == [False]


def test_the_client_is_imported_only_when_it_is_needed() -> None:
    script = "import sys, cakefs.remotes.hub; sys.exit(any(m.startswith('huggingface_hub') for m in sys.modules))"
    subprocess.run([sys.executable, "-c", script], check=True)
