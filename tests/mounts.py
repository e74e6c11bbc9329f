"""A real cakefs over a real hub: the commands as a user types them, a mount in a child process, always unmounted."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import pytest

from tests.hub import Hub

needs_fuse = pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="/dev/fuse cannot be opened here")


# A bug that was survived, in whatever process, or a warning of Python: no program of ours should say such a thing.
SURVIVED = r"Traceback|Exception ignored|never awaited|\w+Warning: "
AMISS = re.compile(SURVIVED + r"|^([-\d]+ [\d:,]+ \d+ )?(WARNING|ERROR|CRITICAL) |^warning: ")
# What a mount and its transfer processes say of an upstream that misbehaves.
FETCHING = r"bytes \d+-\d+ of (?!.* recorded sum)"
UPSTREAM = rf"(WARNING|ERROR) ({FETCHING}|cannot read |\S+ came wrong|sha256:\w+: the bytes do not have)"
# What it says of a name that cannot be had.
NOT_TO_BE_HAD = r"WARNING \S+ is not added on demand: "


class Cakefs:
    """One store, one mountpoint, and the commands that work on them.

    Attributes:
        prefix: Runs the commands in other circumstances.
        provoked: Patterns of the warnings that a test means to cause: any other one fails it when the mount ends.
    """

    prefix: tuple[str, ...] = ()
    provoked: tuple[str, ...] = ()

    def __init__(self, directory: Path, endpoint: str, **environment: str) -> None:
        self.store = directory / "store"
        self.mountpoint = directory / "models"
        self.environment = os.environ | {
            "CAKEFS_STORE": str(self.store),
            "CAKEFS_CONFIG": os.devnull,
            "XDG_STATE_HOME": str(directory / "state"),
            "HF_ENDPOINT": endpoint,
            "PYTHONWARNINGS": "default",  # Python hides most of them, and they may not be: see SURVIVED
            **environment,
        }

    def run(self, *arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*self.prefix, sys.executable, "-m", "cakefs", *arguments],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert not check or done.returncode == 0, f"cakefs {' '.join(arguments)}: {done.returncode}\n{done.stderr}"
        self.hear(done)
        return done

    def hear(self, done: "subprocess.CompletedProcess[str]") -> None:
        """What a command said beside its result: no bug that it survived, and no warning that is not meant."""
        assert not re.search(SURVIVED, done.stderr), done.stderr
        for line in done.stderr.splitlines():
            level, _, text = line.partition(": ")
            if level == "warning" or (level == "error" and not done.returncode):
                self.warned(text)

    def warned(self, text: str) -> None:
        """conftest.py looks up whether the test means that."""
        print(f"warning: {text}", file=sys.stderr)

    def add_all(self, names: Iterable[str], **environment: str) -> None:
        """`cakefs add` of many, in one process: Python and imports take longer than each of them."""
        code = "import sys; from cakefs.cli.main import main; sys.exit(max(main(['add', n]) for n in sys.argv[1:]))"
        command = [*self.prefix, sys.executable, "-c", code, *names]
        subprocess.run(command, env=self.environment | environment, stdout=subprocess.DEVNULL, check=True)

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json").stdout)

    @contextmanager
    def mounted(self, *flags: str, **environment: str) -> Iterator[Path]:
        """Mounted in the background, as `cakefs mount` does it; what it logged is checked at the end."""
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
        assert not (complaints := self.amiss()), "\n".join(complaints)

    def provoking(self, *patterns: str) -> Self:
        """This, with warnings that its tests mean to cause."""
        self.provoked += patterns
        return self

    def amiss(self) -> list[str]:
        """What the mount or a process of it complained of, and no test meant to cause."""
        complaints = [line for line in self.log().splitlines() if AMISS.search(line)]
        return [line for line in complaints if not any(re.search(pattern, line) for pattern in self.provoked)]

    def status(self) -> Any:
        return json.loads((self.mountpoint / ".cakefs/status.json").read_text())

    def status_or_none(self) -> Any:
        try:
            return self.status()
        except OSError:
            return None

    def log(self) -> str:
        return "".join(p.read_text() for p in (self.mountpoint.parent / "state").rglob("*.log"))


class Place(NamedTuple):
    """A hub, a store and a mount that the tests of a module share: each of them has a model of its own."""

    hub: Hub
    cakefs: Cakefs
    path: Path


@contextmanager
def shared_place(directory: Path, *provoked: str) -> Iterator[Place]:
    """Args: provoked: Patterns of warnings that the tests mean to cause."""
    with Hub() as hub:
        cakefs = Cakefs(directory, hub.endpoint).provoking(*provoked)
        with cakefs.mounted() as path:
            yield Place(hub, cakefs, path)


def serve(hub: Hub, models: Mapping[str, Path | Mapping[str, bytes | Path]]) -> None:
    for name, files in models.items():
        hub.add_repo(name, files)


def write_config(directory: Path, **settings: float) -> str:
    """A config file for CAKEFS_CONFIG."""
    path = directory / "config.toml"
    path.write_text("".join(f"{name} = {value}\n" for name, value in settings.items()))
    return str(path)
