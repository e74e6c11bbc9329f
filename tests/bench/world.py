"""The parts side by side: a hub process, cakefs commands and mounts, the pass-through server; contexts end them."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE_S = 60.0


def environment(store: Path, endpoint: str | None = None) -> dict[str, str]:
    cleared = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "CAKEFS_"))}
    extra = {"CAKEFS_STORE": str(store), "HF_HUB_DISABLE_XET": "1", "CAKEFS_CONFIG": os.devnull}
    return cleared | extra | ({"HF_ENDPOINT": endpoint} if endpoint else {})


def cakefs(env: dict[str, str], *arguments: str) -> str:
    """Runs a command to its end; its stdout."""
    done = subprocess.run([sys.executable, "-m", "cakefs", *arguments], env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cakefs {' '.join(arguments)}: exit {done.returncode}\n{done.stderr}")
    return done.stdout


def cakefs_all(env: dict[str, str], names: list[str]) -> None:
    """`cakefs add` of many, in one process."""
    code = "import sys; from cakefs.cli.main import main; sys.exit(max(main(['add', '-q', n]) for n in sys.argv[1:]))"
    subprocess.run([sys.executable, "-c", code, *names], env=env, stdout=subprocess.DEVNULL, check=True)


@contextmanager
def hub_process(root: Path, *, rate: float = 0, latency: float = 0, certificate: Path | None = None) -> Iterator[str]:
    """A hub in a process of its own, shaped to `rate` bytes per second and `latency` seconds. Yields its endpoint."""
    command = [sys.executable, "-m", "tests.hub", "--root", str(root)]
    command += ["--rate", str(rate)] if rate else []
    command += ["--latency", str(latency)] if latency else []
    command += ["--certificate", str(certificate)] if certificate else []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["endpoint"]
    finally:
        process.terminate()
        process.wait()


@contextmanager
def mounted(env: dict[str, str], mountpoint: Path, *flags: str, read_ahead_kb: int | None = None) -> Iterator[int]:
    """A cakefs mount in the foreground of a child process. Yields its pid."""
    command = [sys.executable, "-m", "cakefs", "mount", "--foreground", *flags, str(mountpoint)]
    with _served(command, mountpoint, env, read_ahead_kb) as pid:
        yield pid


@contextmanager
def passthrough(file: Path, mountpoint: Path, *, read_ahead_kb: int | None = None) -> Iterator[int]:
    command = [sys.executable, "-m", "tests.bench.passthrough", str(file), str(mountpoint)]
    with _served(command, mountpoint, None, read_ahead_kb) as pid:
        yield pid


@contextmanager
def rclone(remote: str, mountpoint: Path, *flags: str) -> Iterator[int]:
    """`rclone mount` of a local directory or of what rclone calls a remote."""
    command = ["rclone", "mount", "--read-only", "--config", os.devnull, *flags, remote, str(mountpoint)]
    with _served(command, mountpoint, None, None) as pid:
        yield pid


@contextmanager
def _served(
    command: list[str], mountpoint: Path, env: dict[str, str] | None, read_ahead_kb: int | None
) -> Iterator[int]:
    mountpoint.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(command, env=env)
    try:
        _wait_until_mounted(mountpoint, process)
        if read_ahead_kb is not None:
            time.sleep(0.3)  # After the server's own setting, which comes just behind INIT.
            set_read_ahead(mountpoint, read_ahead_kb)
        yield process.pid
    finally:
        subprocess.run(["fusermount3", "-uz", str(mountpoint)], capture_output=True)
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_mounted(mountpoint: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while device(mountpoint) is None:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"nothing is mounted at {mountpoint}; the server ended with {process.poll()}")
        time.sleep(0.02)
    os.listdir(mountpoint)


def device(mountpoint: Path) -> str | None:
    """major:minor of the FUSE mount at a place."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[4] == str(mountpoint) and " - fuse" in line:
            return fields[2]
    return None


def set_read_ahead(mountpoint: Path, kilobytes: int) -> None:
    """Needs root; affects files opened afterwards."""
    Path(f"/sys/class/bdi/{device(mountpoint)}/read_ahead_kb").write_text(str(kilobytes))


def status(mountpoint: Path) -> dict[str, int]:
    loaded: dict[str, int] = json.loads((mountpoint / ".cakefs" / "status.json").read_text())
    return loaded
