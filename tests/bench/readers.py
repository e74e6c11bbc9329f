"""How the file is read: as loaders do, without doing anything with the bytes."""

import json
import mmap
import os
from pathlib import Path

BLOCK = 16 << 20


def read_all(path: Path) -> int:
    """read() in blocks of 16 MiB into one buffer, which begins where a page does: into a bytearray, which does not, the
    kernel may copy more slowly, from wherever (`cakefs/buffers.py`)."""
    buffer = mmap.mmap(-1, BLOCK)
    total = 0
    fd = os.open(path, os.O_RDONLY)
    try:
        while count := os.readv(fd, [buffer]):
            total += count
    finally:
        os.close(fd)
    return total


def tensors_all(path: Path) -> int:
    """`safe_open` and each tensor copied, in the order of the file: the mapped way of most loaders."""
    from safetensors import safe_open

    total = 0
    with safe_open(path, framework="pt") as file:
        for name in file.offset_keys():
            total += file.get_tensor(name).clone().nbytes
    return total


def drop_cache(path: Path) -> None:
    """Drops the pages that the kernel holds of one file (of a mount: not those of the blobs behind it)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def first_pages(path: Path) -> int:
    """One byte of each tensor through a mapping, one after the other, as transformers meets a model."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        starts = sorted(8 + size + e["data_offsets"][0] for name, e in header.items() if name != "__metadata__")
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            for start in starts:
                mapped[start]
    return len(starts)


def page(path: Path, offset: int) -> bytes:
    """4 KiB, and nothing that the kernel reads around them."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        return os.pread(fd, 4096, offset)
    finally:
        os.close(fd)
