"""The store's directory: whose it is, what it lies on, and whether it opens."""

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from shlex import quote

from cakefs.cli.checks.check import Check, mounts, text_of
from cakefs.errors import CakeError
from cakefs.store.layout import check_vacant

MIN_FREE = 10**9
FICLONE = 0x40049409
# LMDB maps its file and locks by memory shared in it: two machines would not see each other.
NETWORK_KINDS = frozenset({"9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "lustre", "nfs", "nfs4", "smb3"})


def check_store(store: Path, root: Path) -> Iterator[Check]:
    place = _existing(store)
    yield _check_access(store, place)
    if os.path.isdir(place):
        yield _check_space(place)
        yield _check_file_system(place, root)
    if os.path.exists(store / "format"):  # Path.exists raises in another user's directory
        yield _check_opens(store)


def _existing(path: Path) -> Path:
    """The path, or the nearest of its parents that is there."""
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    return path


def _check_access(store: Path, place: Path) -> Check:
    found = os.stat(place) if os.path.exists(place) else os.lstat(place)
    name, me, quoted = "store", os.geteuid(), quote(str(place))
    if not stat.S_ISDIR(found.st_mode):
        return Check(name, False, f"{place} is not a directory", "set CAKEFS_STORE to a directory")
    if place == store and found.st_uid != me:
        fix = f"run as that user, or: sudo chown -R {me} {quoted}"
        return Check(name, False, f"{store} belongs to user {found.st_uid}, not to {me}", fix)
    if not os.access(place, os.W_OK | os.X_OK):
        return Check(name, False, f"{place} is not writable", f"chmod u+rwx {quoted}, or set CAKEFS_STORE")
    if place != store:
        return Check(name, True, f"{store}, made on first use")
    try:
        check_vacant(store)
    except CakeError as error:
        return Check(name, False, error.message, "set CAKEFS_STORE to an empty directory")
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        return Check(name, False, f"{store} is open to other users (mode {mode:04o})", f"chmod 700 {quoted}")
    return Check(name, True, str(store))


def _check_space(place: Path) -> Check:
    usage = shutil.disk_usage(place)
    detail = f"{usage.free / 1e9:,.1f} GB of {usage.total / 1e9:,.1f} GB free"
    fix = "cakefs gc, or set CAKEFS_STORE to a larger disk"
    return Check("store space", True, detail) if usage.free >= MIN_FREE else Check("store space", False, detail, fix)


def _check_file_system(place: Path, root: Path) -> Check:
    name, kind = "store file system", _kind_of(place, root)
    if kind in NETWORK_KINDS:
        fix = "set CAKEFS_STORE to a directory on a local disk"
        return Check(name, False, f"{kind} is a network file system: the catalog would not be safe there", fix)
    can = _reflink(place)
    note = "unknown whether it has reflinks" if can is None else "reflinks" if can else "no reflinks: exports copy"
    if kind in ("tmpfs", "ramfs"):
        return Check(name, None, f"{kind}: the store is gone after a restart", "set CAKEFS_STORE to a disk")
    return Check(name, True, f"{kind}; {note}")


def _kind_of(place: Path, root: Path) -> str:
    path = os.path.realpath(place)
    above = [m for m in mounts(root) if path == m.point or path.startswith(m.point.rstrip("/") + "/")]
    depth = max((len(m.point) for m in above), default=0)
    return next((m.kind for m in reversed(above) if len(m.point) == depth), "unknown")


def _reflink(directory: Path) -> bool | None:
    """Whether files there can share blocks; None where no file can be made to try it."""
    try:
        with tempfile.TemporaryFile(dir=directory) as one, tempfile.TemporaryFile(dir=directory) as two:
            one.write(bytes(4096))
            one.flush()
            try:
                fcntl.ioctl(two.fileno(), FICLONE, one.fileno())
            except OSError:
                return False
            return True
    except OSError:
        return None


def _check_opens(store: Path) -> Check:
    """Format version and catalog, by opening it as every command does."""
    name, text = "store format", text_of(store / "format").strip()
    try:
        from cakefs.store.store import Store  # here: it needs libraries that may be missing

        Store.open(store, create=False).close()
    except ImportError as error:
        return Check(name, None, f"{text}; not opened: {error}")
    except CakeError as error:
        return Check(name, False, error.message, error.hint or "move the store aside; a new one is made on first use")
    return Check(name, True, text)
