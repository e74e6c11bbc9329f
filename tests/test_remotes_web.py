"""list_url: one file, an index with its shards, URLs of the Hub, and servers that cannot be used."""

import json
import ssl
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256

import pytest
import trio

from cakefs.errors import AccessDenied, CakeError, InvalidFormat, NotFound, RemoteUnavailable, UserError
from cakefs.model import ByteRange, Listing, Locator, Published
from cakefs.remotes.base import read
from cakefs.remotes.http import HttpRemote, Probe
from cakefs.remotes.web import list_url
from tests.hub import Hub
from tests.hub.http import Answer

DATA = b"weights" * 1000
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


@pytest.fixture(scope="module")
def module_hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture
def hub(module_hub: Hub) -> Iterator[Hub]:
    module_hub.reset()
    yield module_hub
    module_hub.clear_faults()


def listed(url: str, hubs: tuple[str, ...] = (), **settings: float) -> Listing:
    async def main() -> Listing:
        async with HttpRemote(verify=NO_TLS, **settings) as http:  # type: ignore[arg-type]
            return await list_url(url, http, hubs=hubs)

    return trio.run(main)


def failure(kind: type[CakeError], url: str) -> CakeError:
    with pytest.raises(kind) as caught:
        listed(url)
    assert type(caught.value) is kind
    assert caught.value.message.isprintable()
    return caught.value


def probed(url: str) -> Probe:
    async def main() -> Probe:
        async with HttpRemote(verify=NO_TLS) as http:
            return await http.probe(url)

    return trio.run(main)


# -- one file ----------------------------------------------------------------------------------------------------------


def test_one_file_named_by_its_strong_etag(hub: Hub) -> None:
    url = hub.plain("dir/model.gguf", DATA, etag='"v1"')
    assert listed(url) == Listing(
        url, "", "", (Published("model.gguf", len(DATA), f'etag:{url}|"v1"', url, validator='"v1"'),)
    )
    assert hub.sent() == 1


@pytest.mark.parametrize("etag", ["", 'W/"v1"'])
def test_one_file_without_a_strong_etag(hub: Hub, etag: str) -> None:
    url = hub.plain("weak.safetensors", DATA, etag=etag)
    file = listed(url).files[0]
    assert file.identity == f"url:{url}|{len(DATA)}|Thu, 01 Jan 2026 00:00:00 GMT"
    assert file.validator == "modified Thu, 01 Jan 2026 00:00:00 GMT"
    hub.plain("weak.safetensors", DATA, etag=etag, modified=1_800_000_000)
    assert listed(url).files[0].identity != file.identity


def test_query_and_fragment(hub: Hub) -> None:
    url = hub.plain("signed.gguf", DATA)
    listing = listed(url + "?Signature=secret&x=1#part")
    assert listing.origin == url
    assert listing.files[0].url == url + "?Signature=secret&x=1"
    assert listing.files[0].path == "signed.gguf"


def test_a_name_that_needs_quoting(hub: Hub) -> None:
    url = hub.plain("über dir/mo del#1%.gguf", DATA)
    file = listed(url).files[0]
    assert file.path == "mo del#1%.gguf"
    assert fetched(file) == DATA


def test_an_empty_file(hub: Hub) -> None:
    assert listed(hub.plain("empty.gguf", b"")).files[0].size == 0


def fetched(file: Published) -> bytes:
    async def main() -> bytes:
        async with HttpRemote(verify=NO_TLS) as http:
            return await read(http, Locator(file.url, file.size, file.validator), ByteRange(0, file.size))

    return trio.run(main)


# -- an index and its shards -------------------------------------------------------------------------------------------


def put_index(hub: Hub, directory: str, weight_map: object, present: tuple[str, ...] = ()) -> str:
    for shard in present:
        hub.plain(f"{directory}/{shard}", DATA + shard.encode())
    return hub.plain(f"{directory}/model.safetensors.index.json", json.dumps({"weight_map": weight_map}).encode())


