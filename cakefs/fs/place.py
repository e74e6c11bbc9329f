"""The place of a mount: what is mounted where, making a directory ready, unmounting. Standard library only.

A place is asked through /proc/self/mountinfo wherever possible: a system call on the path itself waits for the server
behind it, which may be hung. Ours are known by their type, `fuse.cakefs`.
"""

import ctypes
import errno
import fcntl
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from cakefs.errors import CakeError, UserError

FUSE_DEVICE = "/dev/fuse"
WITHOUT_FUSE = "without FUSE: `cakefs export`, or in Python cakefs.open and fsspec's cakefs://"
KIND = "fuse.cakefs"
NAMED_HOLDERS = 4
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8


class Mount(NamedTuple):
    """A line of mountinfo: `device` is major:minor, `kind` the type of file system."""

    device: str
    point: str
    kind: str


def parse_mountinfo(text: bytes) -> list[Mount]:
    found = []
    for line in text.splitlines():
        fields, _, rest = line.partition(b" - ")
        _, _, device, _, point, *_ = fields.split(b" ")
        plain = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), point)
        found.append(Mount(device.decode(), os.fsdecode(plain), rest.split(b" ")[0].decode()))
    return found


def mounts() -> list[Mount]:
    return parse_mountinfo(Path("/proc/self/mountinfo").read_bytes())


def cakefs_at(path: str) -> Mount | None:
    """The topmost mount at a place, when it is one of ours."""
    here = [m for m in mounts() if m.point == path]
    return here[-1] if here and here[-1].kind == KIND else None


def canonical(path: Path | str) -> str:
    """The path as mountinfo has it. Does not touch a place that a cakefs is mounted at: it may be hung or dead."""
    absolute = os.path.abspath(os.path.expanduser(path))
    parent, name = os.path.split(absolute)
    place = os.path.join(os.path.realpath(parent), name) if name else absolute
    return place if cakefs_at(place) else os.path.realpath(absolute)


class Claim:
    """A directory that is ready to be mounted on, and claimed from other processes until `release`."""

    def __init__(self, path: str) -> None:
        """Raises UserError where nothing can be mounted."""
        self._created: list[str] = []
        self._lock = -1
        clear_dead(path)
        _refuse_live(path)
        try:
            self._create(path)
            self._lock = _lock_directory(path)
            _refuse_live(path)  # mounted between the first look and the lock
            if os.listdir(path):
                raise UserError(f"{path} is not empty", hint="mount at an empty or a new directory")
        except OSError as error:
            self.undo()
            raise UserError(f"cannot mount at {path}: {error.strerror}") from error
        except UserError:
            self.undo()
            raise

    def _create(self, path: str) -> None:
        missing: list[str] = []
        while not _exists(path):
            missing.append(path)
            path = os.path.dirname(path)
        for directory in reversed(missing):
            os.mkdir(directory)
            self._created.append(directory)

    def release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def undo(self) -> None:
        """Also removes the directories made for it."""
        self.release()
        while self._created:
            try:
                os.rmdir(self._created.pop())
            except OSError:
                return  # somebody uses it by now: then it stays


def _exists(path: str) -> bool:
    """Unlike os.path.lexists not false for what is there but broken, such as another dead mount."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def _refuse_live(path: str) -> None:
    if cakefs_at(path):
        raise UserError(f"a cakefs is already mounted at {path}", hint=f"`cakefs umount {path}` first")


def _lock_directory(path: str) -> int:
    """Locks the directory below the mount to be: whoever comes later sees the mount instead."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise UserError(f"another cakefs is just being mounted at {path}") from None
    except OSError:
        pass  # a file system without locks
    return fd


def check_fuse() -> None:
    """Raises UserError, with what to do, when this user cannot mount at all."""
    if not os.path.exists(FUSE_DEVICE):
        hint = f"`modprobe fuse`; for a container `--device /dev/fuse`; {WITHOUT_FUSE}"
        raise UserError(f"{FUSE_DEVICE} is missing", hint=hint)
    if os.geteuid() == 0:
        return
    if not os.access(FUSE_DEVICE, os.R_OK | os.W_OK):
        hint = f"`sudo chmod 666 {FUSE_DEVICE}`; {WITHOUT_FUSE}"
        raise UserError(f"this user may not open {FUSE_DEVICE}", hint=hint)
    if not shutil.which("fusermount3"):
        raise UserError("fusermount3 not found", hint="install the package fuse3")


