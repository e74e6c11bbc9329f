"""Access pattern -> the next range to want. Pure: observations in, ranges out.

The reader of a model file shows itself in three ways, and the kernel's own readahead blurs all of them:

- it *runs* through bytes (read(), a mapping touched in order): the next read begins where an earlier one ended. The
  window ahead of it doubles with every step, from a few MiB up to the limit;
- it *walks* the heads of tensors (safetensors touches one page of each): a read that covers the first byte of a
  tensor is strong evidence that the tensor will be used, so its rest is wanted and then its successors in file order,
  more of them with every head seen. Such a walk waits for each head in turn, so the heads ahead of it are wanted before
  any body. The kernel reads around a fault, so such a read often begins in the tail of the tensor before: that tail
  says nothing about the neighbour;
- it *jumps* inside tensors (4 KiB here and there), or reads the header: nothing is wanted.
"""

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from cakefs.model import CHUNK, MIB, ByteRange
from cakefs.plan.ranges import coalesce, subtract

RUN_WINDOW = MIB  # Of a run seen for the first time: two reads in a row may be chance.
FIRST_WINDOW = 8 * MIB  # Of the second head of a walk. Guess: two requests of 4 MiB, 64 ms of a 1 Gbit/s link.
LAST_WINDOW = 256 * MIB  # 2 s of a 1 Gbit/s link; more only makes a wrong guess dearer.
LOCAL_WINDOW = 32 * MIB  # Where all is here: how far ahead a cold disk is read (more gained nothing).
HEAD_LIMIT = 64 * MIB  # A first touch wants at most this much of one tensor.
FIRST_HEADS = 64  # With the second head of a walk. Each step more would be a round trip more.
HEADS = 256  # Heads wanted at once: 512 MiB at most.
AROUND = MIB  # The kernel reads before a fault up to one request; the head is there only when that has come, too.
HOLES_PART = 4  # At the end up to a quarter of the file is filled in; a worker with half of the layers wants half.
# Reads that follow each other this far may still be one fault: the kernel reads up to 1 MiB before it and 1 MiB behind.
WALK_REACH = 3 * MIB
STREAMS = 32  # Readers of one file told apart: transformers uses 4 threads, fastsafetensors 16.
SLACK = 256 * 1024  # The kernel may skip or repeat up to one readahead window between two reads of one run.


class Ahead(NamedTuple):
    """What should be fetched: `soon`, before all the rest that is fetched ahead, and `later`, in its turn."""

    soon: list[ByteRange]
    later: list[ByteRange]


NOTHING = Ahead([], [])


class _Stream(NamedTuple):
    """Reads that follow each other: where they began, the window ahead of the last, and where that ended."""

    begin: int
    window: int
    end: int


