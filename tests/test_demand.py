"""Adding on demand: who waits for whom, how long, and what is remembered. The adding itself is fake, and the clock."""

import logging
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from cakefs.engine.serve import demand
from cakefs.engine.serve.demand import Demand
from cakefs.engine.transfer.messages import error_of, failure
from cakefs.errors import AccessDenied, CakeError, NotFound, RemoteUnavailable
from cakefs.plan.wish import Wish

WISH = Wish("org/name", None, "org/name")


class World:
    """A Demand whose adding takes `seconds` and fails with `error`."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.seconds = 1.0
        self.token: str | None = None
        self.added: list[str] = []
        self.at_once = self.most = 0
        self.demand = Demand(self._add, lambda: self.token)

    async def _add(self, wish: Wish) -> None:
        self.added.append(wish.name)
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            await trio.sleep(self.seconds)
        finally:
            self.at_once -= 1
        if self.error is not None:
            raise self.error

    async def get(self, wish: Wish = WISH) -> str:
        """Nothing, or the error's name."""
        try:
            await self.demand.get(wish)
        except CakeError as error:
            return type(error).__name__
        return ""

    def run(self, body: Callable[[], Awaitable[None]]) -> None:
        async def main() -> None:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.demand.run)
                await body()
                nursery.cancel_scope.cancel()

        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.fixture
def w() -> World:
    return World()


def test_several_who_want_the_same_wait_for_one_flight(w: World) -> None:
    async def body() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(w.get)
        assert trio.current_time() - started == pytest.approx(1.0)

    started = 0.0

    async def timed() -> None:
        nonlocal started
        started = trio.current_time()
        await body()

    w.run(timed)
    assert w.added == ["org/name"] and w.demand.granted == 1


def test_different_models_are_added_together_but_few_at_once(w: World) -> None:
    async def body() -> None:
        async with trio.open_nursery() as nursery:
            for i in range(9):
                nursery.start_soon(w.get, Wish(f"org/m{i}", None, f"org/m{i}"))
            await trio.sleep(0.5)
            assert w.demand.on_their_way == 9

    w.run(body)
    assert len(w.added) == 9 and w.most == demand.AT_ONCE


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (NotFound("no such"), demand.REFUSED_S),
        (AccessDenied("gated"), demand.REFUSED_S),
        (RemoteUnavailable("down"), demand.UNREACHABLE_S),
        (RemoteUnavailable("busy", retry_after=50), 50),
        (error_of(failure(0, RemoteUnavailable("busy, says a process", retry_after=50))), 50),
        (RemoteUnavailable("closed", retry_after=86400), demand.LONGEST_S),
    ],
)
def test_a_refusal_is_remembered_briefly_and_said_once(
    w: World, caplog: pytest.LogCaptureFixture, error: CakeError, seconds: float
) -> None:
    w.error = error

    async def body() -> None:
        for _ in range(3):
            assert await w.get() == type(error).__name__
        assert len(w.added) == 1
        await trio.sleep(seconds + 0.1)
        assert await w.get() == type(error).__name__
        assert len(w.added) == 2
        w.error = None
        await trio.sleep(seconds + 0.1)
        assert await w.get() == ""

    w.run(body)
    (said,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert said == f"org/name is not added on demand: {error.message}"
    assert w.demand.refused == 2


def test_a_login_ends_a_refusal(w: World) -> None:
    async def body() -> None:
        w.error = AccessDenied("gated")
        assert await w.get() == "AccessDenied"
        w.token, w.error = "hf_new", None
        assert await w.get() == ""

    w.run(body)


def test_a_lookup_waits_so_long_and_the_adding_goes_on(w: World) -> None:
    w.seconds = 50.0

    async def body() -> None:
        started = trio.current_time()
        assert await w.get() == "RemoteUnavailable"
        assert trio.current_time() - started == pytest.approx(demand.WAIT_S)
        assert await w.get() == "RemoteUnavailable"
        assert await w.get() == ""
        assert trio.current_time() - started == pytest.approx(50)

    w.run(body)
    assert w.added == ["org/name"]


def test_what_never_ends_is_given_up(w: World) -> None:
    w.seconds = 10_000.0

    async def body() -> None:
        assert await w.get() == "RemoteUnavailable"
        await trio.sleep(demand.FLIGHT_S)
        assert w.demand.on_their_way == 0 and w.at_once == 0

    w.run(body)


def test_the_memory_of_refusals_is_bounded(w: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demand, "REMEMBERED", 3)
    w.error, w.seconds = NotFound("no"), 0.0

    async def body() -> None:
        for i in (0, 1, 2, 3, 4, 4, 2, 0):
            await w.get(Wish(f"org/m{i}", None, f"org/m{i}"))

    w.run(body)
    assert w.added == [f"org/m{i}" for i in (0, 1, 2, 3, 4, 0)]


def test_a_bug_below_ends_nothing_else(w: World, caplog: pytest.LogCaptureFixture) -> None:
    w.error = ZeroDivisionError()

    async def body() -> None:
        assert await w.get() == "CakeError"
        w.error = None
        assert await w.get(Wish("org/other", None, "org/other")) == ""

    w.run(body)
    assert "ZeroDivisionError" in caplog.text
