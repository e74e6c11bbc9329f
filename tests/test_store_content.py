"""Reading a span: right bytes or none, whatever became of the disk; and repair."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cakefs.buffers import page_aligned
from cakefs.errors import CorruptData
from cakefs.model import CHUNK, SpanKey
from cakefs.store import Content, Outcome, Store, content, files
from tests.store_child import MAP_SIZE, THREE, blob_path, chunks, data, flip, key, write

SPAN = key("three", len(THREE))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", map_size=MAP_SIZE) as store:
        yield store


def opened(store: Store, span: SpanKey = SPAN) -> Content:
    found = store.content(span)
    assert found is not None
    return found


def read(source: Content, offset: int, size: int, *, wait: bool = True) -> bytes | Outcome:
    buffer = bytearray(size)
    outcome = source.read_into(memoryview(buffer), offset, wait=wait)
    return bytes(buffer) if outcome is Outcome.DONE else outcome


def data_path(store: Store) -> Path:
    (path,) = store.partial_path.glob("*.data")
    return path


def test_nothing_is_there_at_first(store: Store) -> None:
    assert store.content(SPAN) is None
    assert not store.has(SPAN)
    assert store.local_bytes([SPAN]) == 0


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("wait", [False, True])
def test_serves_what_was_written(store: Store, sealed: bool, wait: bool) -> None:
    write(store, "three", THREE)
    if sealed:
        assert store.seal([SPAN]) == [SPAN]
    source = opened(store)
    assert (source.size, source.complete) == (len(THREE), True)
    assert read(source, 0, len(THREE), wait=wait) == THREE
    assert read(source, CHUNK - 5, 10, wait=wait) == THREE[CHUNK - 5 : CHUNK + 5]
    assert read(source, len(THREE), 0, wait=wait) == b""
    assert store.has(SPAN) is sealed
    assert store.local_bytes([SPAN]) == len(THREE)
    source.willneed(0, source.size)
    source.close()
    with pytest.raises(ValueError):
        read(source, 0, 1)


def test_tells_what_is_in_memory(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write(store, "three", THREE)
    store.seal([SPAN])
    source = opened(store)
    assert source.in_memory(0, CHUNK) is True
    monkeypatch.setattr(files, "_CACHESTAT_NUMBER", -1)  # as before Linux 6.5
    assert source.in_memory(0, CHUNK) is True
    for code, known in ((errno.EAGAIN, False), (errno.EOPNOTSUPP, None)):
        monkeypatch.setattr(os, "preadv", refused(code))
        assert source.in_memory(0, CHUNK) is known
    assert source.in_memory(CHUNK, CHUNK) is True


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("known", [True, False])
def test_reads_past_the_cache(store: Store, monkeypatch: pytest.MonkeyPatch, sealed: bool, known: bool) -> None:
    write(store, "three", THREE)
    if sealed:
        store.seal([SPAN])
    if not known:
        open_file = os.open

        def refuse_direct(path: str, flags: int, mode: int = 0o777) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, "a file system that knows no other way")
            return open_file(path, flags, mode)

        monkeypatch.setattr(os, "open", refuse_direct)
    source, buffer = opened(store), page_aligned(3 * CHUNK)
    for first, last in ((0, 3), (1, 3), (0, 1), (2, 3)):
        buffer[:] = bytes(len(buffer))
        assert source.read_direct(buffer, first, last) == THREE[first * CHUNK : last * CHUNK]


def test_does_not_read_past_the_cache_what_is_missing_or_wrong(store: Store) -> None:
    for i in (0, 2):
        store.write_chunk(SPAN, i, chunks(THREE)[i])
    source, buffer = opened(store), page_aligned(3 * CHUNK)
    assert source.read_direct(buffer, 0, 2) is None
    assert source.read_direct(buffer, 2, 3) == THREE[2 * CHUNK :]
    write(store, "three", THREE)
    store.seal([SPAN])
    flip(blob_path(store, SPAN), CHUNK + 5)
    source = opened(store)
    assert source.read_direct(buffer, 1, 2) is None
    assert source.read_direct(buffer, 0, 1) == THREE[:CHUNK]
    assert source.missing(0, len(THREE)) == [], "nobody asked for it yet"
    assert read(source, CHUNK, 5) is Outcome.MISSING


def refused(code: int) -> Callable[..., int]:
    def preadv(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return preadv


def test_small_spans_are_served_from_the_catalog(store: Store) -> None:
    span = key("small", 700)
    store.put_span(span, data("small", 700))
    source = opened(store, span)
    assert (source.size, source.complete, source.missing(0, 700)) == (700, True, [])
    assert read(source, 10, 600, wait=False) == data("small", 700)[10:610]
    source.willneed(0, 700)
    source.close()
    assert not list(store.blobs.files())


@pytest.mark.parametrize("where", [(-1, 5), (0, len(THREE) + 1), (len(THREE), 1)])
def test_refuses_ranges_outside_the_span(store: Store, where: tuple[int, int]) -> None:
    store.put_span(SPAN, THREE)
    store.put_span(key("small", 9), b"123456789")
    for source in (opened(store), opened(store, key("small", 9))):
        with pytest.raises(ValueError):
            read(source, *where)


def test_progress_is_seen_by_contents_already_open(store: Store) -> None:
    store.write_chunk(SPAN, 2, chunks(THREE)[2])
    source = opened(store)
    assert source.missing(0, len(THREE)) == [0, 1]
    assert source.missing(2 * CHUNK, len(THREE)) == []
    assert not source.complete
    assert read(source, 0, 1) is Outcome.MISSING
    assert read(source, 2 * CHUNK - 1, 2) is Outcome.MISSING
    assert read(source, 2 * CHUNK, 5) == THREE[2 * CHUNK :]
    assert store.local_bytes([SPAN]) == 5
    assert store.write_chunk(SPAN, 0, chunks(THREE)[0]) is False
    assert read(source, 0, CHUNK) == THREE[:CHUNK]
    assert store.write_chunk(SPAN, 1, chunks(THREE)[1]) is True
    assert source.complete
    store.seal([SPAN])
    assert read(source, 0, len(THREE)) == THREE, "a content outlives the renaming of its file"
    store.drop_span(SPAN)
    assert read(source, 0, len(THREE)) == THREE, "and its removal"


@pytest.mark.parametrize("sealed", [False, True])
def test_a_flipped_byte_is_never_served(store: Store, caplog: pytest.LogCaptureFixture, sealed: bool) -> None:
    write(store, "three", THREE)
    if sealed:
        store.seal([SPAN])
    flip(blob_path(store, SPAN) if sealed else data_path(store), CHUNK + 4711)
    source = opened(store)
    assert read(source, 0, CHUNK) == THREE[:CHUNK]
    for wait in (False, True):
        assert read(source, 2 * CHUNK - 1, 2, wait=wait) is Outcome.MISSING
        assert read(source, CHUNK, CHUNK, wait=wait) is Outcome.MISSING
    assert read(source, 2 * CHUNK, 5) == THREE[2 * CHUNK :]
    assert source.missing(0, source.size) == [1]
    assert not source.complete
    assert len(caplog.records) == 1, "said once"
    assert f"bytes {8 + CHUNK}-{8 + 2 * CHUNK} of" in caplog.text
    store.write_chunk(SPAN, 1, chunks(THREE)[1])
    assert read(source, 0, len(THREE)) == THREE, "the repair is seen by those who have the file open"
    assert source.complete


def test_a_good_chunk_stays_when_another_process_was_sent_other_bytes(store: Store) -> None:
    """Which of them are wrong, the hash of the file tells: no reader has to fail."""
    store.put_span(SPAN, THREE)
    assert store.write_chunk(SPAN, 0, data("other", CHUNK)) is False
    assert blob_path(store, SPAN).read_bytes() == THREE


def test_repair_refuses_other_bytes_and_spares_good_ones(store: Store) -> None:
    store.put_span(SPAN, THREE)
    path = blob_path(store, SPAN)
    flip(path, 5)
    damaged = path.read_bytes()
    with pytest.raises(CorruptData):
        store.write_chunk(SPAN, 0, data("other", CHUNK))
    assert path.read_bytes() == damaged
    before = path.stat().st_mtime_ns
    assert store.write_chunk(SPAN, 1, chunks(THREE)[1]) is False
    assert path.stat().st_mtime_ns == before, "a good chunk is not written again"
    assert store.write_chunk(SPAN, 0, chunks(THREE)[0]) is False
    assert path.read_bytes() == THREE
    assert path.stat().st_mode & 0o777 == 0o444


def test_a_good_chunk_of_a_partial_is_kept(store: Store) -> None:
    store.write_chunk(SPAN, 0, chunks(THREE)[0])
    store.write_chunk(SPAN, 0, data("other", CHUNK))
    assert read(opened(store), 0, CHUNK) == THREE[:CHUNK]


@pytest.mark.parametrize("damage", ["truncated", "longer", "gone", "empty"])
def test_a_blob_of_wrong_size_is_forgotten(store: Store, damage: str) -> None:
    store.put_spans([(SPAN, THREE), (key("twin", len(THREE)), THREE)])
    path = blob_path(store, SPAN)
    if damage == "gone":
        path.unlink()
    else:
        os.truncate(path, {"truncated": CHUNK, "longer": len(THREE) + 1, "empty": 0}[damage])
    assert store.content(SPAN) is None
    assert store.content(key("twin", len(THREE))) is None
    assert not store.has(SPAN) and not path.exists()
    assert store.catalog.blobs() == [] and store.catalog.listing() == []
    store.put_span(SPAN, THREE)
    assert read(opened(store), 0, len(THREE)) == THREE


def test_a_damaged_inline_blob_is_forgotten(tmp_path: Path) -> None:
    span = key("small", 700)
    with Store.open(tmp_path / "store", map_size=MAP_SIZE) as store:
        store.put_span(span, data("small", 700))
    catalog = tmp_path / "store" / "catalog" / "data.mdb"
    found = catalog.read_bytes().index(data("small", 700))
    flip(catalog, found + 350)
    with Store.open(tmp_path / "store", map_size=MAP_SIZE) as again:
        assert again.content(span) is None
        again.put_span(span, data("small", 700))
        assert read(opened(again, span), 0, 700) == data("small", 700)


@pytest.mark.parametrize("size", [0, CHUNK, 2 * CHUNK + 1])
def test_a_file_truncated_under_an_open_content(store: Store, size: int) -> None:
    store.put_span(SPAN, THREE)
    source = opened(store)
    assert read(source, 0, len(THREE)) == THREE
    os.truncate(blob_path(store, SPAN), size)
    assert read(source, 0, len(THREE), wait=False) is Outcome.WOULD_BLOCK
    assert read(source, 0, len(THREE)) is Outcome.MISSING
    assert source.missing(0, len(THREE))[0] == size // CHUNK
    assert read(source, 0, size // CHUNK * CHUNK) == THREE[: size // CHUNK * CHUNK]


class Disk:
    """`os.preadv` of a disk that must be waited for, or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error = 0
        self.slow = False
        self.broken: range = range(0)
        self.calls = 0
        real = os.preadv

        def preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
            self.calls += 1
            if flags and self.error:
                raise OSError(self.error, os.strerror(self.error))
            if any(i in self.broken for i in range(offset, offset + len(buffers[0]), 512)):
                raise OSError(errno.EIO, "Input/output error")
            if self.slow and len(buffers[0]) > 1:
                buffers = [buffers[0][: len(buffers[0]) // 2]]
            return real(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", preadv)
        monkeypatch.setattr(content, "_preadv", preadv)


def test_says_when_it_would_wait_for_the_disk(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put_span(SPAN, THREE)
    disk = Disk(monkeypatch)
    source = opened(store)
    for _ in ("first touch", "later"):
        disk.error = errno.EAGAIN
        assert read(source, 5, 100, wait=False) is Outcome.WOULD_BLOCK
        disk.error, disk.slow = 0, True
        assert read(source, 5, 100, wait=False) is Outcome.WOULD_BLOCK
        assert read(source, 5, 100, wait=True) == THREE[5:105]
        disk.slow = False
        assert source.missing(0, len(THREE)) == []


def test_where_waiting_cannot_be_told_it_reads(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put_span(SPAN, THREE)
    disk = Disk(monkeypatch)
    disk.error = errno.EOPNOTSUPP
    source = opened(store)
    assert read(source, 5, 100, wait=False) == THREE[5:105]
    checked = opened(store)
    disk.error = 0
    assert read(checked, 5, 100, wait=False) == THREE[5:105]
    disk.error = errno.EOPNOTSUPP
    assert read(checked, 5, 100, wait=False) == THREE[5:105]


@pytest.mark.parametrize("touched", [False, True])
def test_unreadable_sectors_are_missing_chunks(store: Store, monkeypatch: pytest.MonkeyPatch, touched: bool) -> None:
    store.put_span(SPAN, THREE)
    source = opened(store)
    if touched:
        assert read(source, 0, len(THREE)) == THREE
    disk = Disk(monkeypatch)
    disk.broken = range(CHUNK + 512, CHUNK + 1024)
    assert read(source, 0, len(THREE)) is Outcome.MISSING
    assert source.missing(0, len(THREE)) == [1]
    assert read(source, 0, CHUNK) == THREE[:CHUNK]
    disk.broken = range(0)
    assert read(source, 0, len(THREE)) == THREE


def test_a_checked_chunk_costs_one_system_call(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put_span(SPAN, THREE)
    source = opened(store)
    read(source, 0, len(THREE))
    disk = Disk(monkeypatch)
    for offset in range(0, len(THREE) - 100, 4096):
        assert read(source, offset, 100, wait=False) == THREE[offset : offset + 100]
    assert disk.calls == len(range(0, len(THREE) - 100, 4096))


def test_closing_under_a_running_read_is_harmless(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The descriptor's number must not be given to another file while a thread reads from it."""
    store.put_spans([(SPAN, THREE), (key("other", 9000), data("other", 9000))])
    source = opened(store)
    read(source, 0, len(THREE))
    reading, closed = threading.Event(), threading.Event()
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        reading.set()
        assert closed.wait(10)
        return real(fd, buffers, offset, flags)

    monkeypatch.setattr(content, "_preadv", preadv)
    found: list[bytes | Outcome] = []
    thread = threading.Thread(target=lambda from_: found.append(read(from_, 100, 1000)), args=[source])
    thread.start()
    assert reading.wait(10)
    source.close()
    others = [opened(store, key("other", 9000)) for _ in range(5)]
    closed.set()
    thread.join()
    assert found == [THREE[100:1100]]
    assert len(others) == 5


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    present=st.sets(st.integers(0, 2)),
    bad=st.sets(st.integers(0, 2)),
    reads=st.lists(st.tuples(st.integers(0, len(THREE)), st.integers(0, len(THREE)), st.booleans()), max_size=8),
)
def test_reads_agree_with_the_bytes(
    store: Store, present: set[int], bad: set[int], reads: list[tuple[int, int, bool]]
) -> None:
    store.drop_span(SPAN)
    for i in present:
        store.write_chunk(SPAN, i, chunks(THREE)[i])
    for i in bad & present:
        flip(data_path(store), i * CHUNK)
    good = present - bad
    source = store.content(SPAN)
    assert (source is None) == (not present)
    for first, second, wait in reads if source else []:
        start, stop = sorted((first, second))
        touched = set(range(start // CHUNK, (stop + CHUNK - 1) // CHUNK)) if start < stop else set()
        assert source is not None
        outcome = read(source, start, stop - start, wait=wait)
        if outcome is not Outcome.WOULD_BLOCK:
            assert outcome == (THREE[start:stop] if touched <= good else Outcome.MISSING)
        if outcome is Outcome.MISSING:
            assert set(source.missing(start, stop)) & (touched - good)
