"""HttpRemote against the test hub: right bytes, every fault of the hub, routes, and where tokens go."""

import logging
import random
import re
import ssl
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import trio

from cakefs.errors import AccessDenied, CakeError, InvalidFormat, NotFound, RemoteChanged, RemoteUnavailable, UserError
from cakefs.model import MIB, ByteRange, Locator
from cakefs.remotes.base import read
from cakefs.remotes.http import HttpRemote
from cakefs.remotes.wrap import Limit, Log, Retry
from tests.hub import Hub

DATA = random.Random(7).randbytes(3 * MIB + 12345)
SMALL = b'{"model_type": "llama"}'
SPAN = ByteRange(MIB + 5, 2 * MIB + 77)
TOKEN = "hf_SecretSecretSecret"
REPO = "org/name"
BIG = "model.safetensors"


@pytest.fixture(scope="module")
def module_hub() -> Iterator[Hub]:
    with Hub() as hub:
        hub.add_repo(REPO, {BIG: DATA, "config.json": SMALL, "a b/ü%.bin": b"x" * 100})
        hub.add_repo("org/gated", {BIG: DATA[:1000]}, gated=True, token=TOKEN)
        hub.add_repo("org/private", {BIG: DATA[:1000]}, private=True, token=TOKEN)
        yield hub


@pytest.fixture
def hub(module_hub: Hub) -> Iterator[Hub]:
    module_hub.reset()
    yield module_hub
    module_hub.clear_faults()


def locator(hub: Hub, path: str = BIG, size: int = len(DATA), repo: str = REPO) -> Locator:
    return Locator(f"{hub.endpoint}/{repo}/resolve/main/{path}", size)


