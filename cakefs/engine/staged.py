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

SLOTS = 64  # Chunks staged at the same time in a process. One reader is at most LOCAL_WINDOW and a half ahead.
RUN = 4  # Chunks read at once: fewer threads to wake, and most requests of the kernel lie inside.
THREADS = 8
STALE_S = 2.0  # For whom nobody came in this time, his buffer goes to another.


class Part(NamedTuple):
    """Bytes `[start, stop)` of a span's content.

    Attributes:
        whole: They are shown as they are, not calculated with.
    """

    span: int
    content: Content
    start: int
    stop: int
    whole: bool


class Room(NamedTuple):
    """Slots `[first, last)` of the memory of a stage."""

    first: int
    last: int
    buffer: memoryview


class _Run:
    """Chunks `[first, last)` of a span that are staged, or on their way.

    Attributes:
        data: Their bytes, once they have come.
        left: Bytes that somebody will most likely come for.
        since: When they came, or were last given out.
        lent: Somebody may still look at them.
    """

    __slots__ = ("arrived", "content", "data", "first", "last", "left", "lent", "owner", "room", "since", "span")

    def __init__(self, owner: "Staged", part: Part, first: int, last: int, room: Room) -> None:
        self.owner = owner
        self.span = part.span
        self.content = part.content
        self.first = first
        self.last = last
        self.room = room
        self.data: memoryview | None = None
        self.left = min(part.stop, last * CHUNK) - max(part.start, first * CHUNK)
        self.since = 0.0
        self.lent = False
        self.arrived = trio.Event()

    def places(self) -> Iterator[tuple[int, int]]:
        return ((self.span, chunk) for chunk in range(self.first, self.last))


class Stage:
    """The memory of a process for what is staged, and the threads that fill it."""

    def __init__(self) -> None:
        self._used = bytearray(SLOTS)
        self._memory: memoryview | None = None
        self._wanted: deque[_Run] = deque()
        self._threads = 0
        self._here: set[_Run] = set()  # what has come and has its room still
        self._lent: list[_Run] = []

    def take(self, slots: int) -> Room | None:
        """Room that nobody uses, or that holds what nobody came for."""
        while (at := self._used.find(bytes(slots))) < 0:
            now = time.monotonic()
            stale = next((run for run in self._here if now - run.since > STALE_S and not run.lent), None)
            if stale is None:
                return None
            stale.owner.drop(stale)
        self._used[at : at + slots] = b"\1" * slots
        if self._memory is None:
            self._memory = huge_pages(SLOTS * CHUNK)
        return Room(at, at + slots, self._memory[at * CHUNK : (at + slots) * CHUNK])

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
            if run.left <= 0:
                run.owner.drop(run)

    def let_go(self) -> None:
        """To be called from time to time: the system has the memory back while nothing is staged."""
        self.settle()
        if not any(self._used):
            self._memory = None

    def read(self, runs: Iterable[_Run]) -> None:
        """Starts to fill them."""
        self._wanted.extend(runs)
        while self._threads < min(THREADS, len(self._wanted)):
            self._threads += 1
            if not _start(self._work, trio.lowlevel.current_trio_token()):
                self._threads -= 1
                break
        if not self._threads:
            while self._wanted:
                self._arrived(self._wanted.popleft(), None)

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
        self._had: set[tuple[int, int]] = set()  # given out: nobody who keeps it comes for it again
        self.runs: dict[tuple[int, int], _Run] = {}

    def ask(self, ahead: Sequence[ByteRange]) -> None:
        """What of it is not in memory is read ahead, as far as there is room."""
        self._heed_epoch()
        new: list[_Run] = []
        for part in self._parts(ahead):
            known = part.content.in_memory(part.start, part.stop)
            if known is False and self._cached and part.whole:
                new += self._new_runs(part)
            elif not known:
                _start(part.content.willneed, part.start, part.stop)
        if new:
            self._stage.read(new)

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
                if key in self._had:  # Whoever had it lost it: another pass begins.
                    self._had.clear()
                return None
            if run not in found[-1:]:
                found.append(run)
        return [self._give_out(run, start, stop) for run in found]

    def on_its_way(self, span: int, start: int, stop: int) -> bool:
        runs = map(self.runs.get, _keys(span, start, stop))
        return any(run is not None and run.data is None for run in runs)

    async def wait(self, span: int, start: int, stop: int) -> None:
        """Until nothing of it is on its way."""
        for key in _keys(span, start, stop):
            run = self.runs.get(key)
            if run is not None:
                await run.arrived.wait()

    def end(self) -> None:
        """Nobody reads the file any more."""
        for run in {run for run in self.runs.values() if run.data is not None}:
            self.drop(run)
        self.runs.clear()  # what is on its way is dropped when it comes
        self._had.clear()

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

    def _new_runs(self, part: Part) -> Iterator[_Run]:
        """For the chunks of a part that are not staged yet."""
        chunks = range(part.start // CHUNK, -(-part.stop // CHUNK))
        at = chunks.start
        while at < chunks.stop:
            run = self.runs.get((part.span, at))
            if run is not None:
                run.left += max(0, min(part.stop, run.last * CHUNK) - max(part.start, run.first * CHUNK))
                at = run.last
                continue
            stop = at
            while stop < min(chunks.stop, at + RUN) and not {(part.span, stop)} & (self._had | self.runs.keys()):
                stop += 1
            if stop > at:
                room = self._stage.take(stop - at + (not part.content.aligned))
                if room is None:
                    return
                run = _Run(self, part, at, stop, room)
                self.runs |= dict.fromkeys(run.places(), run)
                yield run
            at = max(stop, at + 1)

    def _give_out(self, run: _Run, start: int, stop: int) -> memoryview:
        """What a run has of the bytes `[start, stop)` of its span."""
        assert run.data is not None
        base = run.first * CHUNK
        data = run.data[max(start - base, 0) : stop - base]
        run.left -= len(data)
        run.since = time.monotonic()
        self._stage.lend(run)
        if run.left <= 0:
            self._had.update(run.places())
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
    except Exception:  # whoever comes for it finds out and says so; until it is told of, he waits
        return None


def _start(work: Callable[..., object], *arguments: object) -> bool:
    """In a thread; False if none can be had now."""
    try:
        trio.lowlevel.start_thread_soon(lambda: _quietly(work, *arguments), lambda outcome: outcome.unwrap())
    except RuntimeError:
        return False
    return True


def _quietly(work: Callable[..., object], *arguments: object) -> None:
    with suppress(OSError, ValueError):  # an advice that is not taken does no harm
        work(*arguments)
