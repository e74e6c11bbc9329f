"""The mounts that are there: alive, dead, hung, and how far the kernel reads ahead on them.

None is asked in this process: a call to a hung server cannot be interrupted.
"""

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from shlex import quote

from cakefs.cli.checks.check import Check, mounts, text_of
from cakefs.cli.live import read_status
from cakefs.fs.place import KIND, Mount

STAT_TIMEOUT_S = 2.0
READ_AHEAD_KIB = 1024  # Below it a sequential reader gets requests of less than 1 MiB.

STAT = "import os, sys\ntry: os.stat(sys.argv[1])\nexcept OSError as error: sys.exit(error.errno)"


def check_mounts(root: Path, *, timeout_s: float = STAT_TIMEOUT_S) -> Iterator[Check]:
    for mount in mounts(root):
        if mount.kind == KIND:
            yield _check_mount(root, mount, stat_errno(mount.point, timeout_s))


def _check_mount(root: Path, mount: Mount, answer: int | None) -> Check:
    name = f"mount {mount.point}"
    clear = f"{'umount -l' if os.geteuid() == 0 else 'fusermount3 -uz'} {quote(mount.point)}"
    if answer is None:
        return Check(name, False, "does not answer; its server hangs", clear)
    if answer in (errno.ENOTCONN, errno.ECONNABORTED):
        return Check(name, False, "dead: its server is gone", f"{clear}  (or mount there again)")
    if answer == errno.EACCES:
        return Check(name, None, "of another user", "mount with --allow-other to share it")
    if answer:
        return Check(name, False, f"fails: {os.strerror(answer)}", clear)
    if lost := _lost_store(read_status(mount.point)):
        fix = f"cakefs umount {quote(mount.point)}, then mount it again"
        return Check(name, False, f"alive, but its store {lost}", fix)
    setting = f"sys/class/bdi/{mount.device}/read_ahead_kb"
    found = text_of(root / setting).strip()
    if found.isdecimal() and int(found) < READ_AHEAD_KIB:
        return Check(name, None, f"alive, kernel readahead {found} KiB", f"echo 1024 | sudo tee /{setting}")
    return Check(name, True, f"alive, kernel readahead {found or 'of unknown'} KiB")


def _lost_store(said: object) -> str:
    """What became of the store that a mount serves, by what that says; empty while it is there."""
    match said:
        case {"store": str(store), "mount": {"since": int(since)}}:
            try:
                made = os.stat(os.path.join(store, "format")).st_mtime
            except OSError:
                return f"{store} is gone"
            return f"{store} was removed, and another is there now" if made >= since + 1 else ""
    return ""


def stat_errno(path: str, timeout_s: float = STAT_TIMEOUT_S) -> int | None:
    """The errno of stat(path), 0 when it works, None without an answer."""
    with open(os.devnull, "w") as nowhere:
        child = subprocess.Popen([sys.executable, "-ISc", STAT, path], stderr=nowhere)
    try:
        return child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        child.kill()
        threading.Thread(target=child.wait, daemon=True).start()  # it may never end
        return None
