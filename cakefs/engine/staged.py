"""What a reader of a cold disk comes to next, read past the kernel's cache into a few buffers of this process.

The pages of a mount are a copy of those of the blobs. By way of the kernel's cache a model that is read after a boot
takes its size in memory twice, and the time to make room for it twice. So what is not in memory is read with O_DIRECT,
a few chunks at a time, by a few threads, and given out from there once. Whatever is not staged is read as ever.

All but the reading itself is done by trio's thread.
"""

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import trio

from cakefs.buffers import huge_pages
from cakefs.model import CHUNK, ByteRange
from cakefs.store.content import Content

SLOTS = 128  # Chunks staged at the same time in a process.
RUN = 4  # Chunks read at once: fewer threads to wake, and most requests of the kernel lie inside.
THREADS = 8
SMALL = CHUNK // 4  # Parts below are left to the kernel: each would take a slot, and a call to open the file.
STALE_S = 2.0  # For what nobody came in this time, its room goes to something else.
PATIENCE_S = 2.0  # Who waits for longer reads by himself.


class Part(NamedTuple):
    """Bytes `[start, stop)` of a span's content.

    Attributes:
        place: Where they are in the file that is shown.
        whole: They are shown as they are, not calculated with.
    """

    span: int
    content: Content
    start: int
    stop: int
    place: int
    whole: bool

    def last(self, size: int) -> ByteRange:
        """Where its last `size` bytes are in the file."""
        stop = self.place + self.stop - self.start
        return ByteRange(stop - size, stop)


class Room(NamedTuple):
    """Slots `[first, last)` of the memory of a stage."""

    first: int
    last: int
    buffer: memoryview


class _Run:
    """Chunks `[first, last)` of a span that are staged, or on their way.

    Attributes:
        wanted: Bytes of the span that somebody will most likely come for.
        given: How many of them were given out.
        data: Their bytes, once they have come.
        since: When they came, or were last given out.
        lent: Somebody may still look at them.
    """

    __slots__ = (
        "arrived", "content", "data", "first", "given", "last", "lent", "owner", "room", "since", "span", "wanted"
    )  # fmt: skip

    def __init__(self, owner: "Staged", part: Part, first: int, last: int, room: Room) -> None:
        self.owner = owner
        self.span = part.span
        self.content = part.content
        self.first = first
        self.last = last
        self.room = room
        self.wanted = ByteRange(max(part.start, first * CHUNK), min(part.stop, last * CHUNK))
        self.given = 0
        self.data: memoryview | None = None
        self.since = 0.0
        self.lent = False
        self.arrived = trio.Event()

    @property
    def is_over(self) -> bool:
        """Whether nobody will come any more."""
        return self.given >= self.wanted.size

    def want(self, start: int, stop: int) -> None:
        """These bytes, too, as far as they lie here."""
        start, stop = max(start, self.first * CHUNK), min(stop, self.last * CHUNK)
        if start < stop:
            self.wanted = ByteRange(min(start, self.wanted.start), max(stop, self.wanted.stop))

    def places(self) -> Iterator[tuple[int, int]]:
        return ((self.span, chunk) for chunk in range(self.first, self.last))


