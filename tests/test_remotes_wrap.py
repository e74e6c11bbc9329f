"""Retry, Limit and Log around a remote that does as it is told, on a clock that only moves when everyone waits."""

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from cakefs.errors import AccessDenied, CakeError, RemoteChanged, RemoteUnavailable, StoreFull
from cakefs.model import MIB, ByteRange, Locator
from cakefs.remotes.base import Remote, Sink, read
from cakefs.remotes.wrap import BACKOFF_LIMIT_S, BACKOFF_S, SAID_S, TRIES, Limit, Log, Retry, insist

DATA = bytes(range(251)) * 20000
FILE = Locator("https://cdn.test/dir/file.bin?Signature=secret", len(DATA))
NEIGHBOUR = Locator("https://cdn.test/dir/other.bin", len(DATA))
OTHER = Locator("https://other.test/file.bin", len(DATA))
SPAN = ByteRange(1000, 3 * MIB)
FOREVER = 10**9


def down(message: str = "down", retry_after: float | None = None, *, whole_host: bool = False) -> RemoteUnavailable:
    return RemoteUnavailable(message, retry_after=retry_after, whole_host=whole_host)


class Act:
    """One answer: so many bytes, each `pace` seconds, and then an error, if any."""

    def __init__(
        self, size: int = FOREVER, error: CakeError | None = None, seconds: float = 0, piece: int = MIB
    ) -> None:
        self.size, self.error, self.seconds, self.piece = size, error, seconds, piece


class Actor:
    """A remote that plays acts, the last one for ever, and remembers what it was asked and when."""

    def __init__(self, *acts: Act) -> None:
        self.acts = list(acts)
        self.asked: list[tuple[float, str, ByteRange]] = []
        self.at_once = 0
        self.most_at_once = 0

    async def fetch(self, locator: Locator, span: ByteRange, sink: Sink) -> None:
        act = self.acts.pop(0) if len(self.acts) > 1 else self.acts[0]
        self.asked.append((trio.current_time(), locator.url, span))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await self._play(act, span, sink)
        finally:
            self.at_once -= 1

    async def _play(self, act: Act, span: ByteRange, sink: Sink) -> None:
        stop = min(span.stop, span.start + act.size)
        for start in range(span.start, stop, act.piece):
            await trio.sleep(act.seconds)
            sink(DATA[start : min(start + act.piece, stop)])
        if act.error is not None:
            await trio.sleep(act.seconds)
            raise act.error

    @property
    def times(self) -> list[float]:
        return [round(time, 3) for time, _, _ in self.asked]


def run(test: Callable[[], Awaitable[Any]]) -> Any:
    return trio.run(test, clock=MockClock(autojump_threshold=0))


def fetch(remote: Remote, span: ByteRange = SPAN, locator: Locator = FILE) -> bytes:
    async def main() -> bytes:
        with trio.fail_after(10_000):
            return await read(remote, locator, span)

    data: bytes = run(main)
    return data


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG):
        yield caplog


def full(low: float, high: float) -> float:
    return high


def none(low: float, high: float) -> float:
    return 0.0


# -- Retry: what it brings ---------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.lists(st.integers(0, 4 * MIB), max_size=8))
def test_what_comes_in_pieces_is_whole_and_nothing_comes_twice(sizes: list[int]) -> None:
    actor = Actor(*[Act(size, down()) for size in sizes], Act())
    assert fetch(Retry(actor, jitter=none)) == DATA[SPAN.start : SPAN.stop]
    starts = [span.start for _, _, span in actor.asked]
    assert all(span.stop == SPAN.stop for _, _, span in actor.asked)
    expected = SPAN.start
    for start, size in zip(starts, [*sizes, 0], strict=False):
        assert start == expected
        expected = min(SPAN.stop, start + size)


@pytest.mark.parametrize("error", [RemoteChanged("other"), AccessDenied("no"), StoreFull("full")])
def test_what_another_try_cannot_mend_is_passed_on_at_once(error: CakeError) -> None:
    actor = Actor(Act(100, error))
    with pytest.raises(type(error)) as caught:
        fetch(Retry(actor))
    assert caught.value is error
    assert len(actor.asked) == 1


def test_a_failure_of_the_sink_is_passed_on_at_once() -> None:
    actor = Actor(Act())

    def sink(data: bytes) -> None:
        raise StoreFull("no room")

    async def main() -> None:
        with pytest.raises(StoreFull):
            await Retry(actor).fetch(FILE, SPAN, sink)

    run(main)
    assert len(actor.asked) == 1


# -- Retry: how long it tries ------------------------------------------------------------------------------------------


def test_back_off_doubles_up_to_a_limit_and_starts_anew_with_progress() -> None:
    actor = Actor(*[Act(0, down())] * 6, Act(10, down()), Act(0, down()), Act())
    fetch(Retry(actor, 1000, jitter=full))
    waits = [round(b - a, 3) for a, b in zip(actor.times, actor.times[1:], strict=False)]
    grown = [min(BACKOFF_LIMIT_S, BACKOFF_S * 2**n) for n in range(1, 7)]
    assert waits == [*grown, BACKOFF_S, 2 * BACKOFF_S]


