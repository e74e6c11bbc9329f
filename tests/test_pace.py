"""How many requests at once a link is good for (`engine/transfer/pace.py`)."""

from cakefs.engine.transfer.pace import LONGEST_WAIT_S, Link, Stopwatch


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_waiting_ends_with_the_first_bytes() -> None:
    clock, came = Clock(), list[bytes]()
    watch = Stopwatch(clock)
    for waited, pieces in ((0.5, (0.25, 0.125)), (2.0, ())):
        sink = watch.begin(came.append)
        clock.now += waited
        sink(b"first")
        for seconds in pieces:
            clock.now += seconds
            sink(b"more")
        watch.end()
    assert (watch.waited, watch.received) == (2.5, 0.375)
    assert came == [b"first", b"more", b"more", b"first"]


def test_a_request_of_which_nothing_came_counts_as_nothing() -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    watch.begin(lambda data: None)
    clock.now += 1
    watch.end()
    assert (watch.waited, watch.received) == (0, 0)


def test_a_link_that_is_waited_for_takes_twice_as_many() -> None:
    link = Link(4)
    assert link.connections == 4
    link.note(0.1, 0.02)
    assert link.connections == 8


def test_a_link_that_is_full_does_not() -> None:
    link = Link(4)
    link.note(0.1, 0.02)  # the first request had it for itself
    for _ in range(3):
        link.note(0.02, 0.25)
    assert link.connections == 4
    for _ in range(12):
        link.note(0.1, 0.02)
    assert link.connections == 8  # somebody else went away


def test_what_is_no_round_trip_says_nothing_of_the_link() -> None:
    link = Link(4)
    link.note(LONGEST_WAIT_S, 0.01)  # tried again
    link.note(0.0, 0.0)  # all of it was here
    assert link.connections == 4
