"""Files that belong to somebody else: opened for reading, and looked at again after each read.

They may be changed, replaced or deleted at any moment by programs that know nothing of us. Linux notes the time of a
change before it changes a byte, so whoever reads first and then finds the stamp unchanged has read what was hashed.
Nothing here ever opens one for writing.
"""

import errno
import logging
import os
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from cakefs.store.borrowed import Place, Stamp
from cakefs.store.content import FileContent, Outcome, Sums
from cakefs.store.files import SECTOR, Descriptor, open_file
from cakefs.store.hashes import CHUNK_SHIFT

_MASK = (1 << CHUNK_SHIFT) - 1
# Within this time of a change another one may get the same time: the clock of file systems ticks every 1 to 10 ms.
SETTLED_S = 0.05

_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_OURS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

_log = logging.getLogger("cakefs.store")


class Lent(NamedTuple):
    """An open file that has what it had when its stamp was taken; the bytes of interest begin at `place.offset`."""

    file: Descriptor
    place: Place


def open_stamped(stamp: Stamp) -> Descriptor | None:
    """The file with this stamp; None when there is none any more, or it cannot be read.

    Raises OSError where that is no fault of the file: there are no descriptors left, say.
    """
    try:
        file = open_file(os.fsdecode(stamp.path), os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)  # it may be a FIFO now
    except OSError as error:
        if error.errno in _OURS:
            raise
        return None
    return file if stamp.matches(os.fstat(file.fd)) else None


def open_place(places: Iterable[Place]) -> Lent | None:
    """The first of them that still has its bytes."""
    for place in places:
        file = open_stamped(place.stamp)
        if file is not None:
            return Lent(file, place)
    return None


def exists(stamp: Stamp) -> bool:
    """False also where that cannot be found out."""
    try:
        return stamp.matches(os.stat(stamp.path))
    except OSError:
        return False


def is_gone(stamp: Stamp) -> bool:
    """Whether it was changed, replaced or deleted; not so where a disk fails, or a directory may not be searched."""
    try:
        return not stamp.matches(os.stat(stamp.path))
    except OSError as error:
        return error.errno in _GONE


def stamp_of(path: str | os.PathLike[str]) -> Stamp:
    """The stamp of a file whose next change will be seen: waits for the clock where it was changed just now."""
    real = os.fsencode(os.path.realpath(path))
    status = os.stat(real)
    age = time.time() - status.st_mtime_ns / 1e9
    if 0 <= age < SETTLED_S:
        time.sleep(SETTLED_S - age)
        status = os.stat(real)
    return Stamp.of(real, status)


class BorrowedContent(FileContent):
    """A blob in such a file.

    Once the file was found changed, everything is missing: open the content again (`Store.content`).

    Args:
        on_gone: Called once, when the file is found changed.
    """

    def __init__(
        self, lent: Lent, size: int, sums: Sums, on_bad: Callable[[int], None], on_gone: Callable[[Stamp], None]
    ) -> None:
        super().__init__(lent.file, size, sums, on_bad)
        self._base = lent.place.offset
        self.aligned = self._base % SECTOR == 0
        self._stamp = lent.place.stamp
        self._on_gone = on_gone
        self._gone = False

    def read_into(self, buffer: memoryview, offset: int, *, wait: bool) -> Outcome:
        outcome = Outcome.MISSING if self._gone else self._read(buffer, offset, wait)
        return outcome if outcome is not Outcome.DONE or not self.gone else Outcome.MISSING

    def read_direct(self, buffer: memoryview, first: int, last: int) -> memoryview | None:
        data = super().read_direct(buffer, first, last)
        return None if self.gone else data

    def missing(self, start: int, stop: int) -> list[int]:
        if not self.gone:
            return super().missing(start, stop)
        return list(range(start >> CHUNK_SHIFT, (min(stop, self.size) + _MASK) >> CHUNK_SHIFT)) if start < stop else []

    def note_use(self) -> None:
        """Nothing is noted on a file of somebody else, and it is not evicted anyway."""

    @property
    def complete(self) -> bool:
        return not self.gone and super().complete

    @property
    def gone(self) -> bool:
        """Whether the file is not any more what it was."""
        if not self._gone and not self._stamp.matches(os.fstat(self._opened().fd)):
            self._gone = True
            self._on_gone(self._stamp)
        return self._gone

    def _read(self, buffer: memoryview, offset: int, wait: bool) -> Outcome:
        size, stop = len(buffer), offset + len(buffer)
        if offset < 0 or stop > self.size:
            raise ValueError(f"bytes {offset}..{stop} of a content of {self.size}")
        if self._checked.find(0, offset >> CHUNK_SHIFT, (stop + _MASK) >> CHUNK_SHIFT) >= 0:
            return self._read_by_chunk(buffer, offset, wait)
        file = self._opened()
        try:
            count = os.preadv(file.fd, (buffer,), self._base + offset, 0 if wait else self._nowait)
        except OSError as error:
            return self._retry(error, buffer, offset, wait)
        if count == size:
            return Outcome.DONE
        return self._read_rest(file, buffer, offset, count) if wait else Outcome.WOULD_BLOCK

    def _turn_bad(self, chunk: int) -> Outcome:
        return Outcome.MISSING if self.gone else super()._turn_bad(chunk)


def report_gone(*stamps: Stamp) -> None:
    for stamp in stamps:
        _log.warning("%s is gone or has changed: nothing is borrowed of it", stamp)
