"""An ordinary user for tests that run as root: one who mounts through fusermount3, as most people do.

He has a mount namespace of his own with its own /dev/fuse, since a system may keep the real one for root. Whoever is to
see his mounts enters it.
"""

import functools
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cakefs.fs.place import KIND, mounts

UID = 65534
# He may look into any directory, since root's Python is often below /root. That lets nobody mount, or see a mount.
_READS = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
AS_HIM = ("setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", *_READS, "--")

_ENTER = """
set -e
mknod "$0/fuse" c 10 229
chmod 666 "$0/fuse"
mount --bind "$0/fuse" /dev/fuse
exec "$@"
"""


def namespace(directory: Path) -> tuple[str, ...]:
    """The prefix of a command that runs as him in a new namespace; its device is made in the directory."""
    return ("unshare", "--mount", "--propagation", "private", "sh", "-c", _ENTER, str(directory), *AS_HIM)


def enter(pid: int) -> tuple[str, ...]:
    """The prefix of a command that runs as him in the namespace of another one."""
    return ("nsenter", "--mount", f"--target={pid}", *AS_HIM)


@functools.cache
def why_absent() -> str:
    """Why there cannot be such a user here, or nothing."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        command = [
            *namespace(Path(directory)),
            sys.executable,
            "-c",
            f"import os, pyfuse3; os.execv({sys.executable!r}, ['python', '-V'])",
        ]
        try:
            tried = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError as error:
            return f"{error.filename} is absent"
    return f"an ordinary user cannot be had: {tried.stderr.strip()[-200:]}" if tried.returncode else ""


@contextmanager
def at_home(directory: Path, *visible: Path) -> Iterator[tuple[str, ...]]:
    """A namespace for as long as this lasts; gives the prefix of commands that run in it, as him.

    Args:
        visible: Mounts from outside that he sees. Others are let go: while they are mounted here, too, their servers
            would outlive being unmounted.
    """
    command = [*namespace(directory), "sh", "-c", "echo ready; exec cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:  # ends with its stdin
        assert holder.stdout is not None and holder.stdout.readline() == b"ready\n"
        as_root = ("nsenter", "--mount", f"--target={holder.pid}")
        for mount in mounts():
            if mount.kind == KIND and Path(mount.point) not in visible:
                subprocess.run([*as_root, "umount", "--lazy", mount.point], check=False, capture_output=True)
        yield enter(holder.pid)
