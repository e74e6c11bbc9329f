"""A file outside the store that comes into being: written beside its place under another name, renamed when whole.

What an interrupted process left is taken up without trusting it: a block that already has its bytes is not written
again. So nothing needs to be noted on the way, and a kill, a full disk or a power cut leaves what the next run checks.
"""

import ctypes
import errno
import fcntl
import hashlib
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cakefs.errors import CakeError, StoreFull, UserError
from cakefs.store.files import (
    Descriptor,
    c_library,
    holds_bytes,
    open_file,
    start_writing,
    sync_directories,
    write_full,
)

_FICLONERANGE = 0x4020940D  # linux/fs.h: _IOW(0x94, 13, struct file_clone_range)
_RENAME_NOREPLACE = 1  # linux/fs.h
_AT_FDCWD = -100
_NAME_BYTES = 100  # Of the target's name in that of the unfinished file: both must fit into 255.


def unfinished_path(path: Path) -> Path:
    """Where the file that becomes `path` is written."""
    name = path.name.encode(errors="surrogateescape")
    short = name[:_NAME_BYTES].decode(errors="ignore")
    return path.with_name(f".{short}.{hashlib.sha256(name).hexdigest()[:8]}.partial")


class Unfinished:
    """Made by `open`; `close` keeps what is there for the next run. Not for two threads at once.

    Raises StoreFull from any change when the disk is full, UserError when it cannot be written to.
    """

    def __init__(self, path: Path, size: int, file: Descriptor) -> None:
        self.path = path
        self._size = size
        self._file: Descriptor | None = file
        self._had = min(os.fstat(file.fd).st_size, size)

    @classmethod
    def open(cls, path: Path, size: int) -> "Unfinished":
        """Begins the file that is to have `size` bytes, or goes on with it; UserError while another process does."""
        beside = unfinished_path(path)
        with reported(path):
            while True:
                file = open_file(beside, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
                try:
                    fcntl.flock(file.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(f"{path} is being written by another process") from None
                if _is_at(file.fd, beside):  # not finished and renamed in the meantime
                    break
            if os.fstat(file.fd).st_size > size:
                os.ftruncate(file.fd, size)
        return cls(path, size, file)

    def put(self, offset: int, data: memoryview) -> None:
        """At most a chunk."""
        with reported(self.path):
            if offset + len(data) > self._had or not holds_bytes(self._fd, data, offset):
                write_full(self._fd, data, offset)
                start_writing(self._fd, offset, len(data))

    def clone(self, source: Descriptor, start: int, size: int, offset: int) -> bool:
        """Shares blocks of another file. Returns: False where the file systems cannot."""
        request = struct.pack("=qQQQ", source.fd, start, size, offset)
        with reported(self.path):
            try:
                fcntl.ioctl(self._fd, _FICLONERANGE, request)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                    raise
                return False
        return True

    def finish(self, *, replace: bool) -> None:
        """All of it is written: puts it in its place, durably. Raises UserError for a file there, unless `replace`."""
        with reported(self.path):
            os.ftruncate(self._fd, self._size)
            os.fsync(self._fd)
            if replace:
                os.replace(unfinished_path(self.path), self.path)
            else:
                self._rename_new()
            sync_directories([self.path.parent])
        self.close()

    def discard(self) -> None:
        """What was written is wrong."""
        with reported(self.path):
            unfinished_path(self.path).unlink()
        self.close()

    def close(self) -> None:
        self._file = None

    def _rename_new(self) -> None:
        try:
            rename_new(unfinished_path(self.path), self.path)
        except FileExistsError:
            raise UserError(f"{self.path} has appeared meanwhile", hint="--force to replace it") from None

    @property
    def _fd(self) -> int:
        if self._file is None:
            raise ValueError(f"{self.path} is closed")
        return self._file.fd


def rename_new(source: Path, target: Path) -> None:
    """Raises FileExistsError when the target exists: the kernel looks and renames at once, so that no file is replaced
    that appears in between. Some file systems cannot (EINVAL); there the look comes first."""
    with suppress(AttributeError):  # an old C library
        if not c_library().renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE):
            return
        if (code := ctypes.get_errno()) not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(code, os.strerror(code), str(target))
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    os.rename(source, target)


def block_size(path: Path) -> int:
    """What clones of files in a directory must be multiples of."""
    with reported(path):
        size = os.statvfs(path).f_bsize
    return size if 4096 <= size <= 65536 else 4096


@contextmanager
def reported(path: Path) -> Iterator[None]:
    """Turns the OSErrors of a block into ours."""
    try:
        yield
    except OSError as error:
        message = f"cannot write {path}: {error.strerror}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFull(message, hint="free space there, then again: it goes on where it stopped") from error
        if error.errno == errno.EIO:
            raise CakeError(message) from error
        raise UserError(message) from error


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False
