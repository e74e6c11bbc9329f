"""What the tests of `cakefs export` share: what it wrote, and disks of some kind."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.disks import NoDisk, disk_in_a_file

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts a small file system")
MIB = 1 << 20


def files_in(directory: Path) -> dict[str, bytes]:
    """Every file below it, hidden ones too."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@contextmanager
def loop_disk(place: Path, kind: str) -> Iterator[Path]:
    """A file system of that kind; skips the test where there can be none."""
    try:
        with disk_in_a_file(place, kind, 400 * MIB) as disk:
            yield disk
    except NoDisk as error:
        pytest.skip(str(error))
