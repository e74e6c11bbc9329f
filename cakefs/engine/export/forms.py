"""The bytes of a file in the form in which it is written elsewhere: as it is shown, or laid out for sharing blocks."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import trio

from cakefs.buffers import page_aligned
from cakefs.engine.read import FileReader
from cakefs.engine.reading import OpenFile, Prepared, Reading
from cakefs.errors import InvalidFormat
from cakefs.formats.safetensors import header_size, parse_header
from cakefs.model import CHUNK, MIB, ByteRange, File, Literal, Manifest
from cakefs.plan.export import aligned
from cakefs.plan.layout import Layout
from cakefs.store.content import Outcome
from cakefs.store.store import Store

BATCH = 32 * MIB  # Read in one go in a thread: a thread for each chunk took two thirds of the processor's time.

Take = Callable[[memoryview, int], bool]
"""Is given bytes, valid until it returns, and where in the file they are; False to have no more."""


class Form(NamedTuple):
    """A file of a manifest, or one made for the moment, with the bytes of its literals.

    Attributes:
        aligned: Its tensors are those of the file that is shown, its bytes are not.
    """

    manifest: Manifest
    file: File
    literals: list[bytes]
    aligned: bool


def as_shown(store: Store, manifest: Manifest, file: File) -> Form:
    literals = [store.literal(s.blob) for s in file.segments if isinstance(s, Literal) and s.size]
    return Form(manifest, file, literals, False)


async def for_sharing(reading: Reading, shown: Form, block: int) -> Form | None:
    """None where the file cannot be laid out anew, or has no tensor that fills a block."""
    file = shown.file
    if not file.path.endswith(".safetensors") or not any(s.size >= block for s in file.segments[1:]):
        return None
    source = Source(reading, shown)
    try:
        size = header_size(await source.read(0, min(8, file.size)), file.path)
        header = parse_header(await source.read(0, min(size, file.size)), file.size, file.path)
    except InvalidFormat:  # an original that only has the name
        return None
    found = aligned(shown.manifest, file, header, block)
    return Form(shown.manifest, found[0], [found[1], *shown.literals[1:]], True) if found else None


class Source:
    """Reads a form from the store, and from upstream what is missing or damaged there."""

    def __init__(self, reading: Reading, form: Form) -> None:
        self._layout = Layout.of(form.file)
        self._file = OpenFile(reading, form.manifest, form.file, form.literals)
        self._reader = FileReader(self._file, lambda: None)
        self._buffer = page_aligned(CHUNK)

    async def feed(self, part: ByteRange, take: Take, progress: Callable[[int], None]) -> bool:
        """Gives all bytes of a part of the file to `take`, in order, in threads.

        Returns: False if `take` ended it.
        """
        offset = part.start
        while offset < part.stop:
            blocks = list(self._blocks(offset, min(offset + BATCH, part.stop)))
            stop, going = await trio.to_thread.run_sync(self._take_local, offset, blocks, take)
            if going and stop == offset:  # not here, or damaged
                data = await self.block(offset, part.stop)
                going = await trio.to_thread.run_sync(take, data, offset)
                stop += len(data)
            progress(stop - offset)
            if not going:
                return False
            offset = stop
        return True

    def _blocks(self, offset: int, stop: int) -> Iterator[tuple[int, Prepared]]:
        """What is read at once, each at most a chunk: its size, and what it takes to read it."""
        while offset < stop:
            end = self._step(offset, stop)
            yield end - offset, self._file.prepared(offset, end - offset)
            offset = end

    def _take_local(self, offset: int, blocks: list[tuple[int, Prepared]], take: Take) -> tuple[int, bool]:
        """As far as all is here. In a thread. Returns: where that ends, and whether `take` wants more."""
        for size, prepared in blocks:
            data = self._buffer[:size]
            if self._reader.fill(data, prepared) is not Outcome.DONE:
                break
            if not take(data, offset):
                return offset, False
            offset += size
        return offset, True

    async def block(self, offset: int, stop: int) -> memoryview:
        """Some bytes from `offset` on, at most a chunk; valid until the next call into the engine."""
        size = self._step(offset, stop) - offset
        data = self._reader.try_read(offset, size)
        return await self._reader.read(offset, size) if data is None else data

    async def read(self, offset: int, stop: int) -> bytes:
        data = bytearray()
        while offset + len(data) < stop:
            data += await self.block(offset + len(data), stop)
        return bytes(data)

    def _step(self, offset: int, stop: int) -> int:
        """Where a read ends that touches no chunk of a span twice: a chunk is checked as a whole."""
        at = offset
        for piece in self._layout.locate(offset, min(CHUNK, stop - offset)):
            ends_chunk = min(piece.size, CHUNK - piece.start % CHUNK)
            if ends_chunk == piece.size and self._layout.bounds(piece.segment).stop == at + piece.size:
                at += piece.size
                continue
            return at + ends_chunk if at == offset else at
        return at
