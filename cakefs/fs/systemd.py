"""What systemd is told where it asked: ready, what is going on, that the serving works, stopping.

The proof for the watchdog has two halves: the loop that serves turns, or nobody would send it; and the mount answers a
request that came through the kernel. The request is made by a child process: a thread of ours in it could not be killed
as long as we do not answer, and would keep the connection, so that a hung server would hang for ever.
"""

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping

import trio

log = logging.getLogger(__name__)

STATUS_S = 5.0  # Between looks at what there is to say.
BEATS = 4  # In the time that systemd gives: three may come late.
_ASK = "import os, sys; os.statvfs(sys.argv[1])"  # Never answered from what the kernel remembers.


class Systemd:
    """The one who started us, as the environment describes it; silent where that was not systemd."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        for_us = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        usec = environ.get("WATCHDOG_USEC", "")
        self.watchdog_s = int(usec) / 1e6 if self._address and for_us and usec.isdigit() else 0.0

    def tell(self, *lines: str) -> None:
        """Lines such as `READY=1`, in one message."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
                sock.sendto("\n".join(lines).encode(), address)
        except OSError as error:
            log.warning("cannot tell systemd %s: %s", lines[0], error)

    async def keep_told(self, status: Callable[[], str], answers: Callable[[float], Awaitable[bool]]) -> None:
        """As long as the mount lives: what is going on, when it changes, and the beats of the watchdog.

        Args:
            answers: Whether the mount answers within some seconds.
        """
        if not self._address:
            return
        beat_s = self.watchdog_s / BEATS
        said, due = "", trio.current_time()
        while True:
            if (text := status()) != said:
                self.tell(f"STATUS={text}")
                said = text
            if beat_s and trio.current_time() >= due:
                if await answers(beat_s):
                    self.tell("WATCHDOG=1")
                due = trio.current_time() + beat_s
            await trio.sleep(min(STATUS_S, beat_s or STATUS_S))


class Probe:
    """Asks the mount through the kernel.

    Args:
        saturated: Whether all that may be answered at once is being answered: then a request waits its turn, and that
            it is not answered proves nothing.
    """

    def __init__(self, path: str, saturated: Callable[[], bool]) -> None:
        self._path = path
        self._saturated = saturated
        self._child: trio.Process | None = None

    async def __call__(self, timeout_s: float) -> bool:
        with trio.move_on_after(timeout_s):
            return await self._ask()
        if self._saturated():
            return True
        log.error("the mount at %s did not answer within %.0f s", self._path, timeout_s)
        return False

    async def _ask(self) -> bool:
        """One child at a time: one that hangs is waited for again, since it cannot be ended."""
        if self._child is None:
            null = subprocess.DEVNULL
            command = [sys.executable, "-ISc", _ASK, self._path]
            try:
                self._child = await trio.lowlevel.open_process(command, stdin=null, stdout=null, stderr=null)
            except OSError as error:
                log.warning("cannot ask the mount at %s: %s", self._path, error)  # no proof that it hangs
                return True
        code = await self._child.wait()
        self._child = None
        return code == 0
