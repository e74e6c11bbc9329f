"""Interleavings that chance would rarely produce: another process acts at the worst moment."""

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from cakefs.model import CHUNK, SpanKey
from cakefs.store import Outcome, Store
from cakefs.store.blobs import Candidate
from cakefs.store.files import open_file, try_lock
from cakefs.store.partial import Partial, partial_name
from tests.store_child import MAP_SIZE, THREE, TWO, blob_path, chunks, flip, key, write

SPAN = key("three", len(THREE))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", map_size=MAP_SIZE) as store:
        yield store


def read(store: Store, span: SpanKey) -> bytes | None:
    content = store.content(span)
    if content is None:
        return None
    buffer = bytearray(span.size)
    return bytes(buffer) if content.read_into(memoryview(buffer), 0, wait=True) is Outcome.DONE else None


def before_lock(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """`act` happens once, after the next file to be locked was opened."""
    real = fcntl.flock

    def flock(fd: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        act()
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)


def after_open(monkeypatch: pytest.MonkeyPatch, suffix: str, act: Callable[[], object]) -> None:
    """`act` happens once, after a file of that name was opened."""
    real = os.open

    def opened(path: str | Path, flags: int, mode: int = 0o777) -> int:
        fd = real(path, flags, mode)
        if str(path).endswith(suffix):
            monkeypatch.setattr(os, "open", real)
            act()
        return fd

    monkeypatch.setattr(os, "open", opened)


def is_free(lock: Path) -> bool:
    return try_lock(open_file(lock, os.O_RDWR | os.O_CREAT))


def test_sealed_while_a_writer_waits(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write(store, "three", THREE)
    before_lock(monkeypatch, lambda: store.seal([SPAN]))
    assert store.write_chunk(SPAN, 1, chunks(THREE)[1]) is False
    assert list(store.partials()) == []
    assert read(store, SPAN) == THREE


def test_sealed_while_a_sealer_waits(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write(store, "three", THREE)
    before_lock(monkeypatch, lambda: store.seal([SPAN]))
    assert store.seal([SPAN]) == [SPAN]
    assert list(store.partials()) == []
    assert read(store, SPAN) == THREE


def test_dropped_while_a_writer_waits(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write(store, "three", THREE)
    before_lock(monkeypatch, lambda: store.drop_partial(SPAN))
    assert store.write_chunk(SPAN, 1, chunks(THREE)[1]) is False
    assert store.local_bytes([SPAN]) == CHUNK


def test_dropped_and_begun_anew_while_a_reader_opens(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_chunk(SPAN, 0, chunks(THREE)[0])

    def renew() -> None:
        store.drop_partial(SPAN)
        store.write_chunk(SPAN, 1, chunks(THREE)[1])

    after_open(monkeypatch, ".map", renew)
    content = store.content(SPAN)
    assert content is not None
    assert content.missing(0, len(THREE)) == [0, 2]
    buffer = bytearray(CHUNK)
    assert content.read_into(memoryview(buffer), CHUNK, wait=True) is Outcome.DONE
    assert buffer == chunks(THREE)[1]


def test_evicted_while_a_writer_waits(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it keeps is in a partial that is there."""
    store.write_chunk(SPAN, 0, chunks(THREE)[0])
    before_lock(monkeypatch, lambda: store.evict([SPAN]))
    assert store.write_chunk(SPAN, 1, chunks(THREE)[1]) is False
    assert store.local_bytes([SPAN]) == CHUNK
    content = store.content(SPAN)
    assert content is not None and content.missing(0, len(THREE)) == [0, 2]


def test_evicted_while_a_sealer_waits(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write(store, "three", THREE)
    before_lock(monkeypatch, lambda: store.evict([SPAN]))
    assert store.seal([SPAN]) == []
    assert read(store, SPAN) is None and not store.has(SPAN)


@pytest.mark.parametrize("suffix", [".map", ".data"])
def test_evicted_and_begun_anew_while_a_reader_opens(
    store: Store, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    store.write_chunk(SPAN, 0, chunks(THREE)[0])

    def renew() -> None:
        assert store.evict([SPAN]) == {SPAN}
        store.write_chunk(SPAN, 1, chunks(THREE)[1])

    after_open(monkeypatch, suffix, renew)
    content = store.content(SPAN)
    assert content is not None
    (here,) = {0, 1, 2} - set(content.missing(0, len(THREE)))
    buffer = bytearray(CHUNK)
    assert content.read_into(memoryview(buffer), here * CHUNK, wait=True) is Outcome.DONE
    assert buffer == chunks(THREE)[here]


def test_what_is_written_or_sealed_is_not_evicted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write(store, "three", THREE)
    with Partial.lock(store.partial_path, SPAN, create=False) or pytest.fail():
        assert store.evict([SPAN]) == set()
    real, evicted = store.blobs.publish, []

    def publish(candidates: Sequence[Candidate]) -> None:
        evicted.append(store.evict([SPAN]))
        real(candidates)
        evicted.append(store.evict([SPAN]))

    monkeypatch.setattr(store.blobs, "publish", publish)
    assert store.seal([SPAN]) == [SPAN]
    assert evicted == [set(), set()]
    assert read(store, SPAN) == THREE


def test_what_a_process_serves_from_is_not_evicted(store: Store) -> None:
    store.write_chunk(SPAN, 0, chunks(THREE)[0])
    content = store.content(SPAN)
    assert content is not None
    content.note_use()
    assert store.evict([SPAN]) == set()
    content.close()
    assert store.evict([SPAN], dry_run=True) == {SPAN} == dict(store.partials()).keys()
    assert store.evict([SPAN]) == {SPAN}
    assert list(store.partial_path.iterdir()) == []


def test_a_chunk_that_comes_is_a_use(store: Store) -> None:
    store.write_chunk(SPAN, 0, chunks(THREE)[0])
    (data,) = store.partial_path.glob("*.data")
    os.utime(data, (1e9, 1e9))
    store.write_chunk(SPAN, 1, chunks(THREE)[1])
    assert (store.last_use(SPAN) or 0) > 1e9


@pytest.mark.parametrize("suffix", [".map", ".data"])
def test_sealed_while_a_reader_opens(store: Store, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    write(store, "three", THREE)
    after_open(monkeypatch, suffix, lambda: store.seal([SPAN]))
    assert read(store, SPAN) == THREE


def test_sealed_between_the_looks_of_a_reader(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write(store, "three", THREE)
    real = store.catalog.find

    def find(span: SpanKey) -> object:
        monkeypatch.setattr(store.catalog, "find", real)
        found = real(span)
        store.seal([SPAN])
        return found

    monkeypatch.setattr(store.catalog, "find", find)
    assert read(store, SPAN) == THREE


def test_a_blob_deleted_while_a_reader_opens_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put_span(SPAN, THREE)
    path = blob_path(store, SPAN)
    after_open(monkeypatch, path.name, lambda: store.drop_span(SPAN))
    assert read(store, SPAN) == THREE
    assert store.content(SPAN) is None


def test_bytes_that_a_crash_linked_are_not_changed(store: Store) -> None:
    """Others may have come to rely on them under the other name."""
    write(store, "three", THREE)
    data = store.partial_path / (partial_name(SPAN) + ".data")
    link = store.path / "blobs" / "linked"
    os.link(data, link)
    flip(data, CHUNK)
    before = link.read_bytes()
    assert store.evict([SPAN]) == set()
    store.write_chunk(SPAN, 1, chunks(THREE)[1])
    assert link.read_bytes() == before
    assert read(store, SPAN) == THREE
    assert data.stat().st_nlink == 1


def test_names_are_given_under_their_lock(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bool] = []
    for call in ("link", "unlink"):
        real = getattr(os, call)

        def wrapped(*paths: Path, real: Callable[..., None] = real) -> None:
            if "/blobs/" in str(paths[-1]):
                held.append(not is_free(store.path / "names.lock"))
            real(*paths)

        monkeypatch.setattr(os, call, wrapped)
    store.put_span(SPAN, THREE)
    digests = [digest for digest, _, _ in store.catalog.blobs()]
    store.catalog.forget_spans([SPAN])
    store.delete_blobs(digests)
    assert len(held) >= 3 and all(held)
    assert is_free(store.path / "names.lock")


def test_a_lease_is_locked_before_it_is_seen(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[bool] = []
    after_open(monkeypatch, "/lock", lambda: held.append(not is_free(store.path / "run.lock")))
    store.lease().close()
    assert held == [True]


def test_a_repair_is_synced(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put_span(key("two", len(TWO)), TWO)
    flip(blob_path(store, key("two", len(TWO))), 0)
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    store.write_chunk(key("two", len(TWO)), 0, chunks(TWO)[0])
    assert len(synced) == 1