class Stage:
    """The memory of a process for what is staged, and the threads that fill it."""

    def __init__(self) -> None:
        self._used = bytearray(SLOTS)
        self._memory: memoryview | None = None
        self._wanted: deque[_Run] = deque()
        self._threads = 0
        self._awaited = 0  # runs that have not come yet
        self._here: set[_Run] = set()  # what has come and has its room still
        self._lent: list[_Run] = []

    def take(self, slots: int) -> Room | None:
        """Room that nobody uses, or that holds what nobody came for."""
        while (at := self._used.find(bytes(slots))) < 0:
            stale = next(self._stale(), None)
            if stale is None:
                return None
            stale.owner.drop(stale)
        if self._memory is None:
            try:
                self._memory = huge_pages(SLOTS * CHUNK)
            except OSError:
                return None
        self._used[at : at + slots] = b"\1" * slots
        return Room(at, at + slots, self._memory[at * CHUNK : (at + slots) * CHUNK])

    def share(self) -> int:
        """How many slots one who asks may take: half of what is free, so that there is always some for others."""
        return max(RUN + 1, self._used.count(0) // 2)

    def give(self, run: _Run) -> None:
        """The room of what has come is free again, if it was not so already."""
        if run in self._here:
            self._here.remove(run)
            first, last, _ = run.room
            self._used[first:last] = bytes(last - first)

    def lend(self, run: _Run) -> None:
        """Its bytes are looked at until `settle`: they stay as they are."""
        run.lent = True
        self._lent.append(run)

    def settle(self) -> None:
        """Nobody looks at what was lent any more."""
        while self._lent:
            run = self._lent.pop()
            run.lent = False
            if run.is_over:
                run.owner.drop(run)

    def let_go(self) -> None:
        """To be called from time to time: what nobody came for is dropped, and the system has unused memory back."""
        self.settle()
        for run in list(self._stale()):
            run.owner.drop(run)
        if not any(self._used):
            self._memory = None

    def read(self, runs: Iterable[_Run]) -> None:
        """Starts to fill them."""
        before = len(self._wanted)
        self._wanted.extend(runs)
        self._awaited += len(self._wanted) - before
        while self._wanted and self._threads < min(THREADS, self._awaited):  # some may hang
            self._threads += 1
            if not _start(self._work, trio.lowlevel.current_trio_token()):
                self._threads -= 1
                break
        if not self._threads:
            while self._wanted:
                self._arrived(self._wanted.popleft(), None)

    def _stale(self) -> Iterator[_Run]:
        now = time.monotonic()
        return (run for run in self._here if now - run.since > STALE_S and not run.lent)

    def _work(self, token: trio.lowlevel.TrioToken) -> None:
        """In a thread."""
        with suppress(trio.RunFinishedError):
            while True:
                try:
                    run = self._wanted.popleft()
                except IndexError:
                    break
                token.run_sync_soon(self._arrived, run, _read(run))
            token.run_sync_soon(self._ended)

    def _ended(self) -> None:
        self._threads -= 1
        self.read(())  # for those who came between the last look of the thread and this

    def _arrived(self, run: _Run, data: memoryview | None) -> None:
        self._awaited -= 1
        run.data = data
        run.since = time.monotonic()
        self._here.add(run)
        if data is None or not run.owner.keeps(run):
            run.owner.drop(run)
        run.arrived.set()


class Staged:
    """Of one file that is shown.

    Args:
        parts: What of the store is at ranges of the file.
        epoch: Differs from its earlier value when what was read before may be out of date.
        cached: Whoever reads keeps what he got, as the kernel does; else the kernel is to keep it for him.

    Attributes:
        runs: What is staged or on its way, by span and chunk.
    """

    def __init__(
        self,
        stage: Stage,
        parts: Callable[[Sequence[ByteRange]], Sequence[Part]],
        epoch: Callable[[], Hashable],
        *,
        cached: bool,
    ) -> None:
        self._stage = stage
        self._parts = parts
        self._epoch = epoch
        self._as_of = epoch()
        self._cached = cached
        self.runs: dict[tuple[int, int], _Run] = {}

    def ask(self, ahead: Sequence[ByteRange]) -> list[ByteRange]:
        """What of it is not in memory is read ahead. Returns: What there is no room for now."""
        self._heed_epoch()
        runs: list[_Run] = []
        advised: list[Part] = []
        refused: list[ByteRange] = []
        slots = self._stage.share()
        for part in self._parts(ahead):
            if self._is_staged(part):
                new, rest = self._new_runs(part, slots)
                slots -= sum(run.room.last - run.room.first for run in new)
                runs += new
                if rest:
                    refused.append(part.last(rest))
            elif not part.content.in_memory(part.start, part.stop):
                advised.append(part)
        if advised:
            _start(_advise, advised)
        if runs:
            self._stage.read(runs)
        return refused

    def get(self, span: int, start: int, stop: int) -> list[memoryview] | None:
        """The bytes of a span, one piece behind the other, none of them on its way.

        They are valid until the next call, for this file or another: nothing is awaited before they are sent.

        Returns:
            None when they have to be read elsewhere.
        """
        self._heed_epoch()
        self._stage.settle()
        found: list[_Run] = []
        for key in _keys(span, start, stop):
            run = self.runs.get(key)
            if run is None:
                return None
            if run not in found[-1:]:
                found.append(run)
        return [self._give_out(run, start, stop) for run in found]

    def on_its_way(self, span: int, start: int, stop: int) -> bool:
        runs = map(self.runs.get, _keys(span, start, stop))
        return any(run is not None and run.data is None for run in runs)

    async def wait(self, span: int, start: int, stop: int) -> None:
        """Until nothing of it is on its way; not for long: disks may hang, and some files be on another one."""
        for key in _keys(span, start, stop):
            run = self.runs.get(key)
            if run is not None:
                with trio.move_on_after(PATIENCE_S) as patience:
                    await run.arrived.wait()
                if patience.cancelled_caught:
                    self._forget(run)

    def end(self) -> None:
        """Nobody reads the file any more, or what was read is out of date."""
        for run in {run for run in self.runs.values() if run.data is not None}:
            self.drop(run)
        self.runs.clear()  # what is on its way is dropped when it comes

    def keeps(self, run: _Run) -> bool:
        return self.runs.get((run.span, run.first)) is run

    def drop(self, run: _Run) -> None:
        """What has come is staged no longer."""
        self._forget(run)
        run.data = None
        self._stage.give(run)

    def _forget(self, run: _Run) -> None:
        for key in run.places():
            if self.runs.get(key) is run:
                del self.runs[key]

    def _is_staged(self, part: Part) -> bool:
        """Whether what is not in memory of it is to be; else the kernel is told of it."""
        large = part.stop - part.start >= SMALL
        return self._cached and part.whole and large and part.content.in_memory(part.start, part.stop) is not None

    def _new_runs(self, part: Part, slots: int) -> tuple[list[_Run], int]:
        """For the chunks of a part that are not staged yet; and how many bytes, at its end, have no room in that many
        slots."""
        new: list[_Run] = []
        at, end = part.start // CHUNK, -(-part.stop // CHUNK)
        while at < end:
            run = self.runs.get((part.span, at))
            if run is not None:
                run.want(part.start, part.stop)
                at = run.last
                continue
            stop = at
            while stop < min(end, at + RUN) and (part.span, stop) not in self.runs:
                stop += 1
            # Each by itself: the kernel may have read a little ahead of the reader, and would go on so for ever.
            if stop > at and not part.content.in_memory(max(part.start, at * CHUNK), min(part.stop, stop * CHUNK)):
                needed = stop - at + (not part.content.aligned)
                room = self._stage.take(needed) if needed <= slots else None
                if room is None:
                    return new, part.stop - max(part.start, at * CHUNK)
                slots -= needed
                run = _Run(self, part, at, stop, room)
                self.runs |= dict.fromkeys(run.places(), run)
                new.append(run)
            at = max(stop, at + 1)
        return new, 0

    def _give_out(self, run: _Run, start: int, stop: int) -> memoryview:
        """What a run has of the bytes `[start, stop)` of its span."""
        assert run.data is not None
        base = run.first * CHUNK
        data = run.data[max(start - base, 0) : stop - base]
        run.given += len(data)
        run.since = time.monotonic()
        self._stage.lend(run)
        if run.is_over:
            self._forget(run)
        return data

    def _heed_epoch(self) -> None:
        if self._as_of != (epoch := self._epoch()):
            self.end()
            self._as_of = epoch


def _keys(span: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    return ((span, chunk) for chunk in range(start // CHUNK, -(-stop // CHUNK)))


def _read(run: _Run) -> memoryview | None:
    try:
        return run.content.read_direct(run.room.buffer, run.first, run.last)
    except Exception:  # Whoever comes for it finds out, and says so; until he is told, he waits.
        return None


def _advise(parts: Iterable[Part]) -> None:
    """In a thread: making room for pages takes the processor time of reading."""
    for part in parts:
        with suppress(OSError, ValueError):  # an advice that is not taken does no harm
            part.content.willneed(part.start, part.stop)


def _start(work: Callable[..., object], *arguments: object) -> bool:
    """In a thread; False if none can be had now."""
    try:
        trio.lowlevel.start_thread_soon(lambda: work(*arguments), lambda outcome: outcome.unwrap())
    except RuntimeError:
        return False
    return True
