"""Commands over a real hub, run within this process: that saves each of them the half second in which a new one imports
what it needs. Those that mount are processes all the same."""

import io
import json
import logging
import os
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

from cakefs.cli.main import main
from tests.hub import Hub
from tests.mounts import Cakefs, write_config


class Inside(Cakefs):
    """One store and one hub, and the commands that work on them."""

    def __init__(self, directory: Path, hub: Hub, **environment: str) -> None:
        config = write_config(directory, workers=1, read_timeout_s=5.0)
        super().__init__(directory, hub.endpoint, **{"CAKEFS_CONFIG": config} | environment)
        self.directory = directory
        self.hub = hub

    def run(self, *arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        if arguments[0] in ("mount", "umount"):
            return super().run(*arguments, check=check, **environment)
        out, err, root = io.StringIO(), io.StringIO(), logging.getLogger()
        handlers, root.handlers = root.handlers, []  # pytest's would keep the command from setting up its own
        try:
            with redirect_stdout(out), redirect_stderr(err), patch.dict(os.environ, self.environment | environment):
                code = main(arguments)
        finally:
            root.handlers = handlers
        assert not check or code == 0, f"cakefs {' '.join(arguments)}: {code}\n{err.getvalue()}"
        done = subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
        self.hear(done)
        return done

    def call(self, *arguments: object, code: int = 0) -> tuple[str, str]:
        """stdout and stderr of a command that is to end with this exit code."""
        done = self.run(*map(str, arguments), check=False)
        assert done.returncode == code, done.stderr
        return done.stdout, done.stderr

    def __call__(self, *arguments: object, code: int = 0) -> str:
        """stdout; or stderr where the command is to fail."""
        return self.call(*arguments, code=code)[bool(code)]

    def told(self, *arguments: object) -> Any:
        """What `--json` says."""
        return json.loads(self(*arguments, "--json"))

    def blobs(self) -> list[Path]:
        return sorted((self.store / "blobs").glob("*/*"))
