"""Live mounts, seen from another process: where they are, and what their status.json says.

A mount is asked by a child process: a system call on a hung mount waits in the kernel, but a process can be left alone.
"""

import json
import os
import subprocess
import sys
import threading
from typing import Any

from cakefs.fs.nodes import SERVICE_NAME, STATUS_NAME
from cakefs.fs.place import KIND, mounts

ANSWER_TIMEOUT_S = 3.0

_READ = "import sys\ntry: sys.stdout.write(open(sys.argv[1]).read())\nexcept OSError as error: sys.exit(error.errno)"


def cakefs_mountpoints() -> list[str]:
    """Places with a cakefs on top, in the order they were mounted."""
    top = {m.point: m.kind for m in mounts()}
    return [point for point, kind in top.items() if kind == KIND]


def read_status(mountpoint: str, *, timeout_s: float = ANSWER_TIMEOUT_S) -> dict[str, Any] | str:
    """What a mount says about itself, or in words why it says nothing."""
    path = os.path.join(mountpoint, SERVICE_NAME, STATUS_NAME)
    child = subprocess.Popen([sys.executable, "-ISc", _READ, path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        text, _ = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        child.kill()
        threading.Thread(target=child.communicate, daemon=True).start()  # it may never end
        return f"does not answer within {timeout_s:g} s"
    if child.returncode:
        return os.strerror(child.returncode)
    try:
        status = json.loads(text)
    except ValueError as error:
        return f"status.json is not JSON: {error}"
    return status if isinstance(status, dict) else "status.json is no object"


def server_of(mountpoint: str) -> int | None:
    """The process that serves a mount."""
    status = read_status(mountpoint)
    pid = status.get("pid") if isinstance(status, dict) else None
    return pid if isinstance(pid, int) else None
