"""What is in use, and when it was used last: blobs and partials. Kept by the file system, so it costs no transaction.

A shared `flock` on a file of bytes says that a process serves from it: such a file is not evicted. The access time is
set by us, whatever the mount options; it is the "recently" of "least recently used". A partial that becomes a blob
keeps both, as that is the same file.
"""

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

from cakefs.store.files import Descriptor, open_file

COARSE_S = 60.0  # Uses within this time count as one: not every open has to write an inode.


def note_use(file: Descriptor) -> None:
    """Tells everybody, until the descriptor is closed, that this file is in use."""
    with suppress(BlockingIOError):  # It is being evicted; what is open stays readable.
        fcntl.flock(file.fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    status = os.fstat(file.fd)
    now = time.time()
    if abs(now - status.st_atime) > COARSE_S:  # abs: clocks jump
        with suppress(OSError):  # a store that is read-only, or somebody else's
            os.utime(file.fd, ns=(int(now * 1e9), status.st_mtime_ns))


def note_write(file: Descriptor) -> None:
    """What has just come is about to be read."""
    os.utime(file.fd)


def touch(path: Path, ago: float = 0.0) -> None:
    """Used now, or so many seconds ago."""
    status = os.stat(path)
    os.utime(path, ns=(time.time_ns() - int(ago * 1e9), status.st_mtime_ns))


def last_use(path: Path) -> float | None:
    """Unix seconds; None when there is no such file."""
    try:
        return os.stat(path).st_atime
    except FileNotFoundError:
        return None


def claim(path: Path) -> Descriptor | None:
    """The file, locked against use by others as long as the descriptor lives; None when it is in use or gone."""
    try:
        file = open_file(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    return file
