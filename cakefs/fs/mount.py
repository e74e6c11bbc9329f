"""Life of the mount: claim the place, mount, serve, announce, end cleanly.

Order matters: the signal handlers are there before the mount is, so that no signal leaves it dead; readahead is raised
and readiness announced only after the kernel got an answer from us: INIT resets the one, and the other would be a lie.
pyfuse3 keeps its session in globals: one mount in the life of a process.
"""

import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pyfuse3
import trio

from cakefs.errors import CakeError, UserError
from cakefs.fs.library import Library
from cakefs.fs.ops import Ops
from cakefs.fs.place import Claim, cakefs_at, canonical, check_fuse, clear_dead, umount

__all__ = ["serve", "umount"]

log = logging.getLogger(__name__)
T = TypeVar("T")

# `hf-mount` as fsname would make transformers read whole files instead of mapping them.
OPTIONS = frozenset({"fsname=cakefs", "subtype=cakefs", "ro", "default_permissions"})
# One request of the largest size. The kernel reads this much around a fault (its rule, not measured alone): with 4096
# a walk over tensors would fetch much in vain.
READ_AHEAD_KIB = 1024
# Requests of the kernel's readahead on their way at once. With its 12, three readers of a file that stalls would fill
# them, and every other file would wait.
BACKGROUND = 128
# Requests answered at once. Each may be a read that waits for the network: the others must not wait behind it.
MAX_TASKS = 512
PLACE_TIMEOUT_S = 10.0


async def serve(
    library: Library,
    mountpoint: Path,
    *,
    allow_other: bool = False,
    on_ready: Callable[[], object] | None = None,
) -> None:
    """Mounts and serves until unmounted, cancelled, or told to end by SIGTERM, SIGINT or SIGHUP.

    Args:
        on_ready: Called once when the mount answers.

    Raises:
        UserError: nothing can be mounted there.
    """
    check_fuse()
    path = canonical(mountpoint)
    claim = await _bounded(Claim, path)
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
            await _serve_requests(ops, signals, path, on_ready)
        finally:
            _notify("STOPPING=1")
            pyfuse3.close()
            ops.close()
            await _clear_leftover(path)


async def _serve_requests(
    ops: Ops, signals: AsyncIterator[int], path: str, on_ready: Callable[[], object] | None
) -> None:
    logging.getLogger("pyfuse3").addFilter(_is_news)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_end_on_signal, signals, nursery.cancel_scope)
            nursery.start_soon(_announce, path, on_ready)
            nursery.start_soon(ops.forget_refuted)
            await pyfuse3.main(max_tasks=MAX_TASKS)
            nursery.cancel_scope.cancel()
    except ExceptionGroup as group:
        error = _only(group)
        if isinstance(error, OSError):
            raise CakeError(f"serving {path} ended: {error}") from error
        raise error from None


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
        except RuntimeError as error:
            raise UserError(f"cannot mount at {path}: {said() or error}") from error


async def _end_on_signal(signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
    async for number in signals:
        log.info("ending on %s", signal.Signals(number).name)
        scope.cancel()


def _ending_signals() -> list[signal.Signals]:
    """With `nohup`, SIGHUP stays ignored."""
    ends = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    return [s for s in ends if signal.getsignal(s) is not signal.SIG_IGN]


async def _announce(path: str, on_ready: Callable[[], object] | None) -> None:
    try:
        await trio.to_thread.run_sync(os.stat, path, abandon_on_cancel=True)
    except OSError as error:
        raise CakeError(f"the mount at {path} does not answer: {error.strerror}") from error
    _raise_limits(path)
    log.info("serving %s", path)
    if on_ready is not None:
        on_ready()
    _notify("READY=1")


def _raise_limits(path: str) -> None:
    """The kernel's readahead of 128 KiB means two requests in flight, which a slow store cannot live with."""
    mount = cakefs_at(path)
    if mount is None:
        return
    if os.geteuid() == 0:
        _raise(f"/sys/class/bdi/{mount.device}/read_ahead_kb", READ_AHEAD_KIB)
    _raise(f"/sys/fs/fuse/connections/{mount.device.partition(':')[2]}/max_background", BACKGROUND)


def _raise(setting: str, value: int) -> None:
    try:
        if int(Path(setting).read_text()) < value:
            Path(setting).write_text(str(value))
    except OSError as error:
        log.info("%s stays as it is: %s", os.path.basename(setting), error.strerror)  # in a container, mostly


def _notify(state: str) -> None:
    """Tells systemd, where it asked for it."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)
    except OSError as error:
        log.warning("cannot tell systemd %s: %s", state, error)


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
