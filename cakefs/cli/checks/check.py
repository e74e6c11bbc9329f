"""The result of one check, and how checks look at the machine: by files below a root, and by programs they ask."""

import gzip
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cakefs.fs.place import Mount, parse_mountinfo

PROGRAM_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at.

    Attributes:
        ok: True, False (`fix` says what to do), or None: a remark; nothing is broken, `fix` says what would be better.
    """

    name: str
    ok: bool | None
    detail: str
    fix: str = ""


def text_of(path: Path) -> str:
    """A file's text, unpacked where its name says so; empty where it cannot be read."""
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode(errors="replace")
    except OSError:
        return ""


def mounts(root: Path) -> list[Mount]:
    return parse_mountinfo((root / "proc/self/mountinfo").read_bytes())


def said_by(command: list[str]) -> str:
    """What a command says on stdout; on trouble, the trouble in words."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROGRAM_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stdout.strip() or (done.stderr.strip() if done.returncode else "")
