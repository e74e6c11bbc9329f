"""Life of the mount: claim the place, mount, serve, announce, end cleanly.

Order matters: the signal handlers are there before the mount is, so that no signal leaves it dead; readahead is raised
and readiness announced only after the kernel got an answer from us: INIT resets the one, and the other would be a lie.
pyfuse3 keeps its session in globals: one mount in the life of a process.
"""

import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import pyfuse3
import trio

from cakefs.errors import CakeError, UserError
from cakefs.fs.leave import wait_for_readers
from cakefs.fs.library import Library
from cakefs.fs.limits import raise_limits
from cakefs.fs.ops import Ops
from cakefs.fs.place import WITHOUT_FUSE, Claim, cakefs_at, canonical, check_fuse, clear_dead, umount
from cakefs.fs.systemd import Probe, Systemd
from cakefs.fs.turns import take_turns

__all__ = ["serve", "umount"]

log = logging.getLogger(__name__)
T = TypeVar("T")

# `hf-mount` as fsname would make transformers read whole files instead of mapping them.
OPTIONS = frozenset({"fsname=cakefs", "subtype=cakefs", "ro", "default_permissions"})
# Requests answered at once. Each may be a read that waits for the network: the others must not wait behind it.
MAX_TASKS = 512
PLACE_TIMEOUT_S = 10.0
GRACE_S = 60.0


async def serve(
    library: Library,
    mountpoint: Path,
    *,
    allow_other: bool = False,
    on_ready: Callable[[], object] | None = None,
    on_status: Callable[[Callable[[], Mapping[str, object]]], object] | None = None,
    grace_s: float = GRACE_S,
) -> None:
    """Mounts and serves until unmounted, cancelled, or told to end by SIGTERM, SIGINT or SIGHUP.

    Args:
        on_ready: Called once when the mount answers.
        on_status: Given, before that, what makes the values of status.json.
        grace_s: How long those who read when it is told to end may go on; a second signal ends it at once.

    Raises:
        UserError: nothing can be mounted there.
    """
    check_fuse()
    path = canonical(mountpoint)
    claim = await _bounded(Claim, path)
    systemd = Systemd()
    facts: dict[str, object] = {"mountpoint": path, "pid": os.getpid(), "since": int(time.time())}
    ops = Ops(library, uid=os.getuid(), gid=os.getgid(), facts=facts)
    with trio.open_signal_receiver(*_ending_signals()) as signals:
        try:
            _mount(ops, path, OPTIONS | {"allow_other"} if allow_other else OPTIONS)
        except BaseException:
            claim.undo()
            raise
        claim.release()
        try:
            if on_status is not None:
                on_status(ops.status)
            await _serve_requests(ops, signals, path, Announcement(path, systemd, on_ready), grace_s)
        finally:
            systemd.tell("STOPPING=1", "STATUS=ending")
            pyfuse3.close()
            ops.close()
            await _clear_leftover(path)


class Announcement(NamedTuple):
    """Whom to tell that the mount at `path` answers."""

    path: str
    systemd: Systemd
    on_ready: Callable[[], object] | None


async def _serve_requests(
    ops: Ops, signals: AsyncIterator[int], path: str, announcement: Announcement, grace_s: float
) -> None:
    logging.getLogger("pyfuse3").addFilter(_is_news)
    systemd = announcement.systemd

    async def leave() -> None:
        systemd.tell("STOPPING=1", f"STATUS=ending; {ops.counters.open_files} files are open")
        mount = cakefs_at(path)
        if mount is not None:
            await wait_for_readers(path, mount.device, ops.activity, ops.waiting, grace_s)

    async def announce() -> None:
        await _announce(announcement)
        await systemd.keep_told(lambda: _state(ops, path), Probe(path, _is_saturated))

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_end_on_signal, signals, nursery.cancel_scope, leave)
            nursery.start_soon(announce)
            nursery.start_soon(ops.forget_refuted)
            await pyfuse3.main(max_tasks=MAX_TASKS)
            nursery.cancel_scope.cancel()
    except ExceptionGroup as group:
        error = _only(group)
        if isinstance(error, OSError):
            raise CakeError(f"serving {path} ended: {error}") from error
        raise error from None


def _state(ops: Ops, path: str) -> str:
    """What `systemctl status` shows."""
    stalled = f", {count} stalled" if (count := ops.stalled()) else ""
    return f"serving {path}: {ops.counters.open_files} files are open, {ops.waiting()} reads wait{stalled}"


def _is_saturated() -> bool:
    return trio.lowlevel.current_statistics().tasks_living >= MAX_TASKS


async def _clear_leftover(path: str) -> None:
    """libfuse does not unmount when the connection was aborted from outside."""
    with trio.CancelScope(shield=True):
        try:
            await _bounded(clear_dead, path)
        except CakeError as error:
            log.warning("%s", error)


def _mount(ops: Ops, path: str, options: frozenset[str]) -> None:
    with _stderr_text() as said:
        try:
            pyfuse3.init(ops, path, set(options))
            take_turns()
        except RuntimeError as error:
            raise UserError(f"cannot mount at {path}: {said() or error}", hint=WITHOUT_FUSE) from error


async def _end_on_signal(
    signals: AsyncIterator[int], scope: trio.CancelScope, leave: Callable[[], Awaitable[None]]
) -> None:
    """The first signal lets readers finish, the second does not."""

    async def end() -> None:
        await leave()
        scope.cancel()

    async with trio.open_nursery() as nursery:
        leaving = False
        async for number in signals:
            name = signal.Signals(number).name
            if leaving:
                log.info("ending on %s at once", name)
                scope.cancel()
            else:
                log.info("ending on %s: those who read may finish, a second signal ends it at once", name)
            leaving = True
            nursery.start_soon(end)


def _ending_signals() -> list[signal.Signals]:
    """With `nohup`, SIGHUP stays ignored."""
    ends = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    return [s for s in ends if signal.getsignal(s) is not signal.SIG_IGN]


async def _announce(announcement: Announcement) -> None:
    path = announcement.path
    try:
        await trio.to_thread.run_sync(os.stat, path, abandon_on_cancel=True)
    except OSError as error:
        raise CakeError(f"the mount at {path} does not answer: {error.strerror}") from error
    if (mount := cakefs_at(path)) is not None:
        await trio.to_thread.run_sync(raise_limits, mount)
    log.info("serving %s", path)
    if announcement.on_ready is not None:
        announcement.on_ready()
    announcement.systemd.tell("READY=1")


async def _bounded(action: Callable[[str], T], path: str) -> T:
    """Does something that may wait for a hung server at the place."""
    with trio.move_on_after(PLACE_TIMEOUT_S):
        return await trio.to_thread.run_sync(action, path, abandon_on_cancel=True)
    raise UserError(f"the mount at {path} does not answer", hint=f"`umount -l {path}` or `fusermount3 -uz {path}`")


def _only(error: Exception) -> Exception:
    """What a group of one stands for."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _is_news(record: logging.LogRecord) -> bool:
    """False for an answer that came too late because the one who asked was killed."""
    return "fuse_reply_* failed" not in str(record.msg)


@contextmanager
def _stderr_text() -> Iterator[Callable[[], str]]:
    """Catches what libfuse and fusermount3 write to descriptor 2: they explain a failure nowhere else."""
    saved = os.dup(2)
    caught = os.memfd_create("stderr")
    os.dup2(caught, 2)
    try:
        yield lambda: " ".join(os.pread(caught, 4096, 0).decode(errors="replace").split())
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(caught)
