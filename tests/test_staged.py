"""What a reader of a cold disk comes to next is staged: the bytes are right whoever reads, and in memory once."""

import errno
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import trio
import trio.lowlevel

from cakefs.app import App, open_app
from cakefs.config import Config
from cakefs.engine import staged
from cakefs.engine.models.sources import parse_source
from cakefs.engine.read import FileReader
from cakefs.engine.staged import RUN, SLOTS, THREADS, Part, Stage, Staged
from cakefs.model import CHUNK, MIB, ByteRange, View
from cakefs.store import content
from cakefs.store.content import InlineContent
from cakefs.store.files import is_in_memory
from tests.fs_child import eventually
from tests.hub import Hub
from tests.models import CONFIG, single, tensor
from tests.mounts import Cakefs, needs_fuse
from tests.test_engine import read_file

WEIGHTS = "model.safetensors"


class Disk(InlineContent):
    """A content that is on the disk only. Each chunk is full of its own number; those of `broken` cannot be read."""

    def __init__(self, chunks: int, *broken: int) -> None:
        super().__init__(b"")
        self.size = chunks * CHUNK
        self.broken = set(broken)
        self.read: list[int] = []
        self.advised = 0

    def in_memory(self, start: int, stop: int) -> bool | None:
        return False

    def willneed(self, start: int, stop: int) -> None:
        self.advised += stop - start

    def read_direct(self, buffer: memoryview, first: int, last: int) -> memoryview | None:
        self.read += range(first, last)
        for i, chunk in enumerate(range(first, last)):
            buffer[i * CHUNK : (i + 1) * CHUNK] = bytes([chunk]) * CHUNK
        return None if self.broken & set(range(first, last)) else buffer[: (last - first) * CHUNK]


class Reader:
    """Of a file that is one content."""

    def __init__(self, content: Disk, stage: Stage | None = None, *, cached: bool = True, whole: bool = True) -> None:
        self.epoch = 0
        self.stage = stage or Stage()
        parts = lambda ranges: [Part(0, content, *r, r.start, whole) for r in ranges]  # noqa: E731
        self.staged = Staged(self.stage, parts, lambda: self.epoch, cached=cached)

    def ask(self, first: int, last: int) -> list[ByteRange]:
        """For whole chunks."""
        return self.staged.ask([ByteRange(first * CHUNK, last * CHUNK)])

    async def get(self, start: int, stop: int) -> bytes | None:
        """The bytes; None when they are not staged."""
        await self.staged.wait(0, start, stop)
        assert not self.staged.on_its_way(0, start, stop)
        parts = self.staged.get(0, start, stop)
        return None if parts is None else b"".join(parts)

    async def chunks(self, first: int, last: int) -> list[int | None]:
        """Of each of these chunks the byte that it is full of; None for one that is not staged."""
        found: list[int | None] = []
        for chunk in range(first, last):
            data = await self.get(chunk * CHUNK, (chunk + 1) * CHUNK)
            assert data is None or data == data[:1] * CHUNK
            found.append(None if data is None else data[0])
        return found


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(30):
            await body()

    trio.run(main)


def test_what_was_asked_for_is_given_out_once() -> None:
    async def body() -> None:
        disk = Disk(9)
        reader = Reader(disk)
        assert await reader.chunks(0, 1) == [None]
        reader.ask(1, 9)
        assert await reader.chunks(0, 9) == [None, *range(1, 9)]
        assert await reader.chunks(0, 9) == [None] * 9
        assert sorted(disk.read) == [*range(1, 9)], "each was read once"

    run(body)


