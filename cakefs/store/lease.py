"""Who is using which manifests: so that gc leaves alone what a running mount still serves.

A lease is a directory `run/<random>/` with a file `lock`, flocked as long as its process lives, and one empty file per
manifest held. A directory whose lock is free is what a dead process left, and is removed by whoever looks. Creation and
inspection exclude each other by `run.lock`, so no lease is seen before it is locked.
"""

import fcntl
import os
import secrets
import shutil
from pathlib import Path

from cakefs.store.files import locked, open_file, translated, try_lock, unlink

_LOCK = "lock"


class Lease:
    """Made by `new_lease`; ends with `close` or the process. A manifest may be held several times.

    Args:
        directory: Its own; None on a read-only store, where nobody can collect anything.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._held: dict[str, int] = {}
        if directory is not None:
            self._lock = open_file(directory / _LOCK, os.O_RDWR | os.O_CREAT)
            fcntl.flock(self._lock.fd, fcntl.LOCK_EX)

    def hold(self, manifest: str) -> None:
        """Keeps gc from that manifest until `release` was called as often."""
        if self._directory is not None and manifest not in self._held:
            with translated(f"hold {manifest}"):
                open_file(self._directory / manifest, os.O_WRONLY | os.O_CREAT)
        self._held[manifest] = self._held.get(manifest, 0) + 1

    def release(self, manifest: str) -> None:
        self._held[manifest] -= 1
        if not self._held[manifest]:
            del self._held[manifest]
            if self._directory is not None:
                with translated(f"release {manifest}"):
                    unlink(self._directory / manifest)

    def close(self) -> None:
        self._held.clear()
        if self._directory is not None:
            with locked(_lock_path(self._directory.parent)):
                shutil.rmtree(self._directory, ignore_errors=True)
            fcntl.flock(self._lock.fd, fcntl.LOCK_UN)
            self._directory = None


def new_lease(run: Path) -> Lease:
    with locked(_lock_path(run)), translated(f"make a lease in {run}"):
        directory = run / secrets.token_hex(8)
        directory.mkdir(mode=0o700)
        return Lease(directory)


def leased(run: Path) -> set[str]:
    """The manifests that living processes hold; removes the leases of dead ones."""
    held: set[str] = set()
    with locked(_lock_path(run)), translated(f"read the leases in {run}"):
        for directory in run.iterdir():
            if _is_alive(directory):
                held.update(name for name in os.listdir(directory) if name != _LOCK)
            else:
                shutil.rmtree(directory, ignore_errors=True)
    return held


def any_alive(run: Path) -> bool:
    with locked(_lock_path(run)), translated(f"read the leases in {run}"):
        return any(map(_is_alive, run.iterdir()))


def _lock_path(run: Path) -> Path:
    return run.with_suffix(".lock")


def _is_alive(directory: Path) -> bool:
    try:
        return not try_lock(open_file(directory / _LOCK, os.O_RDWR))
    except FileNotFoundError:
        return False
