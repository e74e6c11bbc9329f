"""Models that are added because somebody looked for them: one flight each, bounded waits, brief memory of refusals."""

import logging
from collections.abc import Awaitable, Callable
from copy import copy
from typing import NamedTuple

import trio

from cakefs.errors import AccessDenied, CakeError, RemoteUnavailable
from cakefs.plan.wish import Wish

log = logging.getLogger(__name__)

WAIT_S = 20.0  # How long a lookup waits; the adding goes on, and the next lookup joins it.
FLIGHT_S = 1800.0  # Then it is given up; what the Hub cache has of a model is read once, at the speed of the disk.
AT_ONCE = 4  # Processes that add.
REFUSED_S = 30.0  # No means no for so long,
UNREACHABLE_S = 5.0  # and an unreachable Hub is asked again after this.
LONGEST_S = 60.0  # unless it asks for more time, which it gets up to this.
REMEMBERED = 1000  # Refusals.


class Flight:
    """One model on its way. Once `done`, `error` is None where it is there."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: CakeError | None = None


class Refusal(NamedTuple):
    """Holds until a time of the loop's clock, and for one token only: after a login it may be granted."""

    until: float
    token: str | None
    error: CakeError


class Demand:
    """Grants wishes one after the other or a few at once.

    Args:
        add: Adds a model; raises CakeError.
        token: The one that would be used now.
    """

    def __init__(self, add: Callable[[Wish], Awaitable[None]], token: Callable[[], str | None]) -> None:
        self._add = add
        self._token = token
        self._limit = trio.CapacityLimiter(AT_ONCE)
        self._flights: dict[str, Flight] = {}
        self._refused: dict[str, Refusal] = {}
        self._nursery: trio.Nursery | None = None
        self.granted = 0
        self.refused = 0

    @property
    def on_their_way(self) -> int:
        return len(self._flights)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Owns the flights; until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    async def get(self, wish: Wish) -> None:
        """Waits until the model is added.

        Raises:
            CakeError: RemoteUnavailable when that takes too long, else what adding it raised.
        """
        flight = self._flights.get(wish.name) or self._start(wish)
        with trio.move_on_after(WAIT_S):
            await flight.done.wait()
        if not flight.done.is_set():
            log.info("adding %s takes more than %.0f s: it goes on", wish.name, WAIT_S)
            raise RemoteUnavailable(f"{wish.name} is still being added", hint="look again later")
        if flight.error is not None:
            raise copy(flight.error)

    def _start(self, wish: Wish) -> Flight:
        refusal = self._refused.get(wish.name)
        if refusal is not None and trio.current_time() < refusal.until and refusal.token == self._token():
            raise copy(refusal.error)
        if self._nursery is None:
            raise RemoteUnavailable(f"{wish.name} cannot be added: nothing is served")
        flight = self._flights[wish.name] = Flight()
        self._nursery.start_soon(self._fly, wish, flight)
        return flight

    async def _fly(self, wish: Wish, flight: Flight) -> None:
        started, token = trio.current_time(), self._token()
        try:
            with trio.fail_after(FLIGHT_S):
                async with self._limit:
                    await self._add(wish)
            self.granted += 1
            self._refused.pop(wish.name, None)
            log.info("added %s on demand in %.1f s", wish.name, trio.current_time() - started)
        except trio.TooSlowError:
            flight.error = RemoteUnavailable(f"{wish.name} could not be added within {FLIGHT_S:.0f} s")
        except CakeError as error:
            flight.error = error
        except Exception as error:  # a bug, or no process could be started: the mount must not end with it
            log.error("adding %s: unexpected failure", wish.name, exc_info=error)
            flight.error = CakeError(f"adding it failed: {error!r}")
        finally:
            del self._flights[wish.name]
            flight.done.set()
        if flight.error is not None:
            self._refuse(wish, flight.error, token)

    def _refuse(self, wish: Wish, error: CakeError, token: str | None) -> None:
        """Remembers, and says it unless it was the last thing said about this name."""
        self.refused += 1
        seconds = REFUSED_S
        if isinstance(error, RemoteUnavailable):
            seconds = min(max(UNREACHABLE_S, error.retry_after or 0.0), LONGEST_S)
        before = self._refused.pop(wish.name, None)
        self._refused[wish.name] = Refusal(trio.current_time() + seconds, token, error)
        if len(self._refused) > REMEMBERED:
            del self._refused[next(iter(self._refused))]
        if before is None or before.error.message != error.message:
            hint = f" (hint: {error.hint})" if error.hint and isinstance(error, AccessDenied) else ""
            log.warning("%s is not added on demand: %s%s", wish.name, error.message, hint)
