"""The transfer processes as the serving process sees them: started, fed, watched, replaced when they die."""

import logging
import math
from collections.abc import Callable

import msgspec
import trio

from cakefs.engine.transfer.messages import (
    BEAT_S,
    Beat,
    FetchJob,
    Flush,
    Look,
    Report,
    Request,
    Settings,
    Unframer,
    frame,
)
from cakefs.execute import child_environment, python_command

log = logging.getLogger(__name__)

RESTART_DELAY_S = 0.2  # Doubles with every start that brought no report, up to the limit below.
RESTART_DELAY_LIMIT_S = 10.0
KNOWN_LIMIT = 4096  # Upstream files; a process remembers the way to about as many.
SILENT_S = 30.0  # Without a report or a beat a process hangs, as one that is stopped, or waits for a disk that is gone;
GRACE_S = 2 * BEAT_S  # but whoever was stopped together with it needs a moment.
KILL_S = 5.0
CLOSE_TIMEOUT_S = 15.0  # A worker seals what is complete before it goes; then it is killed.


class WorkerProcess:
    """One supervised transfer process.

    Args:
        on_report: Called with every report.
        on_death: Called with the jobs that were with the process when it ended unasked.

    Attributes:
        knows: Upstream files that it was sent to before: where their bytes are costs it no round trip any more.
        hung: The last one was ended because it hung: not of what it had to do, but say of a lock of the store.
    """

    def __init__(
        self,
        settings: Settings,
        on_report: Callable[["WorkerProcess", Report], None],
        on_death: Callable[["WorkerProcess", list[FetchJob]], None],
    ) -> None:
        self._settings = settings
        self._on_report = on_report
        self._on_death = on_death
        self._to_send, self._outbox = trio.open_memory_channel[Request](math.inf)
        self.jobs: dict[int, FetchJob] = {}
        self.knows: set[str] = set()
        self.pid: int | None = None
        self.alive = self.hung = False

    def use(self, settings: Settings) -> None:
        self._settings = settings
        if self.alive:
            self._to_send.send_nowait(settings)

    def submit(self, job: FetchJob) -> None:
        self.jobs[job.id] = job
        if len(self.knows) >= KNOWN_LIMIT:
            self.knows.clear()
        self.knows.add(job.identity)
        self._to_send.send_nowait(job)

    def look(self, identity: str, size: int) -> None:
        self._to_send.send_nowait(Look(identity, size))

    def flush(self) -> None:
        self._to_send.send_nowait(Flush())

    async def supervise(self) -> None:
        """Runs processes one after the other until cancelled."""
        delay = RESTART_DELAY_S
        while True:
            useful = await self._run_one()
            self.alive = False
            delay = RESTART_DELAY_S if useful else min(2 * delay, RESTART_DELAY_LIMIT_S)
            lost, self.jobs, self.knows = list(self.jobs.values()), {}, set()
            self._to_send.close()
            self._to_send, self._outbox = trio.open_memory_channel[Request](math.inf)
            log.warning("a transfer process ended (pid %s); %d jobs are given to another", self.pid, len(lost))
            self._on_death(self, lost)
            await trio.sleep(delay)

    async def _run_one(self) -> bool:
        """One process from start to end; True when it reported anything."""
        outbox = self._outbox
        command = python_command("cakefs.engine.transfer.worker")
        try:
            process = await trio.lowlevel.open_process(command, stdin=-1, stdout=-1, env=child_environment())
        except OSError as error:  # no descriptor or memory left: later, perhaps
            log.warning("cannot start a transfer process: %s", error)
            return False
        self.pid, self.alive, self.hung = process.pid, True, False
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout
        useful = False

        async def send() -> None:
            try:
                await stdin.send_all(frame(self._settings))
                async for message in outbox:
                    await stdin.send_all(frame(message))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # The process died; its end of stdout tells.

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                decoder = msgspec.msgpack.Decoder(Report)
                unframer = Unframer()
                while data := await _received(stdout):
                    for body in unframer.feed(data):
                        report = decoder.decode(body)
                        if not isinstance(report, Beat):
                            useful = True
                            self._on_report(self, report)
                if data is None:
                    self.hung = True
                    log.warning("a transfer process hangs (pid %s), and is ended", self.pid)
                    process.kill()
                nursery.cancel_scope.cancel()
        finally:
            await _end(process)
        return useful


async def _received(stdout: trio.abc.ReceiveStream) -> bytes | bytearray | None:
    """What a process reports next; nothing at its end, None where it hangs."""
    for seconds in (SILENT_S, GRACE_S):
        with trio.move_on_after(seconds):
            return await stdout.receive_some()
    return None


async def _end(process: trio.Process) -> None:
    """Closes stdin, which asks the process to end; kills it when it does not."""
    with trio.CancelScope(shield=True):
        assert process.stdin is not None and process.stdout is not None
        await process.stdin.aclose()
        with trio.move_on_after(CLOSE_TIMEOUT_S):
            async for _ in process.stdout:  # Let it finish writing, or it could block on a full pipe.
                pass
            await process.wait()
        if process.returncode is None:
            process.kill()
            with trio.move_on_after(KILL_S):  # One that waits for a disk that is gone cannot be killed either.
                await process.wait()
        await process.stdout.aclose()