class Collected:
    """A sink that remembers the pieces it got."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []

    def __call__(self, data: bytes) -> None:
        self.pieces.append(data)

    @property
    def data(self) -> bytes:
        return b"".join(self.pieces)


def remote(**settings: Any) -> HttpRemote:
    """Without the certificates of the system, whose loading is what takes longest here."""
    return HttpRemote(verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), **settings)


def retrying(http: HttpRemote, budget_s: float = 20.0) -> Retry:
    """As the transfer processes stack them, but without waiting between tries."""
    return Retry(Limit(Log(http), 4), budget_s, jitter=lambda low, high: 0.0)


def fetched(where: Locator, span: ByteRange = SPAN, retry: bool = False, **settings: Any) -> bytes:
    async def main() -> bytes:
        async with remote(**settings) as http:
            return await read(retrying(http) if retry else http, where, span)

    return trio.run(main)


def with_remote(test: Callable[[HttpRemote], Awaitable[None]], **settings: Any) -> None:
    async def main() -> None:
        async with remote(**settings) as http:
            await test(http)

    trio.run(main)


def ranges(hub: Hub, stage: str) -> list[str]:
    return [r.range for r in hub.requests if r.stage == stage]


# -- what goes well ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("span", [SPAN, (0, 1), (len(DATA) - 1, len(DATA)), (0, len(DATA))])
def test_a_span_comes_exactly(hub: Hub, span: tuple[int, int]) -> None:
    assert fetched(locator(hub), ByteRange(*span)) == DATA[span[0] : span[1]]
    assert hub.sent(BIG) == span[1] - span[0]


def test_an_empty_span_asks_nobody(hub: Hub) -> None:
    assert fetched(locator(hub), ByteRange(5, 5)) == b""
    assert hub.requests == []


def test_bytes_are_passed_on_as_they_come(hub: Hub) -> None:
    fault = hub.fault("stall", BIG, after=MIB // 2)

    async def test(http: HttpRemote) -> None:
        sink = Collected()
        half = trio.Event()

        def watched(data: bytes) -> None:
            sink(data)
            if len(sink.data) == MIB // 2:
                half.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(http.fetch, locator(hub), SPAN, watched)
            with trio.fail_after(20):
                await half.wait()
            fault.release()
        assert sink.data == DATA[SPAN.start : SPAN.stop]
        assert len(sink.pieces) > 3

    with_remote(test)


def test_a_small_file_comes_through_the_redirect_within_the_hub(hub: Hub) -> None:
    assert fetched(locator(hub, "config.json", len(SMALL)), ByteRange(0, len(SMALL))) == SMALL
    assert fetched(locator(hub, "a%20b/%C3%BC%25.bin", 100), ByteRange(0, 100)) == b"x" * 100


def test_where_a_file_is_is_asked_once_and_connections_are_kept(hub: Hub) -> None:
    async def test(http: HttpRemote) -> None:
        before = hub.connections
        for start in range(0, MIB, MIB // 8):
            assert await read(http, locator(hub), ByteRange(start, start + 10)) == DATA[start : start + 10]
        assert hub.connections - before == 2

    with_remote(test)
    assert len(ranges(hub, "resolve")) == 1
    assert len(ranges(hub, "cdn")) == 8


def test_fetches_at_the_same_time_share_one_resolve(hub: Hub) -> None:
    async def test(http: HttpRemote) -> None:
        async with trio.open_nursery() as nursery:
            for start in range(8):
                nursery.start_soon(http.fetch, locator(hub), ByteRange(start, start + 10), Collected())

    with_remote(test)
    assert len(ranges(hub, "resolve")) == 1
    assert len(ranges(hub, "cdn")) == 8


def test_who_waits_for_a_failed_resolve_tries_alone(hub: Hub) -> None:
    fault = hub.fault("500", BIG, times=1, stage="resolve")
    results: list[object] = []

    async def one(http: HttpRemote) -> None:
        try:
            results.append(await read(http, locator(hub), SPAN))
        except CakeError as error:
            results.append(type(error))

    async def test(http: HttpRemote) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(one, http)

    with_remote(test)
    assert fault.hits == 1
    assert results.count(RemoteUnavailable) == 1
    assert results.count(DATA[SPAN.start : SPAN.stop]) == 3


def test_a_whole_file_may_come_without_ranges(hub: Hub) -> None:
    url = hub.plain("whole.bin", DATA, ranges=False)
    assert fetched(Locator(url, len(DATA)), ByteRange(0, len(DATA))) == DATA


# -- what goes wrong on the way: another try continues at the first missing byte --------------------------------------

RETRYABLE = [
    ("drop", {"after": 0}, "no answer from"),
    ("drop", {"after": MIB // 2}, "no answer from"),
    ("reset", {"after": 0}, "no answer from"),
    ("reset", {"after": MIB // 2}, "no answer from"),
    ("stall", {"after": 0}, "no byte came in time"),
    ("stall", {"after": MIB // 2}, "no byte came in time"),
    ("short", {"after": MIB // 2}, "announced"),
    ("long", {}, "announced"),
    ("wrong-range", {}, "another range"),
    ("no-range", {}, "ignored the range"),
    ("408", {}, "(408: test hub"),
    ("429", {}, "(429: test hub"),
    ("500", {}, "(500: test hub"),
    ("503", {}, "(503: test hub"),
]


@pytest.mark.parametrize(("kind", "options", "text"), RETRYABLE, ids=lambda v: str(v))
def test_a_passing_fault_is_named_and_mended(hub: Hub, kind: str, options: dict[str, int], text: str) -> None:
    stage = "cdn"
    hub.fault(kind, BIG, stage=stage, **options)
    sink = Collected()

    async def once(http: HttpRemote) -> None:
        with pytest.raises(RemoteUnavailable) as caught:
            await http.fetch(locator(hub), SPAN, sink)
        assert text in caught.value.message
        assert caught.value.retry_after is None

    idle_s = 0.25 if kind == "stall" else 20
    with_remote(once, idle_s=idle_s)
    assert sink.data == DATA[SPAN.start : SPAN.start + len(sink.data)]

    hub.clear_faults()
    hub.reset()
    hub.fault(kind, BIG, stage=stage, **options)
    assert fetched(locator(hub), retry=True, idle_s=idle_s) == DATA[SPAN.start : SPAN.stop]
    first, second = [r for r in hub.requests if r.stage == stage]
    assert first.range == f"bytes={SPAN.start}-{SPAN.stop - 1}"
    begin, end = second.range.removeprefix("bytes=").split("-")
    assert int(end) == SPAN.stop - 1
    if kind in ("drop", "stall"):
        assert int(begin) == SPAN.start + options["after"]
    elif kind == "reset":  # What was still in the kernel is lost.
        assert SPAN.start <= int(begin) <= SPAN.start + options["after"]
    else:
        assert int(begin) == SPAN.start


@pytest.mark.parametrize(("kind", "options"), [(kind, options) for kind, options, _ in RETRYABLE])
def test_a_lasting_fault_ends_within_the_budget(hub: Hub, kind: str, options: dict[str, int]) -> None:
    if options.get("after"):  # At the same place each time, else every try would bring a little more.
        options = {"position": SPAN.stop - 10}
    hub.fault(kind, BIG, times=None, stage="cdn", **options)

    async def test(http: HttpRemote) -> None:
        patient = Retry(Limit(Log(http), 4), 0.2, jitter=lambda low, high: 0.01)
        started = trio.current_time()
        with pytest.raises(RemoteUnavailable) as caught:
            await patient.fetch(locator(hub), SPAN, lambda data: None)
        assert trio.current_time() - started < 5
        message = caught.value.message
        assert f"-{SPAN.stop} of {hub.endpoint.removeprefix('http://')}/org/name/resolve/main/{BIG}" in message
        assert re.search(r" did not come in \d+ tr(y|ies) \(\d s\): ", message)

    with_remote(test, idle_s=0.05 if kind == "stall" else 20)


def test_a_damaged_byte_is_not_seen_here(hub: Hub) -> None:
    """It is found by the published SHA-256 of the whole file, in the engine."""
    hub.fault("corrupt", BIG, after=100)
    data = fetched(locator(hub))
    assert data != DATA[SPAN.start : SPAN.stop]
    assert len(data) == SPAN.size


def test_a_slow_answer_is_still_an_answer(hub: Hub) -> None:
    hub.fault("slow", BIG, after=1000, rate=1e6)
    assert fetched(locator(hub), ByteRange(0, 50_000), idle_s=5) == DATA[:50_000]


def test_nobody_there(hub: Hub) -> None:
    hub.down("cdn")
    try:
        with pytest.raises(RemoteUnavailable, match="Connection refused"):
            fetched(locator(hub))
    finally:
        hub.up("cdn")


def test_the_server_comes_back_while_a_fetch_waits(hub: Hub) -> None:
    async def test(http: HttpRemote) -> None:
        hub.down()
        sink = Collected()
        async with trio.open_nursery() as nursery:
            patient = Retry(Log(http), 20, jitter=lambda low, high: 0.01)
            nursery.start_soon(patient.fetch, locator(hub), SPAN, sink)
            await trio.sleep(0.05)
            hub.up()
        assert sink.data == DATA[SPAN.start : SPAN.stop]

    try:
        with_remote(test)
    finally:
        hub.up()


# -- delays that a server asks for ------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["429", "503"])
@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"RateLimit": '"resolvers";r=0;t=55'}, 56.0),
        ({"RateLimit": '"resolvers";r=12;t=55'}, None),
        ({"RateLimit": '"resolvers";r=0;t=55', "Retry-After": "7"}, 56.0),
    ],
)
def test_a_requested_delay_is_passed_on(hub: Hub, status: str, headers: dict[str, str], seconds: float | None) -> None:
    hub.fault(status, BIG, stage="cdn", headers=headers)
    with pytest.raises(RemoteUnavailable) as caught:
        fetched(locator(hub))
    assert caught.value.retry_after == seconds


def test_a_short_delay_is_waited_for(hub: Hub) -> None:
    hub.fault("429", BIG, stage="resolve", retry_after=0.3)

    async def test(http: HttpRemote) -> None:
        started = trio.current_time()
        assert await read(retrying(http), locator(hub), SPAN) == DATA[SPAN.start : SPAN.stop]
        assert trio.current_time() - started >= 0.3

    with_remote(test)
    assert len(ranges(hub, "resolve")) == 2


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