class Readahead:
    """Watches the reads of one file.

    Args:
        starts: Offsets of the tensors' first bytes in the file, rising; what lies before the first is header.
        size: Of the file, in bytes.

    Attributes:
        local: What is wanted is here, and comes from a disk: little is wanted ahead, and again at the next pass.
    """

    local = False

    def __init__(self, starts: Sequence[int], size: int) -> None:
        self._starts = starts
        self._size = size
        self._seen = bytearray(len(starts))  # heads that were touched
        self._streams: OrderedDict[int, _Stream] = OrderedDict()  # by the SLACK that its last read ended in
        self._heads = 0
        self._at, self._until = 0, 0  # a run that is at the one and needs no look before the other
        self._asked: list[ByteRange] = []  # disjoint, rising, never touching

    @property
    def limit(self) -> int:
        """The largest window."""
        return LOCAL_WINDOW if self.local else LAST_WINDOW

    def observe(self, offset: int, size: int) -> Ahead:
        """Notes a read of `size` bytes at `offset`; returns what should be fetched soon and was not asked for yet."""
        stop = offset + size
        if offset == self._at and stop < self._until:
            self._at = stop
            return NOTHING
        return self._look(offset, stop)

    def _look(self, offset: int, stop: int) -> Ahead:
        if self._until:
            self._remember(_Stream(self._at - self.limit, self.limit, self._at))
            self._until = 0
        stream = self._continued(offset, stop) or _Stream(offset, 0, stop)
        if offset < (self._starts[0] if self._starts else 0):
            self._remember(stream)
            return NOTHING
        head = bisect_left(self._starts, offset)
        if head < len(self._starts) and self._starts[head] < stop <= stream.begin + WALK_REACH:
            return self._touched_head(head, stop, stream)
        if stream.begin == offset:
            self._remember(stream)
            return NOTHING
        return Ahead([], self._run_on(stop, stream))

    def _run_on(self, stop: int, stream: _Stream) -> list[ByteRange]:
        window = min(self.limit, max(RUN_WINDOW, 2 * stream.window))
        self._remember(_Stream(stream.begin, window, stop))
        wanted = self._ask(stop, stop + window)
        if window == self.limit:
            frontier = self._frontier(stop)
            self._at, self._until = stop, frontier - self.limit // 2 if frontier < self._size else self._size
        return wanted

    def forget(self) -> None:
        """What was asked for did not come (or went): later observations may ask for it again."""
        self._asked.clear()
        self._until = 0

    def take_back(self, ranges: Sequence[ByteRange]) -> None:
        """These were not asked for after all: later observations may do so."""
        if ranges:
            self._asked = subtract(self._asked, ranges)
            self._until = 0

    def _continued(self, offset: int, stop: int) -> _Stream | None:
        """The stream that this read goes on with, taken out of the table and brought to its end."""
        near = offset // SLACK
        for place in (near, near - 1, near + 1):
            stream = self._streams.get(place)
            if stream is not None and abs(offset - stream.end) <= SLACK and stop > stream.end:
                del self._streams[place]
                return stream._replace(end=stop)
        return None

    def _touched_head(self, head: int, stop: int, stream: _Stream) -> Ahead:
        self._heads += not self._seen[head]
        self._seen[head] = 1
        window = min(self.limit, FIRST_WINDOW << min(self._heads - 1, 8)) if self._heads > 1 else 0
        self._remember(_Stream(stream.begin, max(window, stream.window), stop))
        next_head = bisect_left(self._starts, stop)
        tensor_stop = self._starts[next_head] if next_head < len(self._starts) else self._size
        heads = self._heads_after(head) if self._heads > 1 and not self.local else []  # A disk is no round trip away.
        return Ahead(heads, self._ask(stop, max(min(tensor_stop, stop + min(HEAD_LIMIT, self.limit)), stop + window)))

    def _heads_after(self, head: int) -> list[ByteRange]:
        """The heads of the next tensors with what is read around them: four times as many with every head touched."""
        first = head + 1
        last = min(len(self._starts), first + min(HEADS, FIRST_HEADS << 2 * min(self._heads - 2, 15)))
        ends = [*self._starts[first + 1 : last + 1], self._size][: last - first]
        starts = self._starts[first:last]
        heads = [ByteRange(max(0, s - AROUND), min(s + CHUNK, e)) for s, e in zip(starts, ends, strict=True)]
        new = subtract(heads, self._asked)
        if new:
            self._asked = coalesce([*self._asked, *new])
        return new

    def _ask(self, position: int, target: int) -> list[ByteRange]:
        """Asks only when half of the window is new, so that requests stay large."""
        target = min(target, self._size)
        if self.local:
            self._asked = [r for r in self._asked if r.stop > position]
        frontier = self._frontier(position)
        if frontier >= target or (
            frontier > position and target < self._size and 2 * (target - frontier) < target - position
        ):
            return []
        new = subtract([ByteRange(frontier, target)], self._asked)
        self._asked = coalesce([*self._asked, *new])
        return new + (self._holes() if target == self._size else [])

    def _holes(self) -> list[ByteRange]:
        """At the end of the file: what was passed over, if nearly everything was wanted so far.

        The walk of a loader that takes all jumps now and then, and begins with tensors that came along with the header.
        """
        data = ByteRange(self._starts[0] if self._starts else 0, self._size)
        holes = subtract([data], self._asked)
        if sum(hole.size for hole in holes) * HOLES_PART > data.size:
            return []
        self._asked = coalesce([*self._asked, *holes])
        return holes

    def _frontier(self, position: int) -> int:
        """The first byte from `position` on that was not asked for."""
        at = bisect_right(self._asked, (position, self._size + 1)) - 1
        return max(position, self._asked[at].stop) if at >= 0 else position

    def _remember(self, stream: _Stream) -> None:
        self._streams[stream.end // SLACK] = stream
        if len(self._streams) > STREAMS:
            self._streams.popitem(last=False)
