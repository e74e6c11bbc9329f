"""Memory for the kernel to copy into."""

import mmap


def page_aligned(size: int) -> memoryview:
    """A buffer of so many bytes that begins where a page does.

    A bytearray begins 16 bytes behind a multiple of 32, and to such addresses the kernel copies at a quarter of the
    speed on AMD's Zen 3 and later: 1.8 GB/s instead of 7.5, for files in memory and for sockets alike.
    """
    return memoryview(mmap.mmap(-1, max(size, 1)))[:size]
