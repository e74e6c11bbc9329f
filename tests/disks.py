"""Small file systems made for the moment, and how much of one is taken or shared. Making them needs root."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class NoDisk(Exception):
    """There can be no such file system here; the message says why."""


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A tmpfs; `size` may name more options behind it."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "cakefs-test", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@contextmanager
def disk_in_a_file(place: Path, kind: str, size: int) -> Iterator[Path]:
    """A file system of that kind in a sparse file, mounted beside it. Raises NoDisk."""
    make = shutil.which(f"mkfs.{kind}", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if make is None:
        raise NoDisk(f"mkfs.{kind} is not installed")
    image, point = place / f"{kind}.img", place / kind
    with image.open("wb") as file:
        file.truncate(size)
    point.mkdir()
    subprocess.run([make, "-q", image], check=True)
    done = subprocess.run(["mount", "-o", "loop", image, point], capture_output=True, text=True)
    try:
        if done.returncode:
            raise NoDisk(f"no {kind} can be mounted here: {done.stderr.strip()}")
        try:
            yield point
        finally:
            subprocess.run(["umount", point], check=True)
    finally:
        image.unlink()
        point.rmdir()


def used(disk: Path) -> int:
    """Bytes on it that are taken, once all is written."""
    os.sync()
    fs = os.statvfs(disk)
    return (fs.f_blocks - fs.f_bfree) * fs.f_frsize


def shared_bytes(path: Path) -> int:
    """Bytes of a file whose blocks another file has, too, as filefrag tells it."""
    said = subprocess.run(["filefrag", "-e", "-s", path], capture_output=True, text=True, check=True).stdout
    block = int(re.search(r"of (\d+) bytes\)", said)[1])  # type: ignore[index]
    lengths = re.findall(r"^ *\d+: +\d+\.\. +\d+: +\d+\.\. +\d+: +(\d+):.*shared", said, re.M)
    return sum(map(int, lengths)) * block
