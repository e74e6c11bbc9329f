"""What a mount has the kernel read from the disk ahead is in memory once: in the cache of the mount."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from cakefs.engine import announced
from cakefs.engine.announced import BATCH, Announced, Part
from cakefs.model import CHUNK, MIB, ByteRange
from cakefs.store.content import InlineContent
from tests.hub import Hub
from tests.models import CONFIG, single, tensor
from tests.mounts import Cakefs, needs_fuse

SIZE = 8 * BATCH


class Pages(InlineContent):
    """A content of zeros, and which of its MiB the kernel has."""

    def __init__(self, *warm: int) -> None:
        super().__init__(b"")
        self.size = SIZE
        self.here = set(warm)
        self.read = 0

    def willneed(self, start: int, stop: int) -> bool:
        if (stop - 1) // MIB in self.here:
            return False
        new = set(range(start // MIB, -(-stop // MIB))) - self.here
        self.read += len(new)
        self.here |= new
        return True

    def wontneed(self, start: int, stop: int) -> None:
        self.here -= set(range(-(-start // MIB), stop // MIB))


@pytest.fixture(autouse=True)
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(work: Callable[[], None]) -> None:
        work()

    monkeypatch.setattr(announced, "_start", start)


def of_one_content(content: Pages, *, cached: bool = True) -> Announced:
    return Announced(lambda ranges, _: [Part(0, content, *r) for r in ranges], cached=cached)


def read(file: Announced, start: int, stop: int) -> None:
    for at in range(start, stop, MIB):
        if file.cold:
            file.served(at, min(at + MIB, stop))


def pass_over(file: Announced, content: Pages) -> int:
    """Reads all of it, asked for a window ahead. Returns: how many MiB the kernel had at most."""
    most = 0
    for at in range(0, SIZE, BATCH):
        file.ask([ByteRange(at, min(at + 2 * BATCH, SIZE))])
        read(file, at, at + BATCH)
        most = max(most, len(content.here))
    return most


def test_what_was_served_is_given_back() -> None:
    content = Pages()
    file = of_one_content(content)
    assert pass_over(file, content) * MIB <= 2 * BATCH
    assert content.read == SIZE // MIB, "each byte came from the disk once"
    file.end()
    assert not content.here


def test_a_second_pass_is_read_ahead_as_the_first() -> None:
    content = Pages()
    file = of_one_content(content)
    pass_over(file, content)
    read(file, 0, BATCH)  # not ahead, as it was served before
    pass_over(file, content)
    assert content.read >= 2 * SIZE // MIB - 2 * BATCH // MIB


def test_another_reader_does_not_bring_back_what_was_served() -> None:
    content = Pages()
    file = of_one_content(content)
    pass_over(file, content)
    file.ask([ByteRange(BATCH, 3 * BATCH)])
    assert not content.here


def test_what_was_not_served_stays_until_nobody_reads() -> None:
    content = Pages()
    file = of_one_content(content)
    file.ask([ByteRange(0, 2 * BATCH)])
    read(file, BATCH, 2 * BATCH)
    assert content.here == set(range(BATCH // MIB))
    read(file, 0, MIB)
    file.end()
    assert content.here == set(range(1, BATCH // MIB)), "what he did not take may be wanted by the next"


def test_what_the_kernel_had_before_stays() -> None:
    content = Pages(*range(SIZE // MIB))
    file = of_one_content(content)
    pass_over(file, content)
    file.end()
    assert len(content.here) == SIZE // MIB and not file.cold


def test_where_nobody_keeps_what_was_served_nothing_is_given_back() -> None:
    content = Pages()
    file = of_one_content(content, cached=False)
    pass_over(file, content)
    file.end()
    assert len(content.here) == SIZE // MIB


def in_memory(blobs: list[Path]) -> int:
    """Chunks of these files that can be had without the disk."""
    found = 0
    for blob in blobs:
        with blob.open("rb") as file:
            for at in range(0, blob.stat().st_size, CHUNK):
                with suppress(BlockingIOError):
                    found += os.preadv(file.fileno(), [bytearray(1)], at + CHUNK // 2, os.RWF_NOWAIT)
    return found


@needs_fuse
def test_a_model_read_from_a_cold_disk_is_in_memory_once(hub: Hub, tmp_path: Path) -> None:
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
    try:
        if in_memory(blobs):
            pytest.skip("this file system does not let go of what is in memory")
    except OSError:
        pytest.skip("this file system does not tell what is in memory")
    with cakefs.mounted("--offline") as path:
        assert (path / "org/name/model.safetensors").read_bytes() == published
        before = cakefs.status()["mount"]["reads"]
        assert (path / "org/name/model.safetensors").read_bytes() == published
        assert cakefs.status()["mount"]["reads"] == before, "the kernel has it, the second time"
    assert in_memory(blobs) < chunks // 2
