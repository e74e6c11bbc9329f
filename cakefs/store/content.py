"""Readable bytes of one span, wherever the store has them: in the catalog, in a blob, in a partial still in flight.

Invariant: no byte of a chunk is handed out before this object has seen the whole chunk match its recorded sum (the
first touch); from then on the chunk costs one slice test. A chunk that does not match is *bad*: it counts as missing,
is tried again at each later read (so a repair is seen), and never served.

`FileContent` keeps descriptors, so it outlives renaming and unlinking of its file. What it cannot see is a *new* file
under the old name: when a chunk stays MISSING after it was written, open the content again (`Store.content`).

Any thread may call any method at any time, `close` included.
"""

import enum
import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from cakefs.model import CHUNK
from cakefs.store.files import Descriptor, is_in_memory, read_direct, read_full, scratch
from cakefs.store.hashes import CHUNK_SHIFT, chunk_count, chunk_size, chunk_sum
from cakefs.store.use import note_use

_MASK = CHUNK - 1


class Outcome(enum.Enum):
    """What became of a read: all of the buffer is filled, or none of it is valid."""

    DONE = enum.auto()
    WOULD_BLOCK = enum.auto()
    MISSING = enum.auto()


# Looked up in every read: a global costs less than an attribute of a module or of an Enum.
_preadv = os.preadv
_DONE = Outcome.DONE


class Sums(Protocol):
    """The recorded sums of a span's chunks; 0 where the chunk is missing."""

    def __getitem__(self, chunks: slice) -> Sequence[int]: ...


class Content(ABC):
    """Bytes `[0, size)` of a span; some may be missing.

    Attributes:
        gone: The file they were in belongs to somebody else, and is not any more what it was.
        aligned: In their file they begin where a sector does.
    """

    size: int
    aligned = True

    @property
    def gone(self) -> bool:
        return False

    @abstractmethod
    def read_into(self, buffer: memoryview, offset: int, *, wait: bool) -> Outcome:
        """Fills all of `buffer` from `offset` on.

        Args:
            wait: False never waits for the disk (WOULD_BLOCK: call again with True, from a thread); where the file
                system cannot tell whether it would, it reads.
        """

    @abstractmethod
    def missing(self, start: int, stop: int) -> list[int]:
        """Chunks of that byte range which are absent or were found bad, in order.

        A bad one is listed until `read_into` has found it good again.
        """

    @property
    @abstractmethod
    def complete(self) -> bool:
        """True when no chunk is missing, as far as is known; costs nothing once it was true."""

    @abstractmethod
    def in_memory(self, start: int, stop: int) -> bool | None:
        """Whether most of that byte range can be had without the disk; None where the file system cannot tell."""

    @abstractmethod
    def willneed(self, start: int, stop: int) -> None:
        """Asks the kernel to have that byte range in memory soon."""

    @abstractmethod
    def wontneed(self, start: int, stop: int) -> None:
        """Tells the kernel that it need not keep that byte range in memory, and what is before it in its chunk."""

    @abstractmethod
    def expect_jumps(self) -> None:
        """Asks the kernel to read what is read and no more."""

    @abstractmethod
    def read_direct(self, buffer: memoryview, first: int, last: int) -> memoryview | None:
        """Chunks `[first, last)`, checked, from the disk past the kernel's cache where the file system can do that.

        Args:
            buffer: At the beginning of a page, of `last - first` chunks, one more where this is not `aligned`.

        Returns:
            A part of the buffer; None where one is missing or cannot be read so: `read_into` finds out why.
        """

    @abstractmethod
    def note_use(self) -> None:
        """Tells every process that these bytes are in use until `close`: they will not be evicted."""

    @abstractmethod
    def close(self) -> None: ...


