"""The completion scripts, in the shells themselves: what Tab makes of a line is what is then run."""

import fcntl
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import termios
from pathlib import Path
from typing import BinaryIO

import pytest

from cakefs.cli.completion import script
from cakefs.cli.main import COMMANDS

SHELLS = ("bash", "zsh", "fish")
# The last one makes a file where a shell takes a name for more than text.
NAMES = ("org/one@main", "org/two", "ollama/llama3.2:1b", "me/a cake", "a$(touch made)")
# The command as the scripts see it; it says what it is run with otherwise.
STAND_IN = """#!/bin/sh
if [ "$1" = ls ]; then cat names; else printf '«'; printf '<%s>' "$@"; printf '»\\n'; fi
"""
START = {
    "bash": (["bash", "--norc", "-i"], "source ./script"),
    "zsh": (["zsh", "-f", "-i"], "fpath=($PWD $fpath); autoload -U compinit; compinit -u -D"),
}
LINES = {
    "umou\t": "<umount>",
    "export org/two --for\t": "<export><org/two><--force>",
    "service unin\t": "<service><uninstall>",
    "export org/two --reflink alw\t": "<export><org/two><--reflink><always>",
    "report -o fi\t": "<report><-o><file.html>",
    "show org/t\t": "<show><org/two>",
    "show org/one@\t": "<show><org/one@main>",
    "show org/one@ma\t": "<show><org/one@main>",
    "show ollama/llama3.2:\t": "<show><ollama/llama3.2:1b>",
    "diff ollama/llama3.2:1b org/o\t": "<diff><ollama/llama3.2:1b><org/one@main>",
    "show me/\t": "<show><me/a cake>",
    "show a\t": "<show><a$(touch made)>",
}


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_every_command_and_no_hidden_option(shell: str) -> None:
    text = script(shell)
    assert all(command in text for command in COMMANDS)
    assert "ready-fd" not in text


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "file.html").touch()
    (tmp_path / "names").write_text("".join(f"{name}\n" for name in NAMES))
    (tmp_path / "cakefs").write_text(STAND_IN)
    (tmp_path / "cakefs").chmod(0o755)
    return tmp_path


def environment(place: Path) -> dict[str, str]:
    return {"PATH": f"{place}:{os.environ['PATH']}", "HOME": str(place), "TERM": "xterm", "LC_ALL": "C.UTF-8"}


def needs(shell: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is absent")


@pytest.mark.parametrize("shell", START)
def test_tab_completes_to_what_is_then_run(shell: str, place: Path) -> None:
    needs(shell)
    command, first = START[shell]
    (place / {"bash": "script", "zsh": "_cakefs"}[shell]).write_text(script(shell))
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
    process = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, cwd=place, env=environment(place),
        start_new_session=True,
    )  # fmt: skip
    os.close(terminal)
    with process, os.fdopen(main, "rb+", buffering=0) as keyboard:
        try:
            found = [run(keyboard, f"{first}; cakefs ready"), *(run(keyboard, f"cakefs {line}") for line in LINES)]
        finally:
            process.kill()
    assert found == ["<ready>", *LINES.values()]
    assert not (place / "made").exists()


def run(keyboard: BinaryIO, line: str) -> str:
    """What the stand-in says once that line is typed."""
    keyboard.write(f"{line}\n".encode())
    seen = b""
    while not (said := re.search("«(.*)»", seen.decode(errors="ignore"))):
        seen += keyboard.read(4096)
    return said[1]


def test_fish_completes(place: Path) -> None:
    needs("fish")
    (place / "script").write_text(script("fish"))
    asked = [line.rstrip("\t") for line in LINES]
    code = f'source script; for line in {shlex.join(asked)}; complete -C "cakefs $line" | head -n1; end'
    done = subprocess.run(
        ["fish", "--no-config", "-c", code], capture_output=True, text=True, cwd=place, env=environment(place)
    )
    assert done.stderr == ""
    wanted = [said.rpartition("<")[2].rstrip(">") for said in LINES.values()]
    assert [line.partition("\t")[0] for line in done.stdout.splitlines()] == wanted
    assert not (place / "made").exists()
