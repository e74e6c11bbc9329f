"""One pass over a file of somebody else: every hash that adopting it takes, in the time that the slowest one needs.

Over each range (a tensor, a header, the whole) the blob's digest and the sums of its chunks, over the whole file what
names it upstream: SHA-256, git's name of a blob. Memory is one buffer, whatever the file weighs.
"""

import hashlib
import os
from array import array
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from cakefs.buffers import page_aligned
from cakefs.model import CHUNK, MIB, ByteRange
from cakefs.store.borrowed import Stamp
from cakefs.store.files import read_full
from cakefs.store.foreign import open_stamped
from cakefs.store.hashes import DigestHasher, SumHasher

_BUFFER = 2 * MIB  # Less would spend time in Python, more would leave the processor's cache.


class Piece(NamedTuple):
    """A range of the file as a blob; `sums` as in `BlobRecord`."""

    range: ByteRange
    digest: str
    sums: bytes


class Scan(NamedTuple):
    """Attributes:
    identities: What the whole file is: `sha256:…`, `git:…`.
    """

    stamp: Stamp
    identities: tuple[str, ...]
    pieces: tuple[Piece, ...]


def scan(
    stamp: Stamp, ranges: Iterable[ByteRange], algorithms: Collection[str], progress: Callable[[int], None]
) -> Scan | None:
    """Reads and hashes a file.

    Args:
        ranges: Any, none of them empty; they may overlap.
        algorithms: Of `sha256` and `git`.
        progress: Called with the bytes done since the last call; what it raises ends the scan.

    Returns: None when the file was changed meanwhile.
    """
    file = open_stamped(stamp)
    if file is None:
        return None
    os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    whole = {name: _whole_hasher(name, stamp.size) for name in sorted(algorithms)}
    waiting = sorted(ranges, reverse=True)
    active: list[_Range] = []
    done: list[Piece] = []
    buffer = page_aligned(min(_BUFFER, stamp.size))
    for offset in range(0, stamp.size, _BUFFER):
        view = buffer[: min(_BUFFER, stamp.size - offset)]
        if read_full(file.fd, view, offset) != len(view):
            return None
        for hasher in whole.values():
            hasher.update(view)
        while waiting and waiting[-1].start < offset + len(view):
            active.append(_Range(waiting.pop()))
        for one in active:
            one.feed(view, offset)
        done += [one.piece() for one in active if one.range.stop <= offset + len(view)]
        active = [one for one in active if one.range.stop > offset + len(view)]
        progress(len(view))
    if not stamp.matches(os.fstat(file.fd)):
        return None
    identities = tuple(f"{name}:{hasher.hexdigest()}" for name, hasher in whole.items())
    return Scan(stamp, identities, tuple(done))


def identities_of(data: bytes, algorithms: Sequence[str] = ("git", "sha256")) -> tuple[str, ...]:
    """What a small file is."""
    found = []
    for name in algorithms:
        hasher = _whole_hasher(name, len(data))
        hasher.update(data)
        found.append(f"{name}:{hasher.hexdigest()}")
    return tuple(found)


def _whole_hasher(name: str, size: int) -> "hashlib._Hash":
    if name == "sha256":
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


class _Range:
    """A range under way."""

    def __init__(self, range: ByteRange) -> None:
        self.range = range
        self._digest = DigestHasher()
        self._sums: array[int] = array("Q")
        self._chunk = SumHasher()
        self._at = range.start

    def feed(self, view: memoryview, offset: int) -> None:
        """Takes what of the range is in `view`, the file's bytes from `offset` on."""
        start, stop = self.range
        part = view[self._at - offset : min(stop - offset, len(view))]
        self._digest.update(part)
        while part:
            room = CHUNK - (self._at - start) % CHUNK
            piece, part = part[:room], part[room:]
            self._chunk.update(piece)
            self._at += len(piece)
            if len(piece) == room or self._at == stop:
                self._sums.append(self._chunk.take())

    def piece(self) -> Piece:
        return Piece(self.range, self._digest.digest(), self._sums.tobytes())