def test_delays_are_random_over_their_whole_length() -> None:
    bounds: list[tuple[float, float]] = []

    def jitter(low: float, high: float) -> float:
        bounds.append((low, high))
        return low

    fetch(Retry(Actor(Act(0, down()), Act()), jitter=jitter))
    assert bounds == [(0.0, 2 * BACKOFF_S)]


@pytest.mark.parametrize("budget", [5.0, 60.0, 600.0])
def test_it_gives_up_when_the_budget_is_spent(budget: float) -> None:
    actor = Actor(Act(0, down("no answer from cdn.test")))

    async def main() -> None:
        with pytest.raises(RemoteUnavailable) as caught:
            await read(Retry(actor, budget, jitter=full), FILE, SPAN)
        assert trio.current_time() == pytest.approx(budget, abs=0.001)
        tries = len(actor.asked)
        assert tries > 2
        assert caught.value.message == (
            f"bytes {SPAN.start}-{SPAN.stop} of cdn.test/dir/file.bin did not come in {tries} tries"
            f" ({budget:.0f} s): no answer from cdn.test"
        )

    run(main)


def test_an_answer_that_never_ends_is_cut_off() -> None:
    actor = Actor(Act(0, down(), seconds=1e6))
    with pytest.raises(RemoteUnavailable, match=r"did not come in 1 try \(60 s\): less than 1 MiB came in 60 s"):
        fetch(Retry(actor, 60))


def test_a_trickle_is_cut_off_and_a_slow_transfer_is_not() -> None:
    trickle = Actor(Act(seconds=1, piece=1000))
    with pytest.raises(RemoteUnavailable, match=rf"bytes {SPAN.start + 59000}-\d+ of .* \(60 s\)"):
        fetch(Retry(trickle, 60))
    slow = Actor(Act(seconds=50, piece=MIB))
    assert fetch(Retry(slow, 60)) == DATA[SPAN.start : SPAN.stop]


def test_progress_refills_the_budget() -> None:
    """Each try brings a MiB and dies after 80 s."""
    actor = Actor(Act(MIB, down(), seconds=40))
    assert fetch(Retry(actor, 100, jitter=none)) == DATA[SPAN.start : SPAN.stop]
    assert actor.times == [0, 80, 160]
    with pytest.raises(RemoteUnavailable, match=r"bytes 3000-.*in 2 tries \(100 s\)"):
        fetch(Retry(Actor(Act(1000, down(), seconds=30)), 100, jitter=none))


# -- Retry: what a server asks for -------------------------------------------------------------------------------------


def test_a_requested_delay_is_waited_for_and_costs_no_budget() -> None:
    actor = Actor(Act(0, down(retry_after=100)), Act(0, down(retry_after=200)), Act())
    assert fetch(Retry(actor, 5, jitter=none)) == DATA[SPAN.start : SPAN.stop]
    assert actor.times == [0, 100, 300]


def test_patience_has_an_end() -> None:
    actor = Actor(Act(0, down("wait", retry_after=100)))

    async def main() -> None:
        with pytest.raises(RemoteUnavailable, match=r"in 4 tries \(300 s\): wait") as caught:
            await read(Retry(actor, 60, patience_s=330, jitter=none), FILE, SPAN)
        assert caught.value.retry_after == 100

    run(main)


def test_a_delay_beyond_all_patience_fails_at_once() -> None:
    actor = Actor(Act(0, down("tomorrow", retry_after=86400)))
    with pytest.raises(RemoteUnavailable, match=r"in 1 try \(0 s\): tomorrow"):
        fetch(Retry(actor, 60))


# -- insist ------------------------------------------------------------------------------------------------------------


def insisting(*failures: CakeError, deadline: float = 60) -> float:
    """How long it takes to get an answer after so many failures."""
    waiting = list(failures)

    async def ask() -> str:
        if waiting:
            raise waiting.pop(0)
        return "answer"

    async def main() -> float:
        with trio.fail_after(deadline):
            assert await insist(ask) == "answer"
        return trio.current_time()

    return float(run(main))


def test_a_question_is_asked_again_a_few_times() -> None:
    failures = [down(str(number)) for number in range(TRIES)]
    assert insisting(*failures[:-1]) <= BACKOFF_S * (1 + 2)
    with pytest.raises(RemoteUnavailable, match=str(TRIES - 1)):
        insisting(*failures)


def test_a_question_waits_as_the_server_asks_unless_that_is_too_long() -> None:
    assert 50 <= insisting(down(retry_after=50)) <= 50 + BACKOFF_S
    with pytest.raises(RemoteUnavailable, match="tomorrow"):
        insisting(down("tomorrow", retry_after=86400))


def test_a_question_that_cannot_be_answered_is_asked_once() -> None:
    with pytest.raises(AccessDenied):
        insisting(AccessDenied("no"))


