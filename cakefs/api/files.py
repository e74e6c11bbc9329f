"""Files of models as Python's own binary files: seekable, read-only, fetched as they are read."""

import io
import os
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NamedTuple

from cakefs.api.places import Place, file_at, find, plain
from cakefs.api.session import Closed, Session, fill, session
from cakefs.engine.read import FileReader
from cakefs.engine.serve.library import Library
from cakefs.errors import UserError
from cakefs.model import File

BUFFER = 128 * 1024  # Larger reads go past it.


class Run(NamedTuple):
    """Bytes of a file, and where they are to go."""

    offset: int
    target: memoryview


class StoredFile:
    """A file of a model, to be read at any place by any thread.

    It outlives a session: after a fork, or `cakefs.close`, the next read opens the same bytes anew.

    Args:
        path: As below the mount.

    Raises:
        CakeError: There is no such file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = plain(os.fspath(path))

        async def opened(library: Library) -> tuple[Place, File, FileReader]:
            place = await find(library, self.path)
            file = file_at(library, place)
            return place, file, library.open(place.manifest_id, file)

        self._closed = False
        self._session = session()
        self._place, self._file, self._reader = self._session.call(opened)

    @property
    def size(self) -> int:
        return self._file.size

    def read_into(self, runs: Iterable[Run]) -> None:
        """Fills every target; all of them lie inside the file. Raises CakeError."""
        if self._closed:
            raise ValueError("I/O operation on closed file")
        wanted = list(runs)
        while True:
            running, reader = self._opened()

            async def read(_: Library, reader: FileReader = reader) -> None:
                for run in wanted:
                    await fill(reader, run.offset, run.target)

            with suppress(Closed):
                return running.call(read)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._session.release(self._reader)

    def _opened(self) -> tuple[Session, FileReader]:
        """In the session of now: the very manifest that it was, whatever the name stands for."""
        running = session()
        if running is not self._session:

            async def opened(library: Library) -> FileReader:
                return library.open(self._place.manifest_id, self._file)

            with suppress(Closed):
                self._reader = running.call(opened)
                self._session = running
        return self._session, self._reader


class RawFile(io.RawIOBase):
    """Unbuffered."""

    def __init__(self, file: StoredFile) -> None:
        self._stored = file
        self._position = 0
        self.name = file.path
        self.mode = "rb"

    @property
    def size(self) -> int:
        return self._stored.size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        self._check()
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._check()
        if whence not in (io.SEEK_SET, io.SEEK_CUR, io.SEEK_END):
            raise ValueError(f"invalid whence ({whence}, should be 0, 1 or 2)")
        position = offset + (0, self._position, self.size)[whence]
        if position < 0:
            raise ValueError(f"negative seek position {position}")
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        self._check()
        target = memoryview(buffer).cast("B")
        target = target[: max(0, self.size - self._position)]
        if target:
            self._stored.read_into([Run(self._position, target)])
            self._position += len(target)
        return len(target)

    def readall(self) -> bytes:
        rest = bytearray(max(0, self.size - self.tell()))
        self.readinto(rest)
        return bytes(rest)

    def close(self) -> None:
        if not self.closed and hasattr(self, "_stored"):
            self._stored.close()
        super().close()

    def _check(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")


class BufferedFile(io.BufferedReader):
    """What `cakefs.open` gives."""

    raw: RawFile

    @property
    def size(self) -> int:
        return self.raw.size


def open(path: str | os.PathLike[str], mode: str = "rb", buffering: int = BUFFER) -> BufferedFile:
    """Opens a file of a model without a mount.

    What is not local is fetched when it is read, and kept in the store.

    Args:
        path: As below a mount: `org/name/model.safetensors`, `.cakefs/original/org/name/…`; also `cakefs://…`.
        mode: `rb`.
        buffering: Bytes of the buffer.

    Raises:
        CakeError: There is no such file, or the model cannot be added.
    """
    if mode not in ("rb", "br"):
        raise UserError(f"mode {mode!r}: cakefs is read-only, and its files are binary", hint="mode='rb'")
    return BufferedFile(RawFile(StoredFile(path)), buffering)
