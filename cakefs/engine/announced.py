"""What the kernel was asked to read from the disk before a reader comes to it, and need not keep once it was served.

The pages of a mount are a copy of those of the blobs: a model that is read after a boot would take its size in memory
twice. So what came from the disk for a reader is given back once he has it; what the kernel had before stays. Read
again, for another model that shares it, it comes from the disk again.
"""

from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from typing import NamedTuple

import trio

from cakefs.errors import CakeError
from cakefs.model import MIB, ByteRange
from cakefs.plan.ranges import coalesce, subtract
from cakefs.store.content import Content

BATCH = 16 * MIB  # Given back at once: half of what is asked for at once.
RANGES = 1024  # Of what was served: more are of a reader that jumps, for whom nothing is asked.


class Part(NamedTuple):
    """Bytes `[start, stop)` of a span's content."""

    span: int
    content: Content
    start: int
    stop: int


class Announced:
    """Of one file that is shown. The work is done in threads: making room for pages, and taking it back, takes the
    processor time of reading.

    Args:
        parts: What of the store is at ranges of the file; of some spans only, where any are named.
        cached: Whoever reads keeps what was served.
    """

    def __init__(
        self, parts: Callable[[Sequence[ByteRange], Container[int] | None], Sequence[Part]], *, cached: bool
    ) -> None:
        self._parts = parts
        self._cached = cached
        self._served: list[ByteRange] = []
        self._size = 0
        self._given_back: list[ByteRange] = []
        self.cold: set[int] = set()  # spans of which something was not in memory

    def ask(self, ahead: Sequence[ByteRange]) -> None:
        """What a reader will most likely come to is read ahead of it, but for what was served already."""
        if parts := self._parts(subtract(ahead, self._given_back), None):
            _start(lambda: self._ask(parts))

    def served(self, start: int, stop: int) -> None:
        """The reader has those bytes of the file. To be called where there is anything `cold`."""
        self._served.append(ByteRange(start, stop))
        self._size += stop - start
        if self._size >= BATCH:
            self._give_back()

    def end(self) -> None:
        """Nobody reads the file any more."""
        if self.cold:
            self._give_back()
            self.cold.clear()
            self._given_back = []

    def _ask(self, parts: Sequence[Part]) -> None:
        for span, content, start, stop in parts:
            with suppress(ValueError, OSError):  # closed meanwhile; an advice that is not taken does no harm
                if content.willneed(start, stop) and self._cached:
                    self.cold.add(span)

    def _give_back(self) -> None:
        served = coalesce(self._served)
        with suppress(CakeError):  # such as a catalog that cannot be read now: the bytes were served all the same
            parts = self._parts(served, self.cold)
            _start(lambda: _give_back(parts))
        again = 2 * sum(r.size for r in subtract(served, self._given_back)) < self._size
        if again or len(self._given_back) > RANGES:
            self._given_back = []  # The reader lost what it had: another pass.
        self._given_back = coalesce([*self._given_back, *served])
        self._served, self._size = [], 0


def _give_back(parts: Sequence[Part]) -> None:
    for _, content, start, stop in parts:
        with suppress(ValueError, OSError):
            content.wontneed(start, stop)


def _start(work: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # no thread can be had now: nothing is lost but time
        trio.lowlevel.start_thread_soon(work, lambda outcome: outcome.unwrap())