def test_an_index_brings_its_shards(hub: Hub) -> None:
    shards = tuple(f"part {i}/model-{i}.safetensors" for i in range(20))
    url = put_index(hub, "sharded", {f"t{i}": shards[i // 3] for i in range(60)}, shards)
    listing = listed(url)
    assert [f.path for f in listing.files] == ["model.safetensors.index.json", *sorted(shards)]
    assert {f.path: fetched(f) for f in listing.files[1:3]} == {
        f.path: DATA + f.path.encode() for f in listing.files[1:3]
    }
    assert json.loads(fetched(listing.files[0]))["weight_map"]["t0"] == shards[0]


def test_shards_have_the_query_of_their_index(hub: Hub) -> None:
    url = put_index(hub, "signed", {"a": "a b.safetensors"}, ("a b.safetensors",))
    assert [f.url.partition("?")[2] for f in listed(f"{url}?sig=x%2By&v=1").files] == ["sig=x%2By&v=1"] * 2
    assert hub.requests[-1].target == "/plain/signed/a%20b.safetensors?sig=x%2By&v=1"


def test_an_index_whose_shard_is_missing(hub: Hub) -> None:
    url = put_index(hub, "holey", {"a": "a.safetensors", "b": "b.safetensors"}, ("a.safetensors",))
    message = failure(InvalidFormat, url).message
    assert "holey/model.safetensors.index.json names a shard that is not there" in message
    assert "holey/b.safetensors not found (404: not found)" in message


def test_an_index_whose_shard_is_refused(hub: Hub) -> None:
    url = put_index(hub, "walled", {"a": "a.safetensors", "b": "b.safetensors"}, ("a.safetensors", "b.safetensors"))
    hub.fault("403", "walled/b.safetensors", times=None)
    assert "walled/b.safetensors" in failure(AccessDenied, url).message


@pytest.mark.parametrize(
    "weight_map", [{}, None, {"a": 5}, {"a": "../b.safetensors"}, {"a": "/b.safetensors"}], ids=str
)
def test_a_broken_index(hub: Hub, weight_map: object) -> None:
    url = put_index(hub, "broken", weight_map)
    assert "broken/model.safetensors.index.json" in failure(InvalidFormat, url).message


def test_an_index_that_has_no_end(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cakefs.remotes.web.INDEX_LIMIT", 100_000)
    url = hub.plain("long/model.safetensors.index.json", b"x" * 5_000_000)
    assert "longer than 100000 bytes" in failure(InvalidFormat, url).message


# -- URLs of the Hub ---------------------------------------------------------------------------------------------------


def test_a_url_of_the_hub_is_pinned_and_named_by_its_sha256(hub: Hub) -> None:
    commit = hub.add_repo("org/name", {"sub/model.gguf": DATA})
    digest = sha256(DATA).hexdigest()
    url = f"{hub.endpoint}/org/name/resolve/main/sub/model.gguf"
    listing = listed(url, hubs=(hub.endpoint,))
    assert listing.revision == commit
    (file,) = listing.files
    assert file == Published("model.gguf", len(DATA), f"sha256:{digest}", url.replace("main", commit), digest)
    hub.add_repo("org/name", {"sub/model.gguf": b"another one"})
    assert fetched(file) == DATA


def test_an_index_of_the_hub_is_pinned_with_its_shards(hub: Hub) -> None:
    index = json.dumps({"weight_map": {"a": "a.safetensors"}}).encode()
    commit = hub.add_repo("org/sharded", {"model.safetensors.index.json": index, "a.safetensors": DATA})
    listing = listed(f"{hub.endpoint}/org/sharded/resolve/main/model.safetensors.index.json", hubs=(hub.endpoint,))
    assert listing.revision == commit
    assert all(f"/resolve/{commit}/" in f.url for f in listing.files)
    hub.add_repo("org/sharded", {})
    assert [fetched(f) for f in listing.files] == [DATA, index]


def test_the_hash_that_a_stranger_claims_names_nothing(hub: Hub) -> None:
    hub.add_repo("org/claimed", {"model.gguf": DATA})
    file = listed(f"{hub.endpoint}/org/claimed/resolve/main/model.gguf").files[0]
    assert file.sha256 == sha256(DATA).hexdigest()
    assert file.identity.startswith(f"etag:{hub.endpoint}/org/claimed/")


def test_what_the_redirect_target_claims_is_not_heard(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    claims = {"X-Linked-ETag": f'"{"0" * 64}"', "X-Repo-Commit": "1" * 40}
    target = hub.plain("target.gguf", DATA)
    head = Answer.head
    monkeypatch.setattr(
        Answer,
        "head",
        lambda self, keep: head(replace(self, headers=self.headers | claims) if self.status == 206 else self, keep),
    )
    direct = probed(target)
    assert (direct.linked_etag, direct.commit) == ("0" * 64, "1" * 40)
    hub.fault("redirect", to=target, stage="resolve")
    there = probed(f"{hub.endpoint}/org/none/resolve/main/target.gguf")
    assert (there.linked_etag, there.commit, there.size) == ("", "", len(DATA))


# -- what cannot be listed ---------------------------------------------------------------------------------------------


def test_a_server_without_ranges(hub: Hub) -> None:
    url = hub.plain("flat.gguf", DATA, ranges=False)
    error = failure(InvalidFormat, url)
    assert "does not serve parts of" in error.message and "flat.gguf" in error.message
    assert error.hint


@pytest.mark.parametrize(
    "url",
    (
        "",
        "model.gguf",
        "ftp://h.test/x.gguf",
        "http://",
        "http://h.test",
        "http://h.test/",
        "https://h.test/dir/",
        "https://h.test/..",
        "https://user:secret@h.test/x.gguf",
        "http://[::1",
    ),
)
def test_a_url_that_names_no_file(url: str) -> None:
    assert "secret" not in failure(UserError, url).message


def test_what_the_server_refuses(hub: Hub) -> None:
    assert "gone.gguf not found" in failure(NotFound, f"{hub.cdn_endpoint}/plain/gone.gguf").message
    url = hub.plain("refused.gguf", DATA)
    hub.fault("401", "refused.gguf")
    failure(AccessDenied, url)
    hub.fault("503", "refused.gguf", retry_after=900)
    error = failure(RemoteUnavailable, url)
    assert isinstance(error, RemoteUnavailable) and error.retry_after == 900
    hub.fault("redirect-loop", "refused.gguf")
    failure(InvalidFormat, url)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "a.safetensors"])
@pytest.mark.parametrize(("kind", "options"), [("429", {"retry_after": 0.2}), ("503", {}), ("drop", {})])
def test_trouble_that_passes_is_not_seen(hub: Hub, name: str, kind: str, options: dict[str, float]) -> None:
    url = put_index(hub, "passing", {"a": "a.safetensors"}, ("a.safetensors",))
    fault = hub.fault(kind, f"passing/{name}", method=None, **options)  # type: ignore[arg-type]
    assert len(listed(url).files) == 2
    assert fault.hits == 1


def test_a_server_that_stalls(hub: Hub) -> None:
    url = hub.plain("stalled.gguf", DATA)
    hub.fault("stall", "stalled.gguf", times=None)
    with pytest.raises(RemoteUnavailable, match="no byte came in time"):
        listed(url, idle_s=0.2)


def test_a_server_that_trickles(hub: Hub) -> None:
    url = put_index(hub, "slow", {"a": "a.safetensors"})
    hub.fault("slow", "slow/*", times=None, after=1, rate=10)

    async def main() -> None:
        async with HttpRemote(verify=NO_TLS) as http:
            with pytest.raises(
                RemoteUnavailable, match=r"no list of .*/slow/model\.safetensors\.index\.json within 0 s"
            ):
                await list_url(url, http, timeout_s=0.3)

    trio.run(main)
