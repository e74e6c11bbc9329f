"""What the tests of crashes share: a server with its hub, and how thorough they are."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.crash.place import published
from tests.crash.server import Outcome
from tests.crash.shim import Control
from tests.hub import Hub

ROOT = Path(__file__).parents[2]
MOST = 4  # Steps or states of a scenario in a quick run.


class Crasher:
    """Asks the server; `most` is how many crashes of each kind, 0 for all that there are."""

    def __init__(self, process: "subprocess.Popen[str]", most: int) -> None:
        self._process = process
        self._most = most

    def crash(self, how: str, scenario: str) -> Outcome:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{how} {scenario} {self._most}\n")
        self._process.stdin.flush()
        return Outcome(*json.loads(self._process.stdout.readline()))


@contextmanager
def crasher(directory: Path, most: int) -> Iterator[Crasher]:
    control = Control.make(directory / "control")
    with Hub() as hub:
        for name, files in published().items():
            hub.add_repo(name, files)
        command = [sys.executable, "-m", "tests.crash.server", hub.endpoint, str(directory), str(control.path)]
        environment = os.environ | control.environment()
        pipe = subprocess.PIPE
        with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdin=pipe, stdout=pipe) as process:
            yield Crasher(process, most)
