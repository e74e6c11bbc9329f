"""What the kernel allows a FUSE mount beyond its own defaults: how far it reads ahead, and for how many at once."""

import logging
import os
import subprocess
from pathlib import Path

from cakefs.fs.place import Mount

log = logging.getLogger(__name__)

# One request of the largest size. The kernel reads this much around a fault (its rule, not measured alone): with 4096
# a walk over tensors would fetch much in vain. Its own 128 KiB mean two requests in flight, too few for a slow store.
READ_AHEAD_KIB = 1024
# Requests of the kernel's readahead, and of O_DIRECT, on their way at once. With its 12, three readers of a file that
# stalls would fill them, and every other file would wait. Fewer than the requests that are answered at once.
BACKGROUND = 384
CONTROL = Path("/sys/fs/fuse/connections")
_ALONE_S = 5.0


def raise_limits(mount: Mount) -> None:
    """As far as this user may; what stays as it is is told to the log."""
    if os.geteuid() == 0:
        _raise(Path(f"/sys/class/bdi/{mount.device}/read_ahead_kb"), READ_AHEAD_KIB)
    control = CONTROL / mount.device.partition(":")[2] / "max_background"
    if not os.path.ismount(CONTROL) and os.geteuid() == 0:
        _raise_alone(control, BACKGROUND)
    else:
        _raise(control, BACKGROUND)


def _raise(setting: Path, value: int) -> None:
    try:
        if int(setting.read_text()) < value:
            setting.write_text(str(value))
    except OSError as error:
        log.info("%s stays as it is: %s", setting.name, error.strerror)


def _raise_alone(setting: Path, value: int) -> None:
    """In a container the file is mostly not there: it is mounted for a moment, where no other process sees it."""
    script = 'mount -t fusectl fusectl "$0" && echo "$2" >"$1"'
    command = ["unshare", "--mount", "sh", "-c", script, str(CONTROL), str(setting), str(value)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=_ALONE_S)
    except (OSError, subprocess.SubprocessError) as error:
        log.info("%s stays as it is: %s", setting.name, error)
