"""How long answers are waited for and how long they take to come, and how many requests at once follow from that. Pure.

Where an answer is waited for much longer than it takes to come (a hub far away, small ranges, a fast link), the link is
empty most of the time, and twice as many requests fill it better. Where it takes long to come, more at once would only
stand in the way of the next reader.
"""

from collections.abc import Callable

from cakefs.remotes.base import Sink

MORE = 2  # Times as many requests on a link that is waited for.
MUCH_LONGER = 2.0
REMEMBERED = 0.8  # Of what is known so far, with every job: the last five or so count.
LONGEST_WAIT_S = 1.0  # No round trip takes so long: such a job was tried again, or the server is busy.


class Stopwatch:
    """Of the requests of one job, one after the other; in seconds.

    Args:
        clock: Seconds from any point on.

    Attributes:
        waited: Until the first bytes.
        received: From there until the last.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._asked = 0.0
        self._first: float | None = None
        self.waited = self.received = 0.0

    def begin(self, sink: Sink) -> Sink:
        """A request is made now, and what comes goes to the sink given back."""
        self._asked, self._first = self._clock(), None

        def timed(data: bytes) -> None:
            if self._first is None:
                self._first = self._clock()
            sink(data)

        return timed

    def end(self) -> None:
        """All of it has come."""
        if self._first is not None:
            self.waited += self._first - self._asked
            self.received += self._clock() - self._first


class Link:
    """Args: connections: How many requests at once where nothing speaks for more."""

    def __init__(self, connections: int) -> None:
        self._connections = connections
        self._waited = self._received = 0.0

    def note(self, waited: float, received: float) -> None:
        """Of a job that is done, as `Stopwatch` has it."""
        if 0 < waited < LONGEST_WAIT_S:
            self._waited = REMEMBERED * self._waited + waited
            self._received = REMEMBERED * self._received + received

    @property
    def connections(self) -> int:
        """How many requests at once one transfer process should make now."""
        return self._connections * (MORE if self._waited > MUCH_LONGER * self._received else 1)
