"""The two hashes of the store, both xxh3: fast enough (over 25 GiB/s) to be computed on the way.

A chunk's sum (64 bit) only detects accidents: rotten disks, writes that a power cut lost. A blob's digest (128 bit)
only names: equality of two blobs is proved by comparing bytes. So neither needs to resist an attacker.
`DigestHasher` releases the interpreter lock on large buffers; `chunk_sum` does so from xxhash 4 on, and before holds it
for the 40 µs that a chunk takes.
"""

import xxhash

from cakefs.model import CHUNK

DIGEST_ALGORITHM = "xxh3"
CHUNK_SHIFT = CHUNK.bit_length() - 1
assert 1 << CHUNK_SHIFT == CHUNK


def chunk_sum(data: bytes | bytearray | memoryview) -> int:
    """Sum of one chunk; never 0, which stands for "missing" wherever sums are kept."""
    return xxhash.xxh3_64_intdigest(data) or 1


class DigestHasher:
    """Digest of a blob, fed piece by piece."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()

    def update(self, data: bytes | bytearray | memoryview) -> None:
        self._hash.update(data)

    def digest(self) -> str:
        return f"{DIGEST_ALGORITHM}:{self._hash.hexdigest()}"


class SumHasher:
    """Sums of chunks that come in pieces."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_64()

    def update(self, data: bytes | bytearray | memoryview) -> None:
        self._hash.update(data)

    def take(self) -> int:
        """As `chunk_sum` of what was fed since the last call."""
        value = self._hash.intdigest() or 1
        self._hash.reset()
        return value


def chunk_count(size: int) -> int:
    return (size + CHUNK - 1) >> CHUNK_SHIFT


def chunk_size(size: int, chunk: int) -> int:
    """Bytes in that chunk of a span of `size` bytes; only the last one is short."""
    return min(CHUNK, size - (chunk << CHUNK_SHIFT))
