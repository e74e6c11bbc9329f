"""A real cakefs over a real hub: the commands as a user types them, a mount in a child process, always unmounted."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.hub import Hub

needs_fuse = pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="/dev/fuse cannot be opened here")


class Cakefs:
    """One store, one mountpoint, and the commands that work on them."""

    def __init__(self, directory: Path, endpoint: str, **environment: str) -> None:
        self.store = directory / "store"
        self.mountpoint = directory / "models"
        self.environment = os.environ | {
            "CAKEFS_STORE": str(self.store),
            "CAKEFS_CONFIG": os.devnull,
            "XDG_STATE_HOME": str(directory / "state"),
            "HF_ENDPOINT": endpoint,
            **environment,
        }

    def run(self, *arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "cakefs", *arguments],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert not check or done.returncode == 0, f"cakefs {' '.join(arguments)}: {done.returncode}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def add_all(self, names: Iterable[str]) -> None:
        """`cakefs add` of many, in one process: Python and imports take longer than each of them."""
        code = "import sys; from cakefs.cli.main import main; sys.exit(max(main(['add', n]) for n in sys.argv[1:]))"
        subprocess.run(
            [sys.executable, "-c", code, *names], env=self.environment, stdout=subprocess.DEVNULL, check=True
        )

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json").stdout)

    @contextmanager
    def mounted(self, *flags: str, **environment: str) -> Iterator[Path]:
        """Mounted in the background, as `cakefs mount` does it; what it logged is checked for tracebacks at the end."""
        self.run("mount", *flags, str(self.mountpoint), check=True, **environment)
        try:
            yield self.mountpoint
        finally:
            status = self.status_or_none()
            if status is not None:
                done = self.run("umount", str(self.mountpoint), check=False)
                if done.returncode:
                    os.kill(status["pid"], signal.SIGTERM)  # Ends a mount in use, too; the test has failed already.
                assert not done.returncode, done.stderr
            else:
                subprocess.run(["fusermount3", "-uz", str(self.mountpoint)], capture_output=True)
        assert "Traceback" not in self.log(), self.log()

    def status(self) -> Any:
        return json.loads((self.mountpoint / ".cakefs/status.json").read_text())

    def status_or_none(self) -> Any:
        try:
            return self.status()
        except OSError:
            return None

    def log(self) -> str:
        return "".join(p.read_text() for p in (self.mountpoint.parent / "state").rglob("*.log"))


def serve(hub: Hub, models: Mapping[str, Path | Mapping[str, bytes | Path]]) -> None:
    for name, files in models.items():
        hub.add_repo(name, files)


def write_config(directory: Path, **settings: float) -> str:
    """A config file for CAKEFS_CONFIG."""
    path = directory / "config.toml"
    path.write_text("".join(f"{name} = {value}\n" for name, value in settings.items()))
    return str(path)
