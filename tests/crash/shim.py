"""The preloaded library of shim.c: built on first use, and steered through a page that the processes share."""

import atexit
import ctypes
import mmap
import os
import shutil
import struct
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("shim.c")
_PATH_BYTES = 2048
_NUMBERS = struct.Struct("<QQQQ")  # struct control: armed, count, kill_at, whole_group; then root and log.


@cache
def library() -> Path:
    """Compiles it; skips the test where that cannot be done."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    directory = tempfile.mkdtemp(prefix="cakefs-shim-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    path = Path(directory) / "shim.so"
    command = [compiler, "-O1", "-Wall", "-Wextra", "-shared", "-fPIC", "-o", str(path), str(SOURCE)]
    done = subprocess.run([*command, "-ldl", "-lpthread"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path


class Control:
    """The page. Made once by `make`, and opened again by those who look at or change it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("r+b") as file:
            self._page = mmap.mmap(file.fileno(), 0)

    @classmethod
    def make(cls, path: Path) -> "Control":
        shim = ctypes.CDLL(str(library()))
        shim.crash_control_size.restype = ctypes.c_uint64
        fresh = ctypes.create_string_buffer(shim.crash_control_size())
        shim.crash_prepare(fresh)
        path.write_bytes(fresh.raw)
        return cls(path)

    def environment(self) -> dict[str, str]:
        """What a process needs to be one of ours."""
        return {"LD_PRELOAD": str(library()), "CRASH_CONTROL": str(self.path)}

    def arm(self, root: Path, *, kill_at: int = 0, group: bool = False, log: Path | None = None) -> None:
        """From now on, for all that is below `root`."""
        paths = b"".join(os.fsencode(p or "").ljust(_PATH_BYTES, b"\0") for p in (root, log))
        self._page[: _NUMBERS.size + len(paths)] = _NUMBERS.pack(0, 0, kill_at, group) + paths
        self._page[0] = 1

    def disarm(self) -> None:
        self._page[0] = 0

    @property
    def steps(self) -> int:
        """How many there were since it was armed."""
        return int(_NUMBERS.unpack_from(self._page)[1])


def mark(text: str) -> None:
    """Into the record of this process: so far it has come."""
    shim = ctypes.CDLL(None)
    shim.crash_mark(text.encode())
