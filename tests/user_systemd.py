"""A real `systemd --user` of an ordinary user, in a mount namespace of its own: /run, HOME and /dev/fuse are private.

Needs root to make the namespace and a cgroup that can be written. What runs in it sees the mounts in it; `run` takes a
command there, as that user.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.fs_child import eventually, why_no_mount

USER = 65534
SYSTEMD = next((p for p in ("/usr/lib/systemd/systemd", "/lib/systemd/systemd") if os.access(p, os.X_OK)), "")
RUNTIME = f"/run/user/{USER}"
AS_USER = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", "--")
ENTER = f"""
set -e
mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/system {RUNTIME} /run/home
chmod 700 {RUNTIME}
mknod /run/fuse c 10 229
chmod 666 /run/fuse
mount --bind /run/fuse /dev/fuse
mkdir -p {RUNTIME}/systemd/user/service.d
printf '[Service]\\nStandardError=append:/run/home/log\\n' > {RUNTIME}/systemd/user/service.d/log.conf
chown -R {USER} {RUNTIME} /run/home
"""
ROOT = Path(__file__).parents[1]
HIERARCHIES = (Path("/sys/fs/cgroup/systemd"), Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))


def why_not() -> str:
    """Why none can run here, or nothing."""
    tools = [tool for tool in ("systemctl", "unshare", "nsenter", "setpriv", "fusermount3") if not shutil.which(tool)]
    if os.geteuid() != 0:
        return "needs root, for a namespace"
    if not SYSTEMD or tools:
        return f"systemd is not installed: {', '.join(tools) or 'no systemd'}"
    if not any((place / "cgroup.procs").exists() for place in HIERARCHIES):
        return "no cgroup hierarchy"
    return why_no_mount()


class Session:
    """`home` is HOME; its files are reached from outside through `outside`."""

    home = "/run/home"

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": self.home,
            "XDG_RUNTIME_DIR": RUNTIME,
            "PYTHONPATH": str(ROOT),
            "CAKEFS_STORE": f"{self.home}/store",
            "LC_ALL": "C.UTF-8",
        }

    def outside(self, path: str) -> Path:
        """A path in there, as a path out here."""
        return Path(f"/proc/{self._pid}/root{path}")

    def command(self, *words: str) -> list[str]:
        return ["nsenter", "--mount", f"--target={self._pid}", "env", "-C", "/", *AS_USER, *words]

    def run(self, *words: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(
            self.command(*words), env=self.environment, capture_output=True, text=True, timeout=100, check=False
        )
        assert not check or done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def cakefs(self, *arguments: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        return self.run(sys.executable, "-P", "-m", "cakefs", *arguments, check=check)

    def show(self, unit: str, name: str) -> str:
        return self.run("systemctl", "--user", "show", unit, f"--property={name}", "--value").stdout.strip()


@contextmanager
def user_systemd(log: Path) -> Iterator[Session]:
    """Raises RuntimeError where it does not come up."""
    groups = [place / f"cakefs-test-{os.getpid()}" for place in HIERARCHIES if (place / "cgroup.procs").exists()]
    environment = {"PATH": os.environ["PATH"], "HOME": Session.home, "XDG_RUNTIME_DIR": RUNTIME}
    environment |= {"SYSTEMD_LOG_TARGET": "console", "SYSTEMD_LOG_LEVEL": "info"}
    command = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        ENTER + _opened() + 'exec "$@"',
        "sh",
        *AS_USER,
        SYSTEMD,
        "--user",
    ]
    manager: subprocess.Popen[bytes] | None = None
    try:
        for group in groups:
            group.mkdir()
            for name in (".", "cgroup.procs", "cgroup.subtree_control", "tasks"):
                if (group / name).exists():
                    os.chown(group / name, USER, USER)
        joins = "".join(f'echo $$ > "{group}/cgroup.procs" && ' for group in groups)
        with log.open("wb") as sink:
            manager = subprocess.Popen(
                ["sh", "-c", f'{joins}exec "$@"', "sh", *command], stdout=sink, stderr=sink, env=environment
            )
        session = Session(manager.pid)
        if not eventually(lambda: manager.poll() is not None or _is_up(session)) or manager.poll() is not None:
            raise RuntimeError(f"systemd --user does not come up here: {log.read_text()[-500:]}")
        yield session
    except OSError as error:
        raise RuntimeError(f"no cgroup for systemd --user here: {error}") from error
    finally:
        if manager is not None:
            manager.terminate()
            manager.wait(60)
        for group in groups:
            _remove(group)


def _opened() -> str:
    """Shell that lets the user reach the interpreter and the source tree, where a closed directory is above them."""
    needed = {os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, ROOT)}
    closed: dict[Path, list[str]] = {}
    for place in needed:
        for above in reversed(Path(place).parents):
            if not above.stat().st_mode & 0o001:
                closed.setdefault(above, []).append(place)
                break
    lines = []
    for above, places in closed.items():
        kept = [(place, f"/run/kept/{place.replace('/', '-')}") for place in places]
        lines += [f'mkdir -p "{away}"; mount --bind "{place}" "{away}"' for place, away in kept]
        lines += [f'mount -t tmpfs -o mode=755 tmpfs "{above}"']
        lines += [f'mkdir -p "{place}"; mount --bind "{away}" "{place}"' for place, away in kept]
    return "\n".join([*lines, ""])


def _is_up(session: Session) -> bool:
    return session.run("systemctl", "--user", "is-system-running", check=False).stdout.strip() in (
        "running",
        "degraded",
    )


def _remove(group: Path) -> None:
    """With those that systemd made below it, once the last process is gone."""
    for directory, _, _ in os.walk(group, topdown=False):
        eventually(lambda d=directory: not (Path(d) / "cgroup.procs").read_text())  # type: ignore[misc]
        os.rmdir(directory)
