"""What is put around a remote: patience (`Retry`), restraint (`Limit`), a record of failures (`Log`).

They are remotes themselves and stack in this order: `Retry(Limit(Log(remote), 4))`. The budget of a fetch counts
the time that the network has it: waiting for a turn, or because a server asked for a pause, does not use it up.
What is no file, such as a listing, has the patience of `insist`.
"""

import logging
import math
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, TypeVar

import trio

from cakefs.errors import CakeError, RemoteUnavailable
from cakefs.model import MIB, ByteRange, Locator
from cakefs.remotes.answers import Origin, origin, shown
from cakefs.remotes.base import Remote, Sink

log = logging.getLogger(__name__)

BACKOFF_S = 0.5  # Doubles with every try in a row that brought nothing, up to the limit.
BACKOFF_LIMIT_S = 10.0
PATIENCE_S = 330.0  # The Hub's quotas are per five minutes.
AGAIN_S = 60.0  # After which a server is asked again that wants a longer pause than anybody waits for.
TRIES = 3  # Of what somebody waits for before anything else can begin.
SAID_S = 1.0  # A pause as long as this is told.

T = TypeVar("T")


class _Budget:
    """Time until a fetch is given up. It starts anew with every MiB and stands still while it is on hold."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.scope = trio.CancelScope(deadline=trio.current_time() + seconds)
        self._delivered = 0

    def deliver(self, size: int) -> None:
        self._delivered += size
        if self._delivered >= MIB:
            self._delivered = 0
            self.scope.deadline = trio.current_time() + self.seconds

    @property
    def left(self) -> float:
        return self.scope.deadline - trio.current_time()

    @contextmanager
    def hold(self) -> Iterator[None]:
        left = self.left
        self.scope.deadline = math.inf
        try:
            yield
        finally:
            self.scope.deadline = trio.current_time() + left


_budget: ContextVar[_Budget | None] = ContextVar("budget", default=None)


@contextmanager
def _off_budget() -> Iterator[None]:
    """Time in here is not held against the fetch that this task is about."""
    budget = _budget.get()
    if budget is None:
        yield
        return
    with budget.hold():
        yield


class Retry:
    """Asks again for what is missing, from the first missing byte on, until it is there or hope is gone.

    Args:
        budget_s: Give up when a MiB, or what is left, takes longer.
        patience_s: Wait for this long in all where a server asks for it, beyond the budget.
        jitter: Uniform random number between its arguments; the whole delay is random, so that those who failed
            together do not come back together.
    """

    def __init__(
        self,
        remote: Remote,
        budget_s: float = 60.0,
        *,
        patience_s: float = PATIENCE_S,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._remote = remote
        self._budget_s = budget_s
        self._patience_s = patience_s
        self._jitter = jitter

    async def fetch(self, locator: Locator, span: ByteRange, sink: Sink) -> None:
        """As `Remote.fetch`. Errors that another try cannot mend are passed on at once."""
        attempt = _Attempts(locator, span, sink, _Budget(self._budget_s))
        token = _budget.set(attempt.budget)
        try:
            with attempt.budget.scope:
                await self._try(attempt)
        finally:
            _budget.reset(token)
        if attempt.budget.scope.cancelled_caught and not attempt.complete:
            raise attempt.given_up()

    async def _try(self, attempt: "_Attempts") -> None:
        patience = self._patience_s
        while not await attempt.once(self._remote):
            assert attempt.last is not None
            asked = attempt.last.retry_after or 0.0
            if asked > patience:
                raise attempt.given_up()
            patience -= asked
            _say_pause(asked, attempt.last)
            with _off_budget():
                await trio.sleep(asked)
            # At most half of what is left: the last tries come when they can still help.
            longest = min(BACKOFF_LIMIT_S, max(BACKOFF_S / 4, attempt.budget.left / 2))
            await trio.sleep(self._jitter(0.0, min(longest, BACKOFF_S * 2.0 ** min(attempt.fruitless, 10))))


class _Attempts:
    """One fetch over all its tries."""

    def __init__(self, locator: Locator, span: ByteRange, sink: Sink, budget: _Budget) -> None:
        self.locator = locator
        self.span = span
        self.sink = sink
        self.budget = budget
        self.position = span.start
        self.tries = 0
        self.fruitless = 0
        self.started = trio.current_time()
        self.last: RemoteUnavailable | None = None

    async def once(self, remote: Remote) -> bool:
        """True when everything has come; else `last` says why not."""
        before = self.position
        self.tries += 1
        try:
            await remote.fetch(self.locator, ByteRange(self.position, self.span.stop), self._deliver)
            return True
        except RemoteUnavailable as error:
            self.last = error
        self.fruitless = 0 if self.position > before else self.fruitless + 1
        return self.complete

    @property
    def complete(self) -> bool:
        return self.position == self.span.stop

    def _deliver(self, data: bytes) -> None:
        self.sink(data)
        self.position += len(data)
        self.budget.deliver(len(data))

    def given_up(self) -> RemoteUnavailable:
        seconds = trio.current_time() - self.started
        why = self.last.message if self.last else f"less than 1 MiB came in {self.budget.seconds:.0f} s"
        tries = "1 try" if self.tries == 1 else f"{self.tries} tries"
        return RemoteUnavailable(
            f"bytes {self.position}-{self.span.stop} of {shown(self.locator.url)} did not come"
            f" in {tries} ({seconds:.0f} s): {why}",
            hint=self.last.hint if self.last else "",
            retry_after=self.last.retry_after if self.last else None,
        )


async def insist(ask: Callable[[], Awaitable[T]]) -> T:
    """The answer to a question that may be asked again: three tries, and the pauses that the server asks for.

    Raises:
        CakeError: The last failure, or one that a pause would end too late for, by the deadline of who calls.
    """
    for fruitless in range(1, TRIES):
        try:
            return await ask()
        except RemoteUnavailable as error:
            asked = error.retry_after or 0.0
            if trio.current_time() + asked > trio.current_effective_deadline():
                raise
            _say_pause(asked, error)
        await trio.sleep(asked + random.uniform(0.0, BACKOFF_S * fruitless))
    return await ask()


def _say_pause(seconds: float, why: CakeError) -> None:
    """Now, and not when it is over: somebody may be waiting."""
    if seconds >= SAID_S:
        log.warning("trying again in %.0f s: %s", seconds, why.message, extra={"at_once": True})


class _Pause(NamedTuple):
    until: float
    why: str


class Limit:
    """At most `n` fetches at once, first come first served; none of what a server asked to leave alone for a while: one
    file, or all that it has.

    During such a pause a fetch fails at once with what is left of it, as if the server had been asked: `Retry` waits.
    """

    def __init__(self, remote: Remote, n: int) -> None:
        self._remote = remote
        self._limiter = trio.CapacityLimiter(n)
        self._pauses: dict[Origin | str, _Pause] = {}

    async def fetch(self, locator: Locator, span: ByteRange, sink: Sink) -> None:
        place = origin(locator.url)
        with _off_budget():
            await self._limiter.acquire()
        try:
            self._check_pause(place)
            self._check_pause(locator.url)
            await self._remote.fetch(locator, span, sink)
        except RemoteUnavailable as error:
            if error.retry_after:
                seconds = error.retry_after if error.retry_after <= PATIENCE_S else AGAIN_S
                pause = _Pause(trio.current_time() + seconds, error.message)
                self._pauses[place if error.whole_host else locator.url] = pause
            raise
        finally:
            self._limiter.release()

    def _check_pause(self, what: Origin | str) -> None:
        pause = self._pauses.get(what)
        if pause is None:
            return
        left = pause.until - trio.current_time()
        if left > 0:
            raise RemoteUnavailable(pause.why, retry_after=left, whole_host=not isinstance(what, str))
        del self._pauses[what]


class Log:
    """Tells the log of every failure that another try may mend: what, which bytes, why. Giving up is told by others."""

    def __init__(self, remote: Remote, logger: logging.Logger = log) -> None:
        self._remote = remote
        self._log = logger

    async def fetch(self, locator: Locator, span: ByteRange, sink: Sink) -> None:
        try:
            await self._remote.fetch(locator, span, sink)
        except CakeError as error:
            level = logging.WARNING if error.retryable else logging.DEBUG
            self._log.log(level, "bytes %d-%d of %s: %s", span.start, span.stop, shown(locator.url), error.message)
            raise
