"""What the store needs of the operating system: whole reads and writes, locks, syncs, and errors made ours.

Everything is opened close-on-exec. Locks are `flock`s on a file opened for the purpose: they end with the process that
holds them, and exclude threads of one process as well as other processes.
"""

import errno
import fcntl
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from cakefs.errors import CakeError, StoreFull, UserError
from cakefs.model import CHUNK

# Concurrent fsyncs share journal commits and cache flushes of the disk; more than this gains nothing (measured).
SYNC_THREADS = 16

_FULL = (errno.ENOSPC, errno.EDQUOT)
_local = threading.local()


class Descriptor:
    """A file descriptor that is closed when its last reference goes.

    Whoever reads holds a reference, so that no other thread can close the number under a running system call and
    have it name another file.
    """

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self, _close: Callable[[int], None] = os.close) -> None:
        _close(self.fd)


def open_file(path: Path | str, flags: int, mode: int = 0o600) -> Descriptor:
    return Descriptor(os.open(path, flags | os.O_CLOEXEC, mode))


def scratch(size: int) -> memoryview:
    """A buffer of up to one chunk, reused by everything this thread does next."""
    return memoryview(_buffers()[0])[:size]


def _buffers() -> tuple[bytearray, bytearray]:
    """Two chunks of memory per thread: fresh ones would be page-faulted anew each time."""
    buffers: tuple[bytearray, bytearray] | None = getattr(_local, "buffers", None)
    if buffers is None:
        buffers = _local.buffers = bytearray(CHUNK), bytearray(CHUNK)
    return buffers


def read_full(fd: int, buffer: memoryview, offset: int) -> int:
    """Fills `buffer`; returns how much of it, less than all only at the end of the file."""
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if not count:
            break
        done += count
    return done


def write_full(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view = view[count:]
        offset += count


def same_bytes(one: int, other: int, size: int, one_at: int = 0, other_at: int = 0) -> bool:
    """True when `size` bytes of two files, from these offsets on, are readable and equal, byte for byte."""
    left, right = _buffers()
    try:
        for offset in range(0, size, CHUNK):
            count = min(CHUNK, size - offset)
            part = memoryview(right)[:count]
            if read_full(other, part, other_at + offset) != count:
                return False
            if read_full(one, memoryview(left)[:count], one_at + offset) != count:
                return False
            if not left.startswith(part):  # a memcmp; == on memoryviews goes item by item
                return False
    except OSError:  # an unreadable file is equal to nothing
        return False
    return True


def holds_bytes(fd: int, data: bytes | bytearray | memoryview, offset: int) -> bool:
    """True when the file is readable and has these bytes, at most a chunk, at that place."""
    left, _ = _buffers()
    try:
        count = read_full(fd, memoryview(left)[: len(data)], offset)
    except OSError:
        return False
    return count == len(data) and left.startswith(data)


def sync_all(descriptors: Sequence[Descriptor], sync: Callable[[int], None]) -> None:
    """Calls `sync` (fsync or fdatasync) on all, side by side. Raises the first OSError."""
    if len(descriptors) == 1:
        sync(descriptors[0].fd)
    elif descriptors:
        with ThreadPoolExecutor(min(SYNC_THREADS, len(descriptors))) as pool:
            for _ in pool.map(lambda d: sync(d.fd), descriptors):
                pass


def sync_file(path: Path) -> None:
    file = open_file(path, os.O_RDONLY)
    os.fsync(file.fd)


def sync_directories(paths: Sequence[Path]) -> None:
    sync_all([open_file(p, os.O_RDONLY | os.O_DIRECTORY) for p in paths], os.fsync)


def make_directory(path: Path, mode: int = 0o777) -> None:
    """With its parents, unless it is there; the names of those made are on the disk."""
    made = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(mode=mode, parents=True, exist_ok=True)
    sync_directories([p.parent for p in made])


def unlink(path: Path | str) -> None:
    """Removes a file that may be gone already."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def try_lock(descriptor: Descriptor) -> bool:
    try:
        fcntl.flock(descriptor.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Holds the lock that `path` stands for; waits for it. Raises a CakeError where that cannot be had."""
    with translated(f"lock {path}"):
        holder = open_file(path, os.O_RDWR | os.O_CREAT)
        fcntl.flock(holder.fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(holder.fd, fcntl.LOCK_UN)


@contextmanager
def locked_place(path: Path, place: int) -> Iterator[None]:
    """As `locked`, one of the locks of which `path` has as many as there are numbers below 2**62."""
    with translated(f"lock {path}"):
        holder = open_file(path, os.O_RDWR | os.O_CREAT)
        # struct flock: type, whence, start, length, pid. Of the open file, not of the process: so threads, too, wait.
        fcntl.fcntl(holder.fd, fcntl.F_OFD_SETLKW, struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, place, 1, 0))
    try:
        yield
    finally:
        fcntl.fcntl(holder.fd, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_UNLCK, os.SEEK_SET, place, 1, 0))


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turns the OSErrors of a block into ours; `doing` completes the sentence "cannot …"."""
    try:
        yield
    except OSError as error:
        raise store_error(error, doing) from error


def store_error(error: OSError, doing: str) -> CakeError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    message = f"cannot {doing}: {reason}"
    if error.errno in _FULL:
        return StoreFull(message, hint="free space on that disk, or cakefs gc")
    if error.errno == errno.EROFS:
        return UserError(message, hint="it serves what it has, and keeps nothing new")
    if error.errno in (errno.EACCES, errno.EPERM):
        return UserError(message, hint="the store must belong to you; see CAKEFS_STORE")
    return CakeError(message)
