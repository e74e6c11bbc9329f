"""A span in flight: a sparse file of its bytes, and beside it the map of what has arrived.

    partial/<name>.data    as large as the span; unwritten chunks are holes
    partial/<name>.map     header (which span; checked by its own sum), then 8 bytes per chunk: its sum, 0 = missing

`<name>` is 32 hex digits of the SHA-256 of the span key. The map is written after the data, but neither is synced: a
sum whose data a power cut took does not match, so the chunk is found missing at its first touch. That replaces an fsync
per chunk.

Writers, and whoever removes it, hold a `flock` on the map; readers hold none and re-read the map with `pread` (unlike a
mapping, that cannot end in SIGBUS on a full or broken disk). That of `use.py` is on the data. The map exists whenever
the data does: it is made first and removed last.

While sealing, and after a crash in the middle of it, the data file has a second name under `blobs/`. Its bytes are then
no longer ours to change: whoever wants to write takes a copy of it first.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import struct
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from cakefs.model import SpanKey
from cakefs.store.files import (
    Descriptor,
    copy_range,
    open_file,
    read_full,
    scratch,
    start_writing,
    unlink,
    write_full,
)
from cakefs.store.hashes import CHUNK_SHIFT, chunk_count, chunk_size, chunk_sum
from cakefs.store.use import claim, note_write

_MAGIC = b"cakemap1"
# magic, bytes of identity, start, stop, sum of the rest of the header; then the identity, padded to 8
_HEADER = struct.Struct("<8sQQQQ")
_ENTRY = struct.Struct("<Q")
# Longest identity believed when reading a header, in bytes; longer than any URL.
_LONGEST_IDENTITY = 64 * 1024


def partial_name(key: SpanKey) -> str:
    return hashlib.sha256(f"{key.identity}\0{key.start}\0{key.stop}".encode()).hexdigest()[:32]


def data_path(directory: Path, key: SpanKey) -> Path:
    """Where the bytes of a span in flight lie."""
    return directory / f"{partial_name(key)}.data"


class MapSums:
    """The sums in a map, read anew each time: they change as chunks arrive."""

    def __init__(self, file: Descriptor, base: int, count: int) -> None:
        self._file = file
        self._base = base
        self._count = count

    def __getitem__(self, chunks: slice) -> Sequence[int]:
        first, last, _ = chunks.indices(self._count)
        data = os.pread(self._file.fd, _ENTRY.size * (last - first), self._base + _ENTRY.size * first)
        if len(data) < _ENTRY.size * (last - first):
            return [0] * (last - first)  # a map cut short says nothing
        return array("Q", data)


class OpenPartial(NamedTuple):
    """What a reader needs."""

    data: Descriptor
    sums: MapSums


class Partial:
    """A partial locked for writing; the lock lasts until `close`. Made by `lock`.

    Attributes:
        sums: Of the chunks present, 0 for the others.
        data: The file of the bytes.
    """

    def __init__(self, directory: Path, key: SpanKey, map: Descriptor) -> None:
        self.key = key
        self.size = key.size
        self._base = os.path.join(directory, partial_name(key))
        self._map = map
        self._header = _pack_header(key)
        self.sums: array[int] = array("Q")
        self.data = map  # until _load

    @classmethod
    def lock(cls, directory: Path, key: SpanKey, *, create: bool, wait: bool = True) -> "Partial | None":
        """Waits for other writers. Returns: None when there is none and `create` is false; when one is being written
        or sealed and `wait` is false."""
        path = os.path.join(directory, partial_name(key) + ".map")
        while True:
            try:
                map = open_file(path, os.O_RDWR | (os.O_CREAT if create else 0))
            except FileNotFoundError:
                return None
            try:
                fcntl.flock(map.fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                return None
            if os.fstat(map.fd).st_nlink:  # else it was sealed or dropped while we waited
                partial = cls(directory, key, map)
                try:
                    partial._load()
                except BaseException:
                    partial.close()  # whoever keeps the exception must not keep the lock
                    raise
                return partial

    def __enter__(self) -> "Partial":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the lock."""
        fcntl.flock(self._map.fd, fcntl.LOCK_UN)

    @property
    def complete(self) -> bool:
        return 0 not in self.sums

    @property
    def data_path(self) -> str:
        return self._base + ".data"

    def write(self, chunk: int, data: bytes | bytearray | memoryview) -> bool:
        """Keeps a chunk, unless it is here and matches its sum. Returns: whether the span is complete."""
        if not 0 <= chunk < len(self.sums) or len(data) != chunk_size(self.size, chunk):
            raise ValueError(f"chunk {chunk} of {len(data)} bytes for a span of {self.size}")
        if not self.check(chunk):
            self._own_data()
            write_full(self.data.fd, data, chunk << CHUNK_SHIFT)
            note_write(self.data)
            self._set(chunk, chunk_sum(data))
        # In a sequential fetch the next chunk is missing, which spares the scan of all that came before.
        return 0 not in self.sums[chunk + 1 : chunk + 2] and self.complete

    def copy(self, source: int, offset: int, sums: bytes) -> None:
        """Copies the whole span from a file, sharing its blocks where that can be done; `sums` are of its chunks."""
        self._own_data()
        if copy_range(source, self.data.fd, self.size, offset, 0) < self.size:
            return  # cut short meanwhile: incomplete it stays
        start_writing(self.data.fd)
        note_write(self.data)
        write_full(self._map.fd, sums, len(self._header))
        self.sums = array("Q", sums)

    def check(self, chunk: int) -> bool:
        """True when that chunk is here and matches its sum."""
        return bool(self.sums[chunk]) and chunk_sum(self.read(chunk)) == self.sums[chunk]

    def read(self, chunk: int) -> memoryview:
        """The chunk's bytes on disk, in this thread's scratch buffer; empty when the disk fails to read them."""
        buffer = scratch(chunk_size(self.size, chunk))
        try:
            return buffer[: read_full(self.data.fd, buffer, chunk << CHUNK_SHIFT)]
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return buffer[:0]

    def clear(self, chunk: int) -> None:
        """Makes the chunk missing."""
        if self.sums[chunk]:
            self._set(chunk, 0)

    def discard(self) -> None:
        """Removes it. A blob that its data became stays."""
        unlink(self._base + ".copy")
        unlink(self.data_path)
        unlink(self._base + ".map")

    def _set(self, chunk: int, value: int) -> None:
        write_full(self._map.fd, _ENTRY.pack(value), len(self._header) + _ENTRY.size * chunk)
        self.sums[chunk] = value

    def _load(self) -> None:
        """Reads the map; starts anew when it, or the data, is absent or not as large as it must be."""
        count = chunk_count(self.size)
        stored = os.pread(self._map.fd, len(self._header) + _ENTRY.size * count + 1, 0)
        if len(stored) == len(self._header) + _ENTRY.size * count and stored.startswith(self._header):
            try:
                self.data = open_file(self.data_path, os.O_RDWR)
            except FileNotFoundError:
                pass
            else:
                if os.fstat(self.data.fd).st_size == self.size:
                    self.sums = array("Q", stored[len(self._header) :])
                    return
        self._start(count)

    def _start(self, count: int) -> None:
        # All of the map is written, so that a full disk refuses now and no later write of an entry needs space.
        empty = self._header + bytes(_ENTRY.size * count)
        write_full(self._map.fd, empty, 0)
        if os.fstat(self._map.fd).st_size > len(empty):
            os.ftruncate(self._map.fd, len(empty))  # never to 0: ext4 would then write the file at each close
        # A new file, never the old one cut: that may be a blob by now.
        unlink(self.data_path)
        self.data = open_file(self.data_path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.ftruncate(self.data.fd, self.size)
        self.sums = array("Q", bytes(_ENTRY.size * count))

    def _own_data(self) -> None:
        """Makes sure that the data file has no second name under which others rely on it."""
        if os.fstat(self.data.fd).st_nlink == 1:
            return
        copy = self._base + ".copy"
        shutil.copyfile(self.data_path, copy)
        os.chmod(copy, 0o600)
        os.replace(copy, self.data_path)
        self.data = open_file(self.data_path, os.O_RDWR)


def evict_partial(directory: Path, key: SpanKey, *, dry_run: bool) -> bool:
    """Removes a partial that nobody writes, seals or serves from at the moment. Returns: whether it went, or would go.

    Its lock is held, so no chunk can get lost: a writer that comes now finds it removed, and begins another one.
    """
    partial = Partial.lock(directory, key, create=False, wait=False)
    if partial is None:
        return False
    with partial:
        claimed = claim(data_path(directory, key))
        if claimed is None or os.fstat(claimed.fd).st_nlink > 1:  # the second name: what a crash left of a seal
            return False
        if not dry_run:
            partial.discard()
        return True


def open_partial(directory: Path, key: SpanKey) -> OpenPartial | None:
    """For reading, without a lock. Returns: None when there is none, or none that is whole at this moment."""
    base, header, count = os.path.join(directory, partial_name(key)), _pack_header(key), chunk_count(key.size)
    while True:
        try:
            map = open_file(base + ".map", os.O_RDONLY)
            data = open_file(base + ".data", os.O_RDONLY)
        except FileNotFoundError:
            return None
        stat = os.fstat(map.fd)
        if not stat.st_nlink:
            continue  # removed meanwhile: the data may be that of the next partial of this span
        if stat.st_size != len(header) + _ENTRY.size * count or os.pread(map.fd, len(header), 0) != header:
            return None
        if os.fstat(data.fd).st_size != key.size:
            return None
        return OpenPartial(data, MapSums(map, len(header), count))


def local_size(directory: Path, key: SpanKey) -> int:
    """Bytes of the span that have arrived."""
    found = open_partial(directory, key)
    if found is None:
        return 0
    sums = found.sums[0 : chunk_count(key.size)]
    return sum(chunk_size(key.size, i) for i, value in enumerate(sums) if value)


def read_key(path: Path) -> SpanKey | None:
    """The span that a map is about; None when it is no whole map."""
    try:
        with open(path, "rb") as file:
            return _parse_header(file.read(_HEADER.size + _LONGEST_IDENTITY))
    except FileNotFoundError:
        return None


def map_paths(directory: Path) -> Iterator[Path]:
    """Of every partial, also of one whose map is gone."""
    names = {os.path.splitext(n)[0] for n in os.listdir(directory)}
    return (directory / f"{name}.map" for name in sorted(names))


def _pack_header(key: SpanKey) -> bytes:
    identity = key.identity.encode()
    head = _HEADER.pack(_MAGIC, len(identity), key.start, key.stop, 0)
    padded = identity + bytes(-len(identity) % 8)
    return _HEADER.pack(_MAGIC, len(identity), key.start, key.stop, chunk_sum(head + padded)) + padded


def _parse_header(data: bytes) -> SpanKey | None:
    if len(data) < _HEADER.size:
        return None
    magic, length, start, stop, _ = _HEADER.unpack_from(data)
    if magic != _MAGIC or length > _LONGEST_IDENTITY:
        return None
    key = SpanKey(data[_HEADER.size : _HEADER.size + length].decode("utf-8", "replace"), start, stop)
    return key if data.startswith(_pack_header(key)) else None