def test_a_pause_is_told_when_it_begins(logged: pytest.LogCaptureFixture) -> None:
    insisting(down("busy", retry_after=SAID_S), down("busy", retry_after=SAID_S / 2))
    fetch(Retry(Actor(Act(0, down("full", retry_after=30)), Act()), jitter=none))
    said = [(r.getMessage(), getattr(r, "at_once", False)) for r in logged.records]
    assert said == [("trying again in 1 s: busy", True), ("trying again in 30 s: full", True)]


# -- Limit -------------------------------------------------------------------------------------------------------------


async def fetch_many(remote: Remote, count: int, locator: Locator = FILE) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(remote.fetch, locator, ByteRange(0, 10), lambda data: None)


def test_no_more_than_n_at_once() -> None:
    actor = Actor(Act(seconds=1))

    async def main() -> None:
        await fetch_many(Limit(actor, 3), 7)
        assert trio.current_time() == 3

    run(main)
    assert actor.most_at_once == 3


def test_a_failure_gives_its_place_free() -> None:
    limit = Limit(Actor(Act(0, down()), Act()), 1)

    async def main() -> None:
        with pytest.raises(RemoteUnavailable):
            await read(limit, FILE, SPAN)
        assert await read(limit, FILE, SPAN) == DATA[SPAN.start : SPAN.stop]

    run(main)


def test_a_cancelled_fetch_gives_its_place_free() -> None:
    limit = Limit(Actor(Act(seconds=100), Act()), 1)

    async def main() -> None:
        with trio.move_on_after(1):
            await read(limit, FILE, SPAN)
        assert await read(limit, FILE, SPAN) == DATA[SPAN.start : SPAN.stop]

    run(main)


def test_waiting_for_a_turn_costs_no_budget() -> None:
    """Ten fetches of 40 s one after the other, each with a budget of 60 s."""
    actor = Actor(Act(seconds=40))
    run(lambda: fetch_many(Retry(Limit(actor, 1), 60, jitter=none), 10))
    assert len(actor.asked) == 10
    assert actor.times[-1] == 360


def pausing(wish: RemoteUnavailable) -> list[tuple[float, str]]:
    """What is asked and when, of FILE, whose server wishes a pause, its neighbour, and another host, every 20 s."""
    actor = Actor(Act(0, wish), Act())
    limit = Limit(actor, 4)

    async def main() -> None:
        for _ in range(5):
            for locator in (FILE, NEIGHBOUR, OTHER):
                with suppress(RemoteUnavailable):
                    await read(limit, locator, SPAN)
            await trio.sleep(20)

    run(main)
    return [(time, url) for time, url, _ in actor.asked]


def test_one_request_for_a_pause_holds_for_all_that_it_is_about() -> None:
    asked = pausing(down("slow down", retry_after=30, whole_host=True))
    assert asked[:3] == [(0, FILE.url), (0, OTHER.url), (20, OTHER.url)]
    assert asked[3:] == [(40 + t, place.url) for t in (0, 20, 40) for place in (FILE, NEIGHBOUR, OTHER)]
    asked = pausing(down("broken", retry_after=30))
    assert [time for time, url in asked if url == FILE.url] == [0, 40, 60, 80]
    assert [time for time, url in asked if url == NEIGHBOUR.url] == [0, 20, 40, 60, 80]


def test_a_pause_without_end_is_asked_about_every_minute() -> None:
    asked = pausing(down("tomorrow", retry_after=86400, whole_host=True))
    assert [time for time, url in asked if url == FILE.url] == [0, 60, 80]


def test_what_a_pause_is_about_is_told_to_who_comes_into_it() -> None:
    limit = Limit(Actor(Act(0, down("slow down", retry_after=30, whole_host=True))), 4)

    async def main() -> None:
        for expected in (30, 20):
            with pytest.raises(RemoteUnavailable, match="slow down") as caught:
                await read(limit, FILE, SPAN)
            assert caught.value.retry_after == expected and caught.value.whole_host
            await trio.sleep(10)

    run(main)


def test_rate_limits_become_delay_for_everyone() -> None:
    actor = Actor(Act(0, down(retry_after=250)), Act())
    run(lambda: fetch_many(Retry(Limit(actor, 4), 60, jitter=none), 20))
    assert actor.times[0] == 0
    assert len(actor.asked) == 21 and sum(time >= 250 for time in actor.times) >= 17


# -- Log ---------------------------------------------------------------------------------------------------------------


def test_every_failure_is_logged_with_path_range_and_cause(logged: pytest.LogCaptureFixture) -> None:
    actor = Actor(Act(24, down("connection reset")), Act(0, down("no answer")), Act())
    fetch(Retry(Log(actor), jitter=none))
    assert [r.getMessage() for r in logged.records] == [
        f"bytes 1000-{SPAN.stop} of cdn.test/dir/file.bin: connection reset",
        f"bytes 1024-{SPAN.stop} of cdn.test/dir/file.bin: no answer",
    ]
    assert "secret" not in logged.text


def test_success_and_cancellation_are_not_logged(logged: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        with trio.move_on_after(1):
            await read(Log(Actor(Act(seconds=100))), FILE, SPAN)
        await read(Log(Actor(Act())), FILE, SPAN)

    run(main)
    assert logged.records == []
