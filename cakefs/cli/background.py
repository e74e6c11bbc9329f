"""A mount in the background: a process of its own session that tells, through a pipe, whether its mount answers.

It is executed anew, not forked: no LMDB environment crosses a fork. Whatever goes wrong before it is ready, the one who
started it learns the reason from the pipe, or from its early end; and nothing stays mounted.
"""

import json
import os
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cakefs.cli.failures import Failure, failure_of
from cakefs.errors import CakeError
from cakefs.execute import import_environment, python_command

READY_TIMEOUT_S = 30.0
END_TIMEOUT_S = 10.0
LOG_LIMIT = 4_000_000  # Bytes; a longer log is put aside at the next start.


@contextmanager
def answering(fd: int | None) -> Iterator[Callable[[], None]]:
    """In the background process: yields what to call when the mount answers; tells a failure by itself.

    Args:
        fd: The pipe; None in the foreground, where nobody waits.
    """
    if fd is None:
        yield lambda: None
        return
    os.set_inheritable(fd, False)
    with open(fd, "w") as pipe:

        def ready() -> None:
            pipe.write(json.dumps(Failure(0)))
            pipe.close()

        try:
            yield ready
        except BaseException as error:
            if not pipe.closed:
                pipe.write(json.dumps(failure_of(error)))
            raise


def start(mountpoint: Path, flags: list[str], *, timeout_s: float = READY_TIMEOUT_S) -> Failure:
    """Starts a mount and waits until it answers.

    Args:
        flags: Further arguments of `cakefs mount`.

    Returns:
        Exit code 0, or why nothing is mounted.
    """
    log = _log_file()
    reader, writer = os.pipe()
    with open(reader, "rb", buffering=0) as answers:
        try:
            child = _execute([str(mountpoint), *flags], writer, log)
        finally:
            os.close(writer)
        try:
            answer = _wait(answers.fileno(), timeout_s)
            if answer is not None and answer.exit_code == 0:
                _check_mounted(mountpoint)
                child.returncode = 0  # It is to outlive us, which Popen would take for an oversight.
                return answer
        except BaseException:
            _end(child, mountpoint, by_itself=False)
            raise
    _end(child, mountpoint, by_itself=answer is not None)
    return answer or Failure(1, f"the mount at {mountpoint} did not answer", f"see {log}")


def _execute(arguments: list[str], ready_fd: int, log: Path) -> "subprocess.Popen[bytes]":
    command = python_command("cakefs", "mount", *arguments, "--foreground", f"--ready-fd={ready_fd}")
    with log.open("ab") as sink:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            pass_fds=[ready_fd],
            start_new_session=True,
            env=import_environment(),
        )


def _wait(pipe: int, timeout_s: float) -> Failure | None:
    """The answer; None when the process ended without one, or does not say anything in time."""
    deadline = time.monotonic() + timeout_s
    data = b""
    while select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
        piece = os.read(pipe, 4096)
        if not piece:
            return Failure(*json.loads(data)) if data else None
        data += piece
    return None


def _check_mounted(mountpoint: Path) -> None:
    from cakefs.fs.place import cakefs_at, canonical

    mount, device = cakefs_at(canonical(mountpoint)), os.stat(mountpoint).st_dev
    if mount is None or mount.device != f"{os.major(device)}:{os.minor(device)}":
        raise CakeError(f"the mount at {mountpoint} went away as soon as it answered")


def _end(child: "subprocess.Popen[bytes]", mountpoint: Path, *, by_itself: bool) -> None:
    """Sees to it that the process is gone and leaves no mount behind."""
    from cakefs.fs.place import canonical, clear_dead

    for stop in [child.poll] * by_itself + [child.terminate, child.kill]:
        stop()
        with suppress(subprocess.TimeoutExpired):
            child.wait(END_TIMEOUT_S)
            break
    if child.returncode and child.returncode < 0:
        clear_dead(canonical(mountpoint))


def _log_file() -> Path:
    from cakefs.config import log_directory

    directory = log_directory()
    log = directory / "mount.log"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # The log names models that are nobody's business.
        if log.exists() and log.stat().st_size > LOG_LIMIT:
            log.replace(directory / "mount.log.1")
    except OSError as error:
        raise CakeError(f"cannot write {log}: {error.strerror}", hint="set XDG_STATE_HOME") from error
    return log
