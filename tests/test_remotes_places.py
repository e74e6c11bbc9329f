"""HttpRemote and where files are: refusals, signed URLs, redirects, tokens, and files that changed."""

import logging
from collections.abc import Iterator

import pytest
import trio

from cakefs.errors import AccessDenied, CakeError, InvalidFormat, NotFound, RemoteChanged, RemoteUnavailable, UserError
from cakefs.model import ByteRange, Locator
from cakefs.remotes.base import read
from cakefs.remotes.http import HttpRemote
from cakefs.remotes.wrap import Limit, Log, Retry
from tests.hub import Hub
from tests.remote_kit import (
    BIG,
    DATA,
    SMALL,
    SPAN,
    TOKEN,
    Collected,
    fetched,
    fill,
    locator,
    ranges,
    retrying,
    with_remote,
)


@pytest.fixture(scope="module")
def module_hub() -> Iterator[Hub]:
    with Hub() as hub:
        fill(hub)
        yield hub


@pytest.fixture
def hub(module_hub: Hub) -> Iterator[Hub]:
    module_hub.reset()
    yield module_hub
    module_hub.clear_faults()


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("400", InvalidFormat),
        ("401", AccessDenied),
        ("403", AccessDenied),
        ("404", NotFound),
        ("410", NotFound),
        ("416", RemoteChanged),
        ("451", AccessDenied),
    ],
)
def test_a_refusal_is_final(hub: Hub, kind: str, error: type[CakeError]) -> None:
    fault = hub.fault(kind, BIG, times=None, stage="resolve")
    with pytest.raises(error) as caught:
        fetched(locator(hub), retry=True)
    assert f"({kind}: test hub: {kind} on purpose)" in caught.value.message
    assert f"/org/name/resolve/main/{BIG}" in caught.value.message
    assert fault.hits == 1


def test_a_missing_file_and_a_missing_repository(hub: Hub) -> None:
    with pytest.raises(NotFound, match="Entry not found"):
        fetched(locator(hub, "no.bin"))
    with pytest.raises(AccessDenied):  # The Hub does not tell strangers what exists.
        fetched(locator(hub, repo="org/none"))
    with pytest.raises(NotFound, match="Repository not found"):
        fetched(locator(hub, repo="org/none"), tokens={hub.endpoint: TOKEN})


def test_gated_without_a_token_and_with_one_that_is_not_on_the_list(hub: Hub) -> None:
    hub.add_repo("org/other", {}, token="hf_other")
    where = locator(hub, size=1000, repo="org/gated")
    with pytest.raises(AccessDenied, match="401: Access to model org/gated is restricted") as caught:
        fetched(where, ByteRange(0, 10))
    assert "accept the licence" in caught.value.hint and "HF_TOKEN" in caught.value.hint
    with pytest.raises(AccessDenied, match="403") as caught:
        fetched(where, ByteRange(0, 10), tokens={hub.endpoint: "hf_other"})
    assert "the account that HF_TOKEN belongs to" in caught.value.hint
    assert fetched(where, ByteRange(0, 10), tokens={hub.endpoint: TOKEN}) == DATA[:10]


# -- signed URLs ------------------------------------------------------------------------------------------------------


def test_an_expired_url_is_resolved_again(hub: Hub) -> None:
    async def test(http: HttpRemote) -> None:
        await read(http, locator(hub), SPAN)
        hub.expire_links()
        assert await read(http, locator(hub), SPAN) == DATA[SPAN.start : SPAN.stop]

    with_remote(test)
    assert len(ranges(hub, "resolve")) == 2
    assert [r.status for r in hub.requests if r.stage == "cdn"] == [206, 403, 206]


def test_many_fetches_with_an_expired_url_resolve_it_once(hub: Hub) -> None:
    async def test(http: HttpRemote) -> None:
        await read(http, locator(hub), SPAN)
        hub.expire_links()
        hub.reset()
        async with trio.open_nursery() as nursery:
            for start in range(6):
                nursery.start_soon(http.fetch, locator(hub), ByteRange(start, start + 9), Collected())

    with_remote(test)
    assert len(ranges(hub, "resolve")) == 1


def test_a_place_that_keeps_refusing_is_resolved_twice_more(hub: Hub) -> None:
    fault = hub.fault("expired", BIG, times=None)
    with pytest.raises(AccessDenied, match=r"127\.0\.0\.1:\d+ refused .*\(403: Request has expired\)"):
        fetched(locator(hub), retry=True)
    assert fault.hits == 3
    assert len(ranges(hub, "resolve")) == 3


def test_a_place_that_fails_is_given_up_for_another(hub: Hub) -> None:
    async def test(http: HttpRemote) -> None:
        await read(http, locator(hub), SPAN)
        hub.fault("503", BIG, stage="cdn")
        await read(retrying(http), locator(hub), SPAN)

    with_remote(test)
    assert len(ranges(hub, "resolve")) == 2


# -- redirects and tokens ---------------------------------------------------------------------------------------------


def test_a_redirect_loop_is_named(hub: Hub) -> None:
    hub.fault("redirect-loop", BIG, times=None)
    with pytest.raises(InvalidFormat, match="redirects more than 5 times"):
        fetched(locator(hub), retry=True)
    assert len(hub.requests) == 6


def test_a_circle_of_redirects_is_named(hub: Hub) -> None:
    hub.fault("redirect", BIG, times=None, to=locator(hub).url)
    with pytest.raises(InvalidFormat, match="redirects in a circle"):
        fetched(locator(hub))
    assert len(hub.requests) == 1


@pytest.mark.parametrize("to", ["ftp://127.0.0.1/x", "file:///etc/passwd", "mailto:someone"])
def test_a_redirect_to_nowhere_is_named(hub: Hub, to: str) -> None:
    hub.fault("redirect", BIG, to=to)
    with pytest.raises(InvalidFormat):
        fetched(locator(hub))


