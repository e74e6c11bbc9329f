"""Files of this machine as a remote: those that a `file:` URL names, and those known to have what a URL has.

What a `file:` URL names must be what it was: a file with another time of modification is refused, not read.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, unquote

import trio

from cakefs.errors import CakeError, NotFound, RemoteChanged
from cakefs.model import MIB, ByteRange, Locator
from cakefs.remotes.base import Remote, Sink

_SCHEME = "file://"
HINT = "put it back as it was, or cakefs import it again"


def file_locator(path: Path, status: os.stat_result) -> Locator:
    """Of a file on this machine, at an absolute path, as it is now."""
    return Locator(_SCHEME + quote(os.fsencode(path)), status.st_size, f"mtime {status.st_mtime_ns}")


def file_path(url: str) -> Path | None:
    """The file that a URL names; None for another kind of URL."""
    return Path(os.fsdecode(unquote(url.removeprefix(_SCHEME), errors="surrogateescape"))) if is_file(url) else None


def is_file(url: str) -> bool:
    return url.startswith(_SCHEME)


class Files:
    """Reads what is on this machine, and leaves the rest to another remote.

    Args:
        inner: None where nothing else is to be asked.
        known: Files by the URL of which they have the bytes.

    Attributes:
        bytes_read: From files.
    """

    def __init__(self, inner: Remote | None = None, known: Mapping[str, Path] | None = None) -> None:
        self._inner = inner
        self._known = known or {}
        self.bytes_read = 0

    async def fetch(self, locator: Locator, span: ByteRange, sink: Sink) -> None:
        path = self._known.get(locator.url) or file_path(locator.url)
        if path is not None:
            await self._read(path, locator, span, sink)
        elif self._inner is not None:
            await self._inner.fetch(locator, span, sink)
        else:
            raise NotFound(f"{locator.url} is not on this machine")

    async def _read(self, path: Path, locator: Locator, span: ByteRange, sink: Sink) -> None:
        for start in range(span.start, span.stop, MIB):
            stop = min(span.stop, start + MIB)
            data = await trio.to_thread.run_sync(_part, path, locator, ByteRange(start, stop))
            self.bytes_read += len(data)
            sink(data)


def _part(path: Path, locator: Locator, span: ByteRange) -> bytes:
    with _translated(path), _opened(path) as fd:
        data = os.pread(fd, span.size, span.start)
        status = os.fstat(fd)
        dated = not is_file(locator.url) or locator.validator == f"mtime {status.st_mtime_ns}"
        if status.st_size != locator.size or not dated or len(data) != span.size:
            raise RemoteChanged(f"{path} has changed since it was added", hint=HINT)
        return data


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # it may be a FIFO now
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise NotFound(f"{path} is gone, and it is known from nowhere else", hint=HINT) from None
    except OSError as error:
        raise CakeError(f"cannot read {path}: {error.strerror}") from error
