"""How the file is read: as loaders do, without doing anything with the bytes."""

import mmap
import os
from pathlib import Path

BLOCK = 16 << 20


def read_all(path: Path) -> int:
    """read() in blocks of 16 MiB into one buffer."""
    buffer = memoryview(bytearray(BLOCK))
    total = 0
    fd = os.open(path, os.O_RDONLY)
    try:
        while count := os.readv(fd, [buffer]):
            total += count
    finally:
        os.close(fd)
    return total


def map_all(path: Path) -> int:
    """A private mapping with the advice that safetensors gives, copied in file order."""
    buffer = memoryview(bytearray(BLOCK))
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        with mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as view:
            for start in range(0, size, BLOCK):
                stop = min(size, start + BLOCK)
                buffer[: stop - start] = view[start:stop]
    finally:
        os.close(fd)
    return size


def drop_cache(path: Path) -> None:
    """Drops the pages that the kernel holds of one file (of a mount: not those of the blobs behind it)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
