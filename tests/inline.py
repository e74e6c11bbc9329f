"""Commands run within this process: a new one takes longer to import than most of them to run."""

import contextlib
import io
import os
import subprocess
from unittest import mock

from cakefs.cli.main import main
from tests.mounts import Cakefs


class Inline(Cakefs):
    """As `Cakefs`; a mount is a process all the same."""

    def run(self, *arguments: str, check: bool = True, **environment: str) -> "subprocess.CompletedProcess[str]":
        if arguments[0] in ("mount", "umount"):
            return super().run(*arguments, check=check, **environment)
        out, err = io.StringIO(), io.StringIO()
        with (
            mock.patch.dict(os.environ, self.environment | environment),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            code = main(arguments)
        assert not check or code == 0, f"cakefs {' '.join(arguments)}: {code}\n{err.getvalue()}"
        done = subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
        self.hear(done)
        return done
