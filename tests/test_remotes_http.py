"""HttpRemote against the test hub: right bytes, and every fault on the way to them."""

import re
from collections.abc import Iterator

import pytest
import trio

from cakefs.errors import CakeError, RemoteUnavailable
from cakefs.model import MIB, ByteRange, Locator
from cakefs.remotes.base import read
from cakefs.remotes.http import HttpRemote
from cakefs.remotes.wrap import Limit, Log, Retry
from tests.hub import Hub
from tests.remote_kit import BIG, DATA, SMALL, SPAN, Collected, fetched, fill, locator, ranges, retrying, with_remote


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
    hub.fault("corrupt", BIG, times=None, after=100)  # a late request of an earlier test may take one
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
