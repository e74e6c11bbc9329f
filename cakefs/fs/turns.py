"""Who reads the next request of the kernel: a task that has just answered one takes the next at once, if it is there.

pyfuse3's loop waits through trio for each request: a lock, `epoll_ctl`, `epoll_wait` and two task switches, about as
much as a cached read of 128 KiB costs altogether. Under load the next request is there before the last is answered, and
one `poll` tells. Every `TURN_S` the other tasks get their turn, whatever waits.

pyfuse3 looks its `trio` up as an attribute of its own module, which is how `pyfuse3.asyncio` puts another in its place.
"""

import select
from typing import Any

import pyfuse3
import trio

TURN_S = 0.001


class Turns:
    """Stands for the lock of pyfuse3's loop and for its wait: only one task may wait for a descriptor in trio."""

    def __init__(self) -> None:
        self._lock = trio.Lock()
        self._poll = select.poll()
        self._fd = -1
        self._until = 0.0
        self._at_once = False

    async def __aenter__(self) -> None:
        self._at_once = self._fd >= 0 and trio.current_time() < self._until and bool(self._poll.poll(0))
        if not self._at_once:
            await self._lock.acquire()

    async def wait_readable(self, fd: int) -> None:
        if self._at_once:
            return
        if fd != self._fd:
            self._poll.register(fd, select.POLLIN)
            self._fd = fd
        await trio.lowlevel.wait_readable(fd)
        while not self._poll.poll(0):  # another task took the request meanwhile, and reading one would block
            await trio.lowlevel.wait_readable(fd)
        self._until = trio.current_time() + TURN_S

    async def __aexit__(self, *_: object) -> None:
        if self._at_once:
            self._at_once = False
        else:
            self._lock.release()


class _Lowlevel:
    def __init__(self, turns: Turns) -> None:
        self.wait_readable = turns.wait_readable

    def __getattr__(self, name: str) -> Any:
        return getattr(trio.lowlevel, name)


class _Trio:
    def __init__(self) -> None:
        turns = Turns()
        self.lowlevel = _Lowlevel(turns)
        self.Lock = lambda: turns

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)


def take_turns() -> None:
    """From now on in this process; to be called before `pyfuse3.main`."""
    pyfuse3.trio = _Trio()  # type: ignore[attr-defined]  # see above