def clear_dead(path: str) -> None:
    """Detaches those of our mounts at a place whose server is gone.

    Waits for the server if there is one: to be called where waiting is allowed.
    """
    while cakefs_at(path) and _is_dead(path):
        _unmount(path, lazy=True)


def _is_dead(path: str) -> bool:
    """By a call that the kernel cannot answer from what it remembers."""
    try:
        os.statvfs(path)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def umount(mountpoint: Path | str, *, wait_s: float = 10.0) -> None:
    """Unmounts a cakefs and waits until it is gone.

    Raises:
        UserError: nothing of ours is mounted there, or it is in use: the message names by whom.
    """
    path = canonical(mountpoint)
    mount = cakefs_at(path)
    if mount is None:
        raise UserError(f"no cakefs is mounted at {path}")
    _unmount(path, lazy=False)
    deadline = time.monotonic() + wait_s
    while mount in mounts():
        if time.monotonic() > deadline:
            raise CakeError(f"{path} is still mounted {wait_s:g} s after it was unmounted")
        time.sleep(0.02)


def unmount_unused(path: str, device: str) -> bool:
    """Unmounts what is mounted from a device at a place, unless it is in use. True when it is not mounted any more."""
    mount = cakefs_at(path)
    if mount is None or mount.device != device:
        return True
    failure = _unmount_as_root(path, lazy=False) if os.geteuid() == 0 else _unmount_as_user(path, lazy=False)
    if failure and "busy" not in failure:
        raise CakeError(f"cannot unmount {path}: {failure}")
    return not failure


def _unmount(path: str, *, lazy: bool) -> None:
    failure = _unmount_as_root(path, lazy) if os.geteuid() == 0 else _unmount_as_user(path, lazy)
    if "busy" in failure:
        using = ", ".join(holders(path)) or "a program of another user"
        raise UserError(f"{path} is in use by {using}", hint="end that first; models are in use after loading, too")
    if failure:
        raise UserError(f"cannot unmount {path}: {failure}")


def _unmount_as_root(path: str, lazy: bool) -> str:
    """The system call itself: umount(8) may look at the path first, and then waits for a hung server."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(path), UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0)) == 0:
        return ""
    return os.strerror(ctypes.get_errno())


def _unmount_as_user(path: str, lazy: bool) -> str:
    command = ["fusermount3", "-uz" if lazy else "-u", "--", path]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}, check=False)
    except FileNotFoundError as error:
        raise UserError("fusermount3 not found", hint="install the package fuse3") from error
    return " ".join(done.stderr.split()) or "fusermount3 failed" if done.returncode else ""


def holders(path: str) -> list[str]:
    """Programs with a file, mapping or working directory below a mount, as `name (pid N)`; the first few of them."""
    found: list[str] = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if any(_is_below(path, place) for place in _places_of(pid)):
            if len(found) == NAMED_HOLDERS:
                return [*found, "others"]
            found.append(f"{_read(f'/proc/{pid}/comm').strip()} (pid {pid})")
    return found


def _is_below(path: str, place: str) -> bool:
    return place == path or place.startswith(path.rstrip("/") + "/")


def _places_of(pid: str) -> Iterator[str]:
    """Paths that a process holds; none of those that we may not see."""
    for link in ("cwd", "root", "exe"):
        yield from _target(f"/proc/{pid}/{link}")
    for fd in _names(f"/proc/{pid}/fd"):
        yield from _target(f"/proc/{pid}/fd/{fd}")
    for line in _read(f"/proc/{pid}/maps").splitlines():
        yield line.split(None, 5)[5] if "/" in line else ""


def _target(link: str) -> Iterable[str]:
    try:
        return (os.readlink(link),)
    except OSError:  # ended meanwhile, or another user's
        return ()


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:  # ended meanwhile, or another user's
        return []


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="surrogateescape")
    except OSError:  # ended meanwhile, or another user's
        return ""
