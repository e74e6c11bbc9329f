"""What the store needs of the operating system: whole reads and writes, locks, syncs, and errors made ours.

Everything is opened close-on-exec. Locks are `flock`s on a file opened for the purpose: they end with the process that
holds them, and exclude threads of one process as well as other processes.
"""

import errno
import fcntl
import mmap
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from cakefs.buffers import page_aligned
from cakefs.errors import CakeError, StoreFull, UserError
from cakefs.model import CHUNK

if TYPE_CHECKING:
    from ctypes import CDLL

# Concurrent fsyncs share journal commits and cache flushes of the disk; more than this gains nothing (measured).
SYNC_THREADS = 16

# What offsets, sizes and addresses are multiples of where the kernel's cache is passed by; more than most disks need.
SECTOR = 4096

_CACHESTAT = struct.Struct("=QQQQQ")  # linux/mman.h: pages in memory, and four more numbers of them
_CACHESTAT_NUMBER = 451  # on all architectures
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
_FULL = (errno.ENOSPC, errno.EDQUOT)


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


class _Scratch(threading.local):
    """A chunk of memory for each of two files, and one to compare: per thread, as fresh ones would be page-faulted
    anew each time."""

    def __init__(self) -> None:
        self.one, self.other = page_aligned(CHUNK), page_aligned(CHUNK)
        self._compared = bytearray(CHUNK)

    def equal(self, one: memoryview, other: bytes | bytearray | memoryview) -> bool:
        """By memcmp, which Python only has for bytearrays: == on memoryviews goes item by item."""
        self._compared[: len(one)] = one
        return len(one) == len(other) and self._compared.startswith(other)


_scratch = _Scratch()


def scratch(size: int) -> memoryview:
    """A buffer of up to one chunk, reused by everything this thread does next."""
    return _scratch.one[:size]


def read_full(fd: int, buffer: memoryview, offset: int) -> int:
    """Fills `buffer`; returns how much of it, less than all only at the end of the file."""
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], offset + done)
        if not count:
            break
        done += count
    return done


def is_in_memory(fd: int, start: int, stop: int) -> bool | None:
    """Whether most of a byte range can be had without the disk; None where the file system cannot tell."""
    from ctypes import create_string_buffer  # 10 ms to import: not for those who only look

    found = create_string_buffer(_CACHESTAT.size)
    if not c_library().syscall(_CACHESTAT_NUMBER, fd, struct.pack("=QQ", start, stop - start), found, 0):
        (pages, *_) = _CACHESTAT.unpack(found.raw)
        return bool(pages * mmap.PAGESIZE * 2 >= stop - start)
    try:  # A kernel before 6.5: its last byte stands for the rest, and is read in if it is not there.
        return os.preadv(fd, [bytearray(1)], stop - 1, os.RWF_NOWAIT) == 1
    except OSError as error:
        return None if error.errno == errno.EOPNOTSUPP else False


def read_direct(fd: int, buffer: memoryview, offset: int, size: int) -> memoryview:
    """Reads `[offset, offset + size)` past the kernel's cache, or through it where there is no other way.

    Args:
        buffer: At the beginning of a page, and as long as the sectors that the bytes lie in.

    Returns:
        The part of `buffer` that they are in; shorter than `size` at the end of the file.
    """
    skip = offset % SECTOR
    sectors = buffer[: -(-(skip + size) // SECTOR) * SECTOR]
    count = 0
    with suppress(OSError):
        file = open_file(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT)  # the flag is of the open file: another one
        count = os.preadv(file.fd, [sectors], offset - skip)
    if count < skip + size:
        count = read_full(fd, sectors, offset - skip)
    return buffer[skip : min(skip + size, count)]


def write_full(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view = view[count:]
        offset += count


def same_bytes(one: int, other: int, size: int, one_at: int = 0, other_at: int = 0) -> bool:
    """True when `size` bytes of two files, from these offsets on, are readable and equal, byte for byte."""
    try:
        for offset in range(0, size, CHUNK):
            count = min(CHUNK, size - offset)
            left, right = _scratch.one[:count], _scratch.other[:count]
            if read_full(other, right, other_at + offset) != count or read_full(one, left, one_at + offset) != count:
                return False
            if not _scratch.equal(left, right):
                return False
    except OSError:  # an unreadable file is equal to nothing
        return False
    return True


def copy_range(source: int, target: int, size: int, source_at: int, target_at: int) -> int:
    """Copies bytes between files, sharing blocks where that can be done. Returns: how many; fewer at a file's end."""
    done = 0
    try:
        while done < size and (
            count := os.copy_file_range(source, target, size - done, source_at + done, target_at + done)
        ):
            done += count
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
        while done < size:  # From one file system to another, say.
            buffer = scratch(min(CHUNK, size - done))
            count = read_full(source, buffer, source_at + done)
            write_full(target, buffer[:count], target_at + done)
            done += count
            if count < len(buffer):
                break
    return done


def holds_bytes(fd: int, data: bytes | bytearray | memoryview, offset: int) -> bool:
    """True when the file is readable and has these bytes, at most a chunk, at that place."""
    found = scratch(len(data))
    try:
        count = read_full(fd, found, offset)
    except OSError:
        return False
    return _scratch.equal(found[:count], data)


def sync_all(descriptors: Sequence[Descriptor], sync: Callable[[int], None]) -> None:
    """Calls `sync` (fsync or fdatasync) on all, side by side. Raises the first OSError."""
    if len(descriptors) == 1:
        sync(descriptors[0].fd)
    elif descriptors:
        with ThreadPoolExecutor(min(SYNC_THREADS, len(descriptors))) as pool:
            for _ in pool.map(lambda d: sync(d.fd), descriptors):
                pass


def start_writing(fd: int, offset: int = 0, size: int = 0) -> None:
    """Has the disk begin with what was written there, to the end of the file by default: a later sync waits less."""
    from ctypes import c_int64  # 10 ms to import: not for those who only look

    c_library().sync_file_range(fd, c_int64(offset), c_int64(size), _SYNC_FILE_RANGE_WRITE)


@cache
def c_library() -> "CDLL":
    """For what `os` does not have."""
    from ctypes import CDLL

    return CDLL(None, use_errno=True)


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