class InlineContent(Content):
    """A small blob in memory, checked by whoever made this."""

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self._data = memoryview(data)

    def read_into(self, buffer: memoryview, offset: int, *, wait: bool) -> Outcome:
        _check_range(offset, len(buffer), self.size)
        buffer[:] = self._data[offset : offset + len(buffer)]
        return Outcome.DONE

    def missing(self, start: int, stop: int) -> list[int]:
        return []

    @property
    def complete(self) -> bool:
        return True

    def in_memory(self, start: int, stop: int) -> bool:
        return True

    def willneed(self, start: int, stop: int) -> None:
        pass

    def wontneed(self, start: int, stop: int) -> None:
        pass

    def expect_jumps(self) -> None:
        pass

    def read_direct(self, buffer: memoryview, first: int, last: int) -> memoryview | None:
        return None

    def note_use(self) -> None:
        pass  # What is inline is not evicted.

    def close(self) -> None:
        pass


class FileContent(Content):
    """A blob file or a partial.

    Args:
        sums: One per chunk; those of a partial change as chunks arrive.
        on_bad: Called with the chunk each time one turns bad.
    """

    _base = 0  # Where the span begins in the file; not 0 in a file of somebody else only.

    def __init__(self, file: Descriptor, size: int, sums: Sums, on_bad: Callable[[int], None]) -> None:
        self.size = size
        self._file: Descriptor | None = file
        self._sums = sums
        self._on_bad = on_bad
        self._checked = bytearray(chunk_count(size))  # 1 = seen to match its sum
        self._bad: set[int] = set()
        self._complete = False
        self._nowait = os.RWF_NOWAIT  # 0 once the file system refused it, as tmpfs does

    def read_into(self, buffer: memoryview, offset: int, *, wait: bool) -> Outcome:
        size = len(buffer)
        stop = offset + size
        if offset < 0 or stop > self.size:
            _check_range(offset, size, self.size)
        if self._checked.find(0, offset >> CHUNK_SHIFT, (stop + _MASK) >> CHUNK_SHIFT) >= 0:
            return self._read_by_chunk(buffer, offset, wait)
        file = self._file or self._opened()
        try:
            count = _preadv(file.fd, (buffer,), offset, 0 if wait else self._nowait)
        except OSError as error:
            return self._retry(error, buffer, offset, wait)
        if count == size:
            return _DONE
        if not wait:
            return Outcome.WOULD_BLOCK
        return self._read_rest(file, buffer, offset, count)

    def missing(self, start: int, stop: int) -> list[int]:
        first, last = start >> CHUNK_SHIFT, (min(stop, self.size) + _MASK) >> CHUNK_SHIFT
        checked, bad = self._checked, self._bad
        if start >= stop or checked.find(0, first, last) < 0:
            return []
        sums = self._sums[first:last]
        return [i for i in range(first, last) if not checked[i] and (not sums[i - first] or i in bad)]

    @property
    def complete(self) -> bool:
        if not self._complete:
            self._complete = 0 not in self._sums[0 : len(self._checked)]
        return self._complete and not self._bad

    def in_memory(self, start: int, stop: int) -> bool | None:
        if not self._nowait:  # As overlayfs, which keeps in memory what belongs to the file below.
            return None
        return start >= stop or is_in_memory(self._opened().fd, self._base + start, self._base + stop)

    def willneed(self, start: int, stop: int) -> None:
        os.posix_fadvise(self._opened().fd, self._base + start, stop - start, os.POSIX_FADV_WILLNEED)

    def wontneed(self, start: int, stop: int) -> None:
        start -= start & _MASK
        os.posix_fadvise(self._opened().fd, self._base + start, stop - start, os.POSIX_FADV_DONTNEED)

    def expect_jumps(self) -> None:
        with suppress(OSError):  # an advice that is not taken must not keep anybody from reading
            os.posix_fadvise(self._opened().fd, 0, 0, os.POSIX_FADV_RANDOM)

    def read_direct(self, buffer: memoryview, first: int, last: int) -> memoryview | None:
        start, stop = first << CHUNK_SHIFT, min(last << CHUNK_SHIFT, self.size)
        data = read_direct(self._opened().fd, buffer, self._base + start, stop - start)
        if len(data) < stop - start:
            return None
        parts = (data[i << CHUNK_SHIFT : (i + 1) << CHUNK_SHIFT] for i in range(last - first))
        return data if all(map(self._matches, range(first, last), parts)) else None

    def _matches(self, chunk: int, data: memoryview) -> bool:
        """Whether a whole chunk is what was recorded; not asked again once it was."""
        if not self._checked[chunk]:
            (expected,) = self._sums[chunk : chunk + 1]
            if not expected or chunk_sum(data) != expected:
                return False
            self._checked[chunk] = 1
            self._bad.discard(chunk)
        return True

    def note_use(self) -> None:
        note_use(self._opened())

    def close(self) -> None:
        self._file = None  # a read in another thread holds its own reference

    def _opened(self) -> Descriptor:
        file = self._file
        if file is None:
            raise ValueError("content is closed")
        return file

    def _read_by_chunk(self, buffer: memoryview, offset: int, wait: bool) -> Outcome:
        stop = offset + len(buffer)
        at = offset
        while at < stop:
            chunk = at >> CHUNK_SHIFT
            end = min(stop, (chunk + 1) << CHUNK_SHIFT)
            part = buffer[at - offset : end - offset]
            read = self.read_into if self._checked[chunk] else self._first_touch
            outcome = read(part, at, wait=wait)
            if outcome is not Outcome.DONE:
                return outcome
            at = end
        return Outcome.DONE

    def _first_touch(self, part: memoryview, at: int, *, wait: bool) -> Outcome:
        """Reads and checks the whole chunk that `part`, at `at`, lies in."""
        chunk = at >> CHUNK_SHIFT
        (expected,) = self._sums[chunk : chunk + 1]
        if not expected:
            self._complete = False
            return Outcome.MISSING
        start, size = chunk << CHUNK_SHIFT, chunk_size(self.size, chunk)
        whole = part if len(part) == size else scratch(size)
        file = self._opened()
        try:
            at_file = self._base + start
            count = read_full(file.fd, whole, at_file) if wait else _preadv(file.fd, (whole,), at_file, self._nowait)
        except BlockingIOError:
            return Outcome.WOULD_BLOCK
        except OSError as error:
            if not wait and error.errno == errno.EOPNOTSUPP and self._nowait:
                self._nowait = 0
                return self._first_touch(part, at, wait=False)
            return self._turn_bad(chunk)
        if count < size and not wait:
            return Outcome.WOULD_BLOCK
        if count < size or chunk_sum(whole) != expected:
            return self._turn_bad(chunk)
        if whole is not part:
            part[:] = whole[at - start : at - start + len(part)]
        self._checked[chunk] = 1
        self._bad.discard(chunk)
        return Outcome.DONE

    def _turn_bad(self, chunk: int) -> Outcome:
        if chunk not in self._bad:
            self._bad.add(chunk)
            self._on_bad(chunk)
        return Outcome.MISSING

    def _retry(self, error: OSError, buffer: memoryview, offset: int, wait: bool) -> Outcome:
        """After a failed read of chunks that had been checked."""
        if not wait:
            if error.errno == errno.EOPNOTSUPP and self._nowait:
                self._nowait = 0
                return self.read_into(buffer, offset, wait=False)
            return Outcome.WOULD_BLOCK
        return self._check_again(buffer, offset)

    def _read_rest(self, file: Descriptor, buffer: memoryview, offset: int, done: int) -> Outcome:
        """After a short read: goes on, unless the file was truncated."""
        try:
            if read_full(file.fd, buffer[done:], self._base + offset + done) == len(buffer) - done:
                return Outcome.DONE
        except OSError:
            pass  # the chunk that cannot be read is found below
        return self._check_again(buffer, offset)

    def _check_again(self, buffer: memoryview, offset: int) -> Outcome:
        """Checked chunks turned out unreadable: forget that they were checked, and find out which."""
        first, last = offset >> CHUNK_SHIFT, (offset + len(buffer) + _MASK) >> CHUNK_SHIFT
        self._checked[first:last] = bytes(last - first)
        return self._read_by_chunk(buffer, offset, True)


def _check_range(offset: int, size: int, end: int) -> None:
    if offset < 0 or offset + size > end:
        raise ValueError(f"bytes {offset}..{offset + size} of a content of {end}")