def test_the_token_stays_with_its_origin(hub: Hub) -> None:
    where = locator(hub, size=1000, repo="org/private")
    assert fetched(where, ByteRange(0, 1000), tokens={hub.endpoint: TOKEN}) == DATA[:1000]
    assert [(r.stage, r.authorized) for r in hub.requests] == [("resolve", True), ("cdn", False)]
    assert TOKEN not in "".join(r.target for r in hub.requests)


def test_the_token_is_not_sent_to_another_port_of_its_host(hub: Hub) -> None:
    other = hub.cdn_endpoint.replace("127.0.0.1", "localhost")
    hub.fault("redirect", BIG, to=f"{other}/plain/leak.bin")
    hub.plain("leak.bin", DATA)
    assert fetched(locator(hub), tokens={hub.endpoint: "hf_test"}) == DATA[SPAN.start : SPAN.stop]
    assert [(r.stage, r.host, r.authorized) for r in hub.requests] == [
        ("resolve", "localhost", True),
        ("plain", "localhost", False),
    ]


def test_the_token_follows_within_its_origin(hub: Hub) -> None:
    fetched(locator(hub, "config.json", len(SMALL)), ByteRange(0, 5), tokens={hub.endpoint + "/": "hf_test"})
    assert [(r.stage, r.authorized) for r in hub.requests] == [("resolve", True), ("cache", True)]


def test_no_secret_is_shown(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    hub.fault("500", BIG, stage="cdn", headers={"X-Error-Message": f"bad Bearer {TOKEN} at http://x/y?Signature=abc"})
    hub.fault("drop", BIG, stage="cdn", after=100)

    async def test(http: HttpRemote) -> None:
        for _ in range(2):
            with pytest.raises(RemoteUnavailable) as caught:
                await Log(http).fetch(locator(hub), SPAN, lambda data: None)
            assert TOKEN not in repr(caught.value) + str(caught.value) + caught.value.hint
            assert "Signature" not in str(caught.value)
        assert TOKEN not in repr(http) + repr(Retry(Limit(Log(http), 1)))

    with_remote(test, tokens={hub.endpoint: TOKEN})
    assert "500: bad Bearer ***" in caplog.text
    assert TOKEN not in caplog.text
    assert "Signature" not in caplog.text


def test_of_a_secret_in_a_long_answer_no_part_is_shown(hub: Hub) -> None:
    hub.fault("500", BIG, headers={"X-Error-Message": "x" * 190 + TOKEN})
    with pytest.raises(RemoteUnavailable) as caught:
        fetched(locator(hub), tokens={hub.endpoint: TOKEN})
    assert "x" * 190 in str(caught.value) and TOKEN[:6] not in str(caught.value)


@pytest.mark.parametrize("token", ["hf_x\nInjected: 1", "hf_ü", "hf x", "", "hf_\x7f"])
def test_a_token_that_cannot_be_sent_is_refused_unseen(token: str) -> None:
    with pytest.raises(UserError, match=r"the token for huggingface\.co has characters") as caught:
        HttpRemote({"https://huggingface.co": token})
    assert not token or token not in caught.value.message


# -- a file that changed ----------------------------------------------------------------------------------------------


def test_another_size_upstream(hub: Hub) -> None:
    where = locator(hub, size=len(DATA) - 1)
    with pytest.raises(RemoteChanged, match=f"{len(DATA)} bytes instead of {len(DATA) - 1}") as caught:
        fetched(where, retry=True)
    assert "cakefs add --update" in caught.value.hint


def test_another_size_of_a_plain_file(hub: Hub) -> None:
    url = hub.plain("grown.bin", DATA)
    with pytest.raises(RemoteChanged, match="bytes instead of"):
        fetched(Locator(url, 5), ByteRange(0, 5), retry=True)
    with pytest.raises(RemoteChanged, match="has no such range"):
        fetched(Locator(url, len(DATA) + 5), ByteRange(len(DATA), len(DATA) + 5), retry=True)
    hub.plain("grown.bin", DATA, ranges=False)
    with pytest.raises(RemoteChanged, match="bytes instead of"):
        fetched(Locator(url, 5), ByteRange(0, 5), retry=True)


def test_another_strong_etag(hub: Hub) -> None:
    url = hub.plain("tagged.bin", DATA, etag='"one"')
    assert fetched(Locator(url, len(DATA), '"one"')) == DATA[SPAN.start : SPAN.stop]
    for etag in ('"two"', 'W/"one"', ""):
        hub.plain("tagged.bin", DATA, etag=etag)
        with pytest.raises(RemoteChanged, match="ETag"):
            fetched(Locator(url, len(DATA), '"one"'), retry=True)


def test_an_etag_that_changes_at_one_place(hub: Hub) -> None:
    async def test(http: HttpRemote) -> None:
        await read(http, locator(hub), SPAN)
        hub.fault("etag", BIG, stage="cdn")
        with pytest.raises(RemoteChanged, match="its ETag is another one"):
            await read(retrying(http), locator(hub), SPAN)
        assert await read(http, locator(hub), SPAN) == DATA[SPAN.start : SPAN.stop]

    with_remote(test)


def test_a_fetch_can_be_cancelled_at_any_time(hub: Hub) -> None:
    hub.fault("stall", BIG, after=1000)

    async def test(http: HttpRemote) -> None:
        sink = Collected()
        with trio.move_on_after(0.2) as scope:
            await retrying(http).fetch(locator(hub), SPAN, sink)
        assert scope.cancelled_caught
        assert await read(http, locator(hub), SPAN) == DATA[SPAN.start : SPAN.stop]

    with_remote(test)
