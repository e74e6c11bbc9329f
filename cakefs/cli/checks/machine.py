"""What a mount needs of the machine: device, helper, kernel, limits."""

import os
import platform
import re
import resource
import shutil
import stat
from pathlib import Path

from cakefs.cli.checks.check import Check, said_by, text_of
from cakefs.fs.place import WITHOUT_FUSE

MIN_FILES = 4096
MIN_KERNEL = (4, 20)  # Requests of 1 MiB instead of 128 KiB.
PASSTHROUGH_KERNEL = (6, 9)
CAP_SYS_ADMIN = 21


def check_device(root: Path) -> Check:
    name, device = "/dev/fuse", root / "dev/fuse"
    in_container = "in a container: start it with --device /dev/fuse --cap-add SYS_ADMIN"
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return Check(name, False, "missing", f"sudo modprobe fuse; {in_container}; {WITHOUT_FUSE}")
    except OSError as error:
        fix = in_container if os.geteuid() == 0 else "sudo chmod 666 /dev/fuse"
        return Check(name, False, f"cannot be opened: {error.strerror}", f"{fix}; {WITHOUT_FUSE}")
    if os.geteuid() == 0 and not _may_mount(text_of(root / "proc/self/status")):
        detail = "can be opened, but this root may not mount (no CAP_SYS_ADMIN)"
        return Check(name, False, detail, f"{in_container}; {WITHOUT_FUSE}")
    return Check(name, True, "can be opened")


def _may_mount(status: str) -> bool:
    found = re.search(r"^CapEff:\s*([0-9a-f]+)", status, re.MULTILINE)
    return found is None or bool(int(found[1], 16) >> CAP_SYS_ADMIN & 1)


def check_fusermount() -> Check:
    name, path = "fusermount3", shutil.which("fusermount3")
    needed = os.geteuid() != 0
    if path is None:
        who = "not found; an ordinary user cannot mount" if needed else "not found; root mounts without it"
        return Check(name, False if needed else None, who, "sudo apt-get install fuse3 (dnf, pacman, apk: fuse3)")
    if needed and not (os.stat(path).st_mode & stat.S_ISUID and os.stat(path).st_uid == 0):
        return Check(name, False, f"{path} is not set-uid root", f"sudo chown root {path} && sudo chmod u+s {path}")
    return Check(name, True, f"{said_by([path, '--version']).removeprefix('fusermount3 version: ')} at {path}")


def check_kernel(root: Path) -> Check:
    release = text_of(root / "proc/sys/kernel/osrelease").strip() or platform.release()
    found = re.match(r"(\d+)\.(\d+)", release)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if version < MIN_KERNEL:
        fix = "boot Linux 5.4 or newer"
        return Check("kernel", False, f"{release}: too old for FUSE requests of 1 MiB; reading will be slow", fix)
    return Check("kernel", True, f"{release}; FUSE passthrough: {_passthrough(root, release, version)} (not needed)")


def _passthrough(root: Path, release: str, version: tuple[int, int]) -> str:
    if version < PASSTHROUGH_KERNEL:
        return "no"
    text = text_of(root / f"boot/config-{release}") or text_of(root / "proc/config.gz")
    if not text:
        return "unknown"
    return "yes" if "CONFIG_FUSE_PASSTHROUGH=y" in text else "no"


def check_allow_other(root: Path, wanted: bool) -> Check:
    name, fix = "user_allow_other", "echo user_allow_other | sudo tee -a /etc/fuse.conf"
    if re.search(r"^\s*user_allow_other\s*$", text_of(root / "etc/fuse.conf"), re.MULTILINE):
        return Check(name, True, "set in /etc/fuse.conf: --allow-other works for every user")
    if os.geteuid() == 0:
        return Check(name, True, "not set in /etc/fuse.conf; root needs it not")
    if wanted:
        return Check(name, False, "not set in /etc/fuse.conf, so --allow-other is refused", fix)
    return Check(name, None, "not set in /etc/fuse.conf: only you see your mounts, not containers or services", fix)


def check_open_files(limit: int) -> Check:
    """Args: limit: the hard one; cakefs raises its soft limit itself."""
    if limit == resource.RLIM_INFINITY:
        return Check("open files", True, "any number for a process")
    if limit < MIN_FILES:
        fix = f"raise nofile to {MIN_FILES} or more in /etc/security/limits.conf (LimitNOFILE= in a service)"
        return Check("open files", False, f"at most {limit} for a process", fix)
    return Check("open files", True, f"at most {limit} for a process")