def test_a_request_may_lie_in_several_runs() -> None:
    async def body() -> None:
        reader = Reader(Disk(3 * RUN))
        reader.ask(0, 3 * RUN)
        data = await reader.get(CHUNK // 2, 3 * RUN * CHUNK - 1)
        assert data == b"".join(bytes([i]) * CHUNK for i in range(3 * RUN))[CHUNK // 2 : -1]

    run(body)


def test_what_cannot_be_read_so_is_left_to_others() -> None:
    async def body() -> None:
        reader = Reader(Disk(2 * RUN, 1))
        reader.ask(0, 2 * RUN)
        assert await reader.chunks(0, 2 * RUN) == [None] * RUN + [*range(RUN, 2 * RUN)]

    run(body)


def test_who_asks_gets_half_of_the_room_and_is_told_what_is_left() -> None:
    async def body() -> None:
        disk, stage = Disk(2 * SLOTS), Stage()
        readers = [Reader(disk, stage) for _ in range(3)]
        got = []
        for reader in readers:
            (refused,) = reader.ask(0, 2 * SLOTS)
            assert refused.stop == 2 * SLOTS * CHUNK
            got.append(refused.start // CHUNK)
        assert got == [SLOTS // 2, SLOTS // 4, SLOTS // 8]
        for reader, chunks in zip(readers, got, strict=True):
            assert await reader.chunks(0, chunks + 1) == [*range(chunks), None]
        assert free(stage)

    run(body)


def free(stage: Stage) -> bool:
    """Whether nothing is staged; then it is not usable any more."""
    stage.settle()
    return stage.take(staged.SLOTS) is not None


async def soon_free(stage: Stage) -> bool:
    for _ in range(500):
        if free(stage):
            return True
        await trio.sleep(0.01)
    return False


def test_readers_that_ask_for_the_same_are_given_it_once() -> None:
    """Cached, what was given out is not come for again, however often it was asked for."""

    async def body() -> None:
        reader = Reader(Disk(12))
        for first in (0, 2, 1, 3, 0):
            reader.ask(first, first + 9)
        assert await reader.chunks(0, 12) == [*range(12)]
        assert free(reader.stage)

    run(body)


def test_what_was_asked_for_in_part_is_over_with_that_part() -> None:
    async def body() -> None:
        reader = Reader(Disk(4))
        reader.staged.ask([ByteRange(CHUNK // 2, 3 * CHUNK)])
        reader.staged.ask([ByteRange(3 * CHUNK, 4 * CHUNK - 7)])
        assert await reader.get(CHUNK // 2, 4 * CHUNK - 7) is not None
        assert free(reader.stage)

    run(body)


def test_small_parts_are_left_to_the_kernel() -> None:
    async def body() -> None:
        disk = Disk(4)
        reader = Reader(disk)
        reader.staged.ask([ByteRange(CHUNK, CHUNK + 16 * 1024)])
        assert eventually(lambda: disk.advised == 16 * 1024)
        assert not reader.staged.runs

    run(body)


def test_who_lets_go_in_between_finds_nothing_and_leaves_nothing() -> None:
    async def body() -> None:
        reader = Reader(Disk(8))
        reader.ask(0, 8)
        reader.staged.end()  # on their way
        assert await reader.chunks(0, 8) == [None] * 8
        reader.ask(0, 4)
        await reader.staged.wait(0, 0, 4 * CHUNK)
        reader.staged.end()  # here
        assert await soon_free(reader.stage)

    run(body)


def test_what_nobody_came_for_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        reader = Reader(Disk(8))
        reader.ask(0, 8)
        await reader.staged.wait(0, 0, 8 * CHUNK)
        reader.stage.let_go()
        assert await reader.chunks(0, 1) == [0]
        monkeypatch.setattr(staged, "STALE_S", -1.0)
        reader.stage.let_go()
        assert await reader.chunks(1, 8) == [None] * 7
        assert free(reader.stage)

    run(body)


def test_a_disk_that_hangs_holds_nobody_up_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor those of another one, however many threads hang."""
    monkeypatch.setattr(staged, "PATIENCE_S", 0.2)
    hangs = threading.Event()

    class Hung(Disk):
        def read_direct(self, buffer: memoryview, first: int, last: int) -> memoryview | None:
            hangs.wait()
            return super().read_direct(buffer, first, last)

    async def body() -> None:
        stage = Stage()
        one, other = Reader(Hung(THREADS * RUN), stage), Reader(Disk(RUN), stage)
        one.ask(0, RUN)
        other.ask(0, RUN)
        assert await other.chunks(0, RUN) == [*range(RUN)]
        one.ask(RUN, THREADS * RUN)
        other.ask(0, RUN)
        with trio.fail_after(2):
            assert await other.chunks(0, 1) == [None]
            assert await one.chunks(0, 1) == [None]
        hangs.set()
        for reader in (one, other):
            reader.staged.end()
        assert await soon_free(stage)

    run(body)


@pytest.mark.parametrize("lack", ["threads", "memory"])
def test_without_memory_or_threads_the_kernel_has_to_do(monkeypatch: pytest.MonkeyPatch, lack: str) -> None:
    def none(*_: object, **__: object) -> None:
        raise RuntimeError if lack == "threads" else OSError(errno.ENOMEM, "none")

    async def body() -> None:
        disk = Disk(RUN)
        reader = Reader(disk)
        with monkeypatch.context() as patch:
            if lack == "threads":
                patch.setattr(trio.lowlevel, "start_thread_soon", none)
            else:
                patch.setattr(staged, "huge_pages", none)
            reader.ask(0, RUN)
            assert await reader.chunks(0, RUN) == [None] * RUN
        reader.ask(0, RUN)
        assert await reader.chunks(0, RUN) == [*range(RUN)]

    run(body)


def test_a_content_that_begins_anywhere_has_room_for_its_sectors() -> None:
    class Odd(Disk):
        aligned = False

        def read_direct(self, buffer: memoryview, first: int, last: int) -> memoryview | None:
            assert len(buffer) == (last - first + 1) * CHUNK
            return super().read_direct(buffer, first, last)

    async def body() -> None:
        reader = Reader(Odd(8))
        reader.ask(0, 8)
        assert await reader.chunks(0, 8) == [*range(8)]

    run(body)


def test_who_does_not_come_loses_his_room_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged, "SLOTS", 2 * RUN)

    async def body() -> None:
        disk, stage = Disk(4 * RUN), Stage()
        one, other = Reader(disk, stage), Reader(disk, stage)
        for first in (0, RUN):
            assert one.ask(first, first + RUN) == []
        assert await one.chunks(0, RUN + 1) == [*range(RUN + 1)]
        assert other.ask(0, RUN) == []
        assert other.ask(RUN, 2 * RUN) == [ByteRange(RUN * CHUNK, 2 * RUN * CHUNK)]
        monkeypatch.setattr(staged, "STALE_S", 0.0)
        await other.staged.wait(0, 0, RUN * CHUNK)
        stage.settle()
        assert other.ask(RUN, 2 * RUN) == []
        assert await other.chunks(RUN, 2 * RUN) == [*range(RUN, 2 * RUN)]

    run(body)


def test_what_was_given_out_stays_as_it_is_until_somebody_else_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged, "STALE_S", -1.0)
    monkeypatch.setattr(staged, "SLOTS", RUN)

    async def body() -> None:
        disk, stage = Disk(2 * RUN), Stage()
        one, other = Reader(disk, stage), Reader(disk, stage)
        for last in (1, RUN):  # some of it, then the rest
            one.ask(0, RUN)
            await one.staged.wait(0, 0, RUN * CHUNK)
            lent = one.staged.get(0, 0, last * CHUNK)
            assert lent is not None
            other.ask(RUN, 2 * RUN)
            await trio.sleep(0.05)
            assert b"".join(lent) == b"".join(bytes([i]) * CHUNK for i in range(last))
            assert await other.chunks(RUN, RUN + 1) == [None]
            other.ask(RUN, 2 * RUN)
            assert await other.chunks(RUN, 2 * RUN) == [*range(RUN, 2 * RUN)]
            for reader in (one, other):
                reader.staged.end()
            stage.let_go()

    run(body)


def test_what_is_out_of_date_is_not_given_out() -> None:
    async def body() -> None:
        reader = Reader(Disk(8))
        reader.ask(0, 4)
        await reader.staged.wait(0, 0, 4 * CHUNK)
        reader.epoch += 1
        assert await reader.chunks(0, 4) == [None] * 4
        reader.ask(4, 8)  # On their way when they go out of date.
        reader.epoch += 1
        assert await reader.chunks(4, 8) == [None] * 4
        reader.ask(4, 8)
        assert await reader.chunks(4, 8) == [4, 5, 6, 7]

    run(body)


def test_a_second_pass_is_staged_as_the_first() -> None:
    async def body() -> None:
        disk = Disk(8)
        reader = Reader(disk)
        for _ in range(2):
            reader.ask(0, 8)
            assert await reader.chunks(0, 8) == [*range(8)]
        assert sorted(disk.read) == sorted([*range(8)] * 2)

    run(body)


@pytest.mark.parametrize("how", [{"cached": False}, {"whole": False}])
def test_what_is_wanted_in_the_cache_of_the_kernel_is_read_into_that(how: dict[str, bool]) -> None:
    async def body() -> None:
        disk = Disk(8)
        reader = Reader(disk, **how)
        reader.ask(0, 8)
        assert await reader.chunks(0, 8) == [None] * 8
        assert eventually(lambda: disk.advised == 8 * CHUNK)
        assert not disk.read

    run(body)


async def all_of(app: App, reader: FileReader, published: bytes, step: int, dice: random.Random) -> None:
    """Reads a file, in order but for some jumps, and looks at each reply only after a while, as the kernel may."""
    at = 0
    while at < len(published):
        if dice.random() < 0.02:
            app.reading.pool.discard_all()
        offset = at if dice.random() < 0.9 else dice.randrange(len(published))
        data = reader.try_read(offset, step)
        if data is None:
            data = await reader.read(offset, step)
        time.sleep(0.0005)  # noqa: ASYNC251  # nothing else of this thread runs meanwhile
        assert data == published[offset : offset + step], f"WRONG BYTES at {offset}"
        at += step if offset == at else 0
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("slots", [2 * RUN, 5 * RUN, SLOTS])
def test_many_readers_of_a_cold_disk_get_the_right_bytes(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    """Some bytes are staged, some not; rooms go to others all the time; what is open is looked for anew meanwhile."""
    sizes = [1, 900 * 1024, CHUNK, 5 * CHUNK - 4, 9 * CHUNK + 8, 12 * CHUNK]
    published = single({f"t{i}": tensor(i, -(-size // 4)) for i, size in enumerate(sizes)})
    hub.add_repo("org/name", {"config.json": CONFIG, WEIGHTS: published})
    monkeypatch.setattr(content, "is_in_memory", lambda fd, start, stop: False)
    monkeypatch.setattr(staged, "SLOTS", slots)
    monkeypatch.setattr(staged, "STALE_S", 0.002)
    given = 0
    get = Staged.get

    def counted(self: Staged, span: int, start: int, stop: int) -> list[memoryview] | None:
        nonlocal given
        parts = get(self, span, start, stop)
        given += parts is not None
        return parts

    monkeypatch.setattr(Staged, "get", counted)

    async def body() -> None:
        async with open_app(config) as app:
            await app.add(parse_source("org/name", None), "org/name")
            async with app.library() as library:
                assert await read_file(library, "org/name", WEIGHTS) == published
        async with open_app(config, serving=True) as app, app.library() as library, trio.open_nursery() as nursery:
            manifest_id = library.names()["org/name"]
            file = library.manifest(manifest_id).shown(View.MODEL)[WEIGHTS]
            for turn, step in enumerate((MIB, MIB, 128 * 1024, 300_001)):
                reader, dice = library.open(manifest_id, file), random.Random(turn)
                nursery.start_soon(all_of, app, reader, published, step, dice)
        assert given > 10

    config = Config(store=tmp_path / "store", mountpoint=tmp_path / "mnt", endpoint=hub.endpoint, workers=1)
    run(body)


def test_what_was_fetched_for_a_file_that_stays_open_is_staged_at_a_later_pass(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = single({f"t{i}": tensor(i, 3 * MIB) for i in range(3)})
    hub.add_repo("org/name", {"config.json": CONFIG, WEIGHTS: published})
    genuine, staged_runs = os.preadv, []

    def cold(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            raise BlockingIOError
        return genuine(fd, buffers, offset, flags)

    def counted(self: Stage, runs: Iterable[staged._Run], read: Callable[..., None] = Stage.read) -> None:
        staged_runs.extend(runs := list(runs))
        read(self, runs)

    async def body() -> None:
        async with open_app(config, serving=True) as app:
            await app.add(parse_source("org/name", None), "org/name")
            async with app.library() as library:
                manifest_id = library.names()["org/name"]
                keeps_open = library.open(manifest_id, library.manifest(manifest_id).shown(View.MODEL)[WEIGHTS])
                assert await read_file(library, "org/name", WEIGHTS) == published
                monkeypatch.setattr(content, "is_in_memory", lambda fd, start, stop: False)
                monkeypatch.setattr(content, "_preadv", cold)
                monkeypatch.setattr(Stage, "read", counted)
                for _ in range(2):
                    staged_runs.clear()
                    assert await read_file(library, "org/name", WEIGHTS) == published
                    assert sum(run.last - run.first for run in staged_runs) * CHUNK > len(published) // 2
                keeps_open.close()

    config = Config(store=tmp_path / "store", mountpoint=tmp_path / "mnt", endpoint=hub.endpoint, workers=1)
    run(body)


def in_memory(blobs: list[Path]) -> int:
    """Chunks of these files most of which can be had without the disk."""
    found = 0
    for blob in blobs:
        with blob.open("rb") as file:
            chunks = range(0, blob.stat().st_size, CHUNK)
            known = [is_in_memory(file.fileno(), at, min(at + CHUNK, blob.stat().st_size)) for at in chunks]
            if None in known:
                pytest.skip("this file system does not tell what is in memory")
            found += sum(map(bool, known))
    return found


def by_threads(path: Path, threads: int) -> bytes:
    """All of a file, each thread its part, as transformers does."""
    part = -(-path.stat().st_size // threads)

    def read(start: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(part)

    with ThreadPoolExecutor(threads) as pool:
        return b"".join(pool.map(read, range(0, part * threads, part)))


@needs_fuse
@pytest.mark.parametrize("threads", [1, 4])
def test_a_model_read_from_a_cold_disk_is_in_memory_once(hub: Hub, tmp_path: Path, threads: int) -> None:
    published = single({f"t{i}": tensor(i, 12 * MIB) for i in range(4)})
    hub.add_repo("org/name", {"config.json": CONFIG, "model.safetensors": published})
    cakefs = Cakefs(tmp_path, hub.endpoint)
    cakefs.run("add", "org/name")
    cakefs.run("pull", "org/name")
    blobs = [path for path in (cakefs.store / "blobs").rglob("*") if path.is_file()]
    chunks = sum(path.stat().st_size for path in blobs) // CHUNK
    for blob in blobs:
        with blob.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if in_memory(blobs):
        pytest.skip("this file system does not let go of what is in memory")
    with cakefs.mounted("--offline") as path:
        assert by_threads(path / "org/name/model.safetensors", threads) == published
        first = cakefs.status()["mount"]["reads"]
        assert (path / "org/name/model.safetensors").read_bytes() == published
        again = cakefs.status()["mount"]["reads"] - first
        assert again <= first // 4, "the kernel has it, the second time, but for what it dropped meanwhile"
    assert in_memory(blobs) < chunks // 2
