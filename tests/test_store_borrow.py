"""Borrowed blobs, through the store: bytes in files of somebody else, at any offset, given up before they are wrong."""

import errno
import os
import random
import threading
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cakefs.buffers import page_aligned
from cakefs.errors import CakeError, CorruptData
from cakefs.model import CHUNK, INLINE_LIMIT, ByteRange, SpanKey
from cakefs.store.borrowing import Borrowing
from cakefs.store.content import Content, Outcome
from cakefs.store.foreign import SETTLED_S, stamp_of
from cakefs.store.hashes import DigestHasher, chunk_count, chunk_sum
from cakefs.store.scan import Piece, identities_of, scan
from cakefs.store.store import Store

NAME = "sha256:" + "0" * 64


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store") as opened:
        yield opened


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def lend(store: Store, path: Path, *ranges: tuple[int, int], name: str = NAME) -> list[SpanKey]:
    """Borrows ranges of a file, as adoption does."""
    done = scan(stamp_of(path), [ByteRange(*r) for r in ranges], ["sha256"], lambda size: None)
    assert done is not None
    Borrowing(store).borrow([(name, done)])
    return [SpanKey(name, *r) for r in ranges]


def read(content: Content | None, start: int = 0, stop: int | None = None) -> bytes | Outcome:
    assert content is not None
    buffer = memoryview(bytearray((content.size if stop is None else stop) - start))
    outcome = content.read_into(buffer, start, wait=True)
    return bytes(buffer) if outcome is Outcome.DONE else outcome


def test_spans_at_odd_offsets(store: Store, tmp_path: Path) -> None:
    data = noise(4 * CHUNK + 333)
    (tmp_path / "file").write_bytes(data)
    ranges = [(0, 5000), (5000, 3 * CHUNK + 17), (3 * CHUNK + 17, 3 * CHUNK + 50), (3 * CHUNK + 50, len(data))]
    for key in lend(store, tmp_path / "file", *ranges):
        content = store.content(key)
        assert content is not None and content.complete and content.missing(0, key.size) == []
        assert read(content) == data[key.start : key.stop]
        half = key.size // 2
        assert (
            read(store.content(key), half, min(key.size, half + 100_000))
            == data[key.start :][half:][:100_000][: key.size - half]
        )
    assert list(store.blobs.files()) == [] and store.usage().blob_bytes == 33, "only the 33 bytes are our own"
    assert Borrowing(store).bytes() == len(data) - 33


@pytest.mark.parametrize("start", [0, 1, 4095, 4096, 5000])
def test_reads_past_the_cache_at_odd_offsets(store: Store, tmp_path: Path, start: int) -> None:
    data = noise(3 * CHUNK + 333)
    (tmp_path / "file").write_bytes(data)
    (key,) = lend(store, tmp_path / "file", (start, len(data)))
    content = store.content(key)
    assert content is not None and content.aligned is (start % 4096 == 0)
    for first, last in ((0, 3), (1, 2), (2, chunk_count(key.size))):
        buffer = page_aligned((last - first + (not content.aligned)) * CHUNK)
        assert content.read_direct(buffer, first, last) == data[start:][first * CHUNK : last * CHUNK]
    rewritten(tmp_path / "file")
    assert content.read_direct(page_aligned(2 * CHUNK), 0, 1) is None


@settings(max_examples=40)
@given(
    st.integers(1, 3 * CHUNK),
    st.lists(st.tuples(st.integers(0, 3 * CHUNK), st.integers(0, 3 * CHUNK)), max_size=6),
    st.integers(),
)
def test_a_scan_gives_what_sealing_gives(
    tmp_path_factory: pytest.TempPathFactory, size: int, cuts: list[tuple[int, int]], seed: int
) -> None:
    """Ranges in any order, that overlap or leave gaps."""
    data = noise(size, seed)
    path = tmp_path_factory.mktemp("scan") / "file"
    path.write_bytes(data)
    os.utime(path, (1, 1))
    ranges = {ByteRange(min(pair) % size, max(pair) % size + 1) for pair in cuts}
    ranges = {r for r in ranges if r.start < r.stop}
    counted: list[int] = []
    done = scan(stamp_of(path), ranges, ["sha256", "git"], counted.append)
    assert done is not None and sum(counted) == size
    assert sorted(done.identities) == sorted(identities_of(data))
    assert {piece.range for piece in done.pieces} == ranges
    for piece in done.pieces:
        part = data[piece.range.start : piece.range.stop]
        hasher = DigestHasher()
        hasher.update(part)
        sums = array("Q", [chunk_sum(part[at : at + CHUNK]) for at in range(0, len(part), CHUNK)])
        assert piece == Piece(piece.range, hasher.digest(), sums.tobytes())


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def rewritten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[::-1])


def replaced(path: Path) -> None:
    status = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, path)


def made_a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


CHANGES = [Path.unlink, truncated, rewritten, replaced, made_a_fifo, os.utime]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_given_up(store: Store, tmp_path: Path, change: Callable[[Path], None]) -> None:
    data, path = noise(3 * CHUNK), tmp_path / "file"
    path.write_bytes(data)
    first, second = lend(store, path, (100, CHUNK + 100), (CHUNK + 100, 3 * CHUNK))
    opened = store.content(first)
    assert read(opened) == data[100 : CHUNK + 100]
    change(path)
    assert read(opened) is Outcome.MISSING and opened is not None
    assert opened.gone and not opened.complete and opened.missing(0, first.size) == [0]
    assert store.content(first) is None and not store.has(first)
    assert not store.has(second), "nothing is believed of a file of which one span is gone"
    assert store.catalog.borrowed.files() == [] and store.catalog.blobs() == []
    assert store.write_chunk(first, 0, data[100 : CHUNK + 100]), "and it can come from elsewhere"
    assert read(store.content(first)) == data[100 : CHUNK + 100]


def test_what_changes_in_the_middle_of_a_read_is_not_handed_out(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, path = noise(2 * CHUNK), tmp_path / "file"
    path.write_bytes(data)
    (key,) = lend(store, path, (0, 2 * CHUNK))
    content = store.content(key)
    assert read(content) == data
    genuine = os.preadv

    def preadv(*arguments: object) -> int:
        with path.open("r+b") as file:
            file.write(b"other bytes")
        return genuine(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", preadv)
    assert read(content, 0, 4096) is Outcome.MISSING


def test_a_race_with_whoever_writes(store: Store, tmp_path: Path) -> None:
    """Somebody writes at an unknown moment of many reads: every read that gives bytes gives the right ones."""
    data, dice = noise(2 * CHUNK), random.Random(5)
    for turn in range(30):
        path = tmp_path / f"file{turn}"
        path.write_bytes(data)
        os.utime(path, (1, 1))
        (key,) = lend(store, path, (0, len(data)), name=f"x:{turn}")
        content, begun = store.content(key), threading.Event()
        assert read(content) == data

        def write(path: Path = path, begun: threading.Event = begun) -> None:
            begun.wait()
            with path.open("r+b", buffering=0) as file:
                for at in range(0, len(data), 4096):
                    os.pwrite(file.fileno(), b"other", at)

        writer = threading.Thread(target=write)
        writer.start()
        begun.set()
        while True:
            start = dice.randrange(0, len(data) - 65_536)
            got = read(content, start, start + 65_536)
            if got is Outcome.MISSING:
                break
            assert got == data[start : start + 65_536]
        writer.join()
        assert store.content(key) is None


def test_all_that_a_file_lent_is_looked_at_at_once(store: Store, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for seed, path in enumerate(paths):
        path.write_bytes(noise(10_000, seed))
        lend(store, path, (0, 5000), (5000, 10_000), name=f"x:{path.name}")
    assert Borrowing(store).forget_lost() == []
    paths[0].unlink()
    os.utime(paths[1])
    lost = Borrowing(store).forget_lost()
    assert [Path(str(stamp)) for stamp in lost] == paths[:2]
    assert {key.identity for key, _ in store.catalog.listing()} == {"x:c"}
    assert Borrowing(store).bytes() == 10_000


def test_a_disk_that_is_away_for_a_while_loses_nothing(store: Store, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(noise(10_000))
    (key,) = lend(store, tmp_path / "a" / "file", (0, 10_000), name="x:a")
    lend(store, tmp_path / "b" / "file", (0, 10_000), name="x:b")
    (tmp_path / "a").rename(tmp_path / "elsewhere")
    assert Borrowing(store).lost() == set(), "it is in another file as well"
    (tmp_path / "b" / "file").unlink()
    assert len(Borrowing(store).lost()) == 1
    (tmp_path / "elsewhere").rename(tmp_path / "a")
    assert read(store.content(key)) == noise(10_000)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_file_that_cannot_be_read_now_is_not_forgotten(
    store: Store, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data, path = noise(2 * CHUNK), tmp_path / "file"
    path.write_bytes(data)
    (key,) = lend(store, path, (0, 2 * CHUNK))
    with monkeypatch.context() as broken:
        refuse(broken, path, number)
        assert store.content(key) is None and Borrowing(store).forget_gone() == []
        assert {r.getMessage() for r in caplog.records} == {f"{path} cannot be read: what is needed of it is fetched"}
        assert len(Borrowing(store).lost()) == 1
        assert not store.write_chunk(key, 0, data[:CHUNK])
        assert read(store.content(key), 0, CHUNK) == data[:CHUNK], "what comes from elsewhere is served"
    assert read(store.content(key)) == data
    assert store.write_chunk(key, 1, data[CHUNK:]) is False, "nothing is missing"


def test_too_few_descriptors_are_no_fault_of_a_file(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(noise(CHUNK))
    (key,) = lend(store, path, (0, CHUNK))
    with monkeypatch.context() as broken:
        refuse(broken, path, errno.EMFILE)
        with pytest.raises(CakeError, match="Too many open files"):
            store.content(key)
    assert read(store.content(key)) == noise(CHUNK)


def refuse(patch: pytest.MonkeyPatch, path: Path, number: int) -> None:
    """The file can neither be opened nor looked at."""

    def instead(genuine: Callable[..., object]) -> Callable[..., object]:
        def call(name: object, *arguments: object, **named: object) -> object:
            if isinstance(name, (str, bytes, os.PathLike)) and os.fsdecode(name) == str(path):
                raise OSError(number, os.strerror(number))
            return genuine(name, *arguments, **named)

        return call

    patch.setattr(os, "open", instead(os.open))
    patch.setattr(os, "stat", instead(os.stat))


def test_bytes_that_are_ours_are_not_borrowed(store: Store, tmp_path: Path) -> None:
    data = noise(2 * CHUNK)
    store.put_span(SpanKey("x:other", 0, len(data)), data)
    (tmp_path / "file").write_bytes(b"head" + data)
    (key,) = lend(store, tmp_path / "file", (4, 4 + len(data)))
    assert Borrowing(store).bytes() == 0
    (tmp_path / "file").unlink()
    assert read(store.content(key)) == data


def test_wrong_bytes_that_came_earlier_are_put_right(store: Store, tmp_path: Path) -> None:
    """What was scanned is part of a file whose hash is known; what was fetched was not confirmed yet."""
    data, tiny = noise(CHUNK), noise(99, 1)
    store.put_span(SpanKey(NAME, 0, CHUNK), data[::-1])
    store.put_span(SpanKey(NAME, CHUNK, CHUNK + 99), tiny[::-1])
    (tmp_path / "file").write_bytes(data + tiny)
    keys = lend(store, tmp_path / "file", (0, CHUNK), (CHUNK, CHUNK + 99))
    assert [read(store.content(key)) for key in keys] == [data, tiny]


def test_equal_bytes_that_come_later_take_no_room(store: Store, tmp_path: Path) -> None:
    data = noise(2 * CHUNK)
    (tmp_path / "file").write_bytes(b"head" + data)
    (key,) = lend(store, tmp_path / "file", (4, 4 + len(data)))
    other = SpanKey("x:other", 0, len(data))
    store.put_span(other, data)
    assert list(store.blobs.files()) == [] and not any((store.path / "partial").iterdir())
    assert Borrowing(store).bytes() == len(data) and read(store.content(other)) == data
    (tmp_path / "file").unlink()
    assert len(Borrowing(store).forget_lost()) == 1
    assert not store.has(key) and not store.has(other), "both are fetched again"
    store.put_span(other, data)
    assert read(store.content(other)) == data and Borrowing(store).bytes() == 0


def test_equal_digests_of_unequal_bytes_in_files(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the digest does not tell two files apart, their bytes do."""
    monkeypatch.setattr("cakefs.store.hashes.DigestHasher.digest", lambda self: "xxh3:" + "0" * 32)
    keys: list[SpanKey] = []
    for seed in (1, 2, 1):
        path = tmp_path / f"{seed}-{len(keys)}"
        path.write_bytes(noise(CHUNK + 5, seed))
        keys += lend(store, path, (0, CHUNK + 5), name=f"x:{len(keys)}")
    assert [read(store.content(key)) for key in keys] == [noise(CHUNK + 5, seed) for seed in (1, 2, 1)]
    assert len(store.catalog.blobs()) == 2


def test_a_blob_in_two_files(store: Store, tmp_path: Path) -> None:
    data = noise(CHUNK)
    keys = []
    for name in "ab":
        (tmp_path / name).write_bytes(data)
        keys += lend(store, tmp_path / name, (0, CHUNK), name=f"x:{name}")
    (tmp_path / "a").unlink()
    assert [read(store.content(key)) for key in keys] == [data, data]
    (tmp_path / "b").unlink()
    assert [store.content(key) for key in keys] == [None, None]


def test_the_users_file_is_never_mended(store: Store, tmp_path: Path) -> None:
    """One chunk rots, with nothing else to tell it."""
    data, path = noise(3 * CHUNK), tmp_path / "file"
    path.write_bytes(data)
    (key,) = lend(store, path, (0, len(data)))
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(CHUNK + 5)
        file.write(b"rot")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    rotten = path.read_bytes()
    content = store.content(key)
    assert read(content, 0, CHUNK) == data[:CHUNK]
    assert read(content) is Outcome.MISSING and content is not None and content.missing(0, key.size) == [1]
    store.write_chunk(key, 0, data[:CHUNK])
    assert store.has(key), "a chunk that is right changes nothing"
    with pytest.raises(CorruptData):
        store.write_chunk(key, 1, bytes(CHUNK))
    store.write_chunk(key, 1, data[CHUNK : 2 * CHUNK])
    assert not store.has(key) and path.read_bytes() == rotten
    for chunk in range(3):
        store.write_chunk(key, chunk, data[chunk * CHUNK :][:CHUNK])
    assert store.seal([key]) == [key] and read(store.content(key)) == data and path.read_bytes() == rotten


def test_owning_copies_and_lets_the_file_go(store: Store, tmp_path: Path) -> None:
    data = noise(2 * CHUNK + 77)
    (tmp_path / "file").write_bytes(data)
    keys = lend(store, tmp_path / "file", (0, 10), (10, CHUNK), (CHUNK, len(data)))
    assert Borrowing(store).own(keys) == len(data) - 10
    assert Borrowing(store).own(keys) == 0
    assert Borrowing(store).bytes() == 0 and store.usage() == (len(data), 3, 0, 0)
    (tmp_path / "file").unlink()
    assert b"".join(read(store.content(key)) for key in keys) == data  # type: ignore[misc]


def test_owning_what_is_rotten_takes_nothing(store: Store, tmp_path: Path) -> None:
    data, path = noise(2 * CHUNK), tmp_path / "file"
    path.write_bytes(data)
    (key,) = lend(store, path, (0, len(data)))
    status = path.stat()
    with path.open("r+b") as file:
        file.write(b"rot")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    Borrowing(store).own([key])
    assert list(store.blobs.files()) == []


def test_removing_and_sweeping_touch_no_file_of_others(store: Store, tmp_path: Path) -> None:
    data, path = noise(2 * CHUNK), tmp_path / "file"
    path.write_bytes(data)
    lent = lend(store, path, (0, CHUNK), (CHUNK, 2 * CHUNK))
    store.drop_span(lent[0])
    store.catalog.forget_spans(lent[1:])
    assert store.delete_blobs([digest for digest, _, _ in store.catalog.blobs()]) == 0
    assert store.sweep() == 0 and store.catalog.borrowed.digests() == set()
    again = lend(store, path, (0, CHUNK), (CHUNK, 2 * CHUNK))
    assert store.sweep() == 0 and all(map(store.has, again)), "a blob without a file of its own is no debris"
    assert path.read_bytes() == data


def test_a_file_that_changes_while_it_is_read_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(noise(6 * CHUNK))
    stamp = stamp_of(path)
    assert scan(stamp, [], ["sha256"], lambda size: os.utime(path)) is None
    assert scan(stamp, [], ["sha256"], lambda size: None) is None


def test_a_stamp_is_of_a_clock_that_has_moved_on(tmp_path: Path) -> None:
    """A change in the same tick of the file system's clock could not be told."""
    path = tmp_path / "file"
    path.write_bytes(b"bytes")
    changed = path.stat().st_mtime
    stamp_of(path)
    (tmp_path / "later").touch()
    assert (tmp_path / "later").stat().st_mtime - changed > SETTLED_S / 2


def test_what_a_file_was_found_to_be_is_remembered(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(noise(INLINE_LIMIT))
    stamp = stamp_of(path)
    assert store.catalog.borrowed.identities(stamp) == ()
    store.catalog.borrowed.note([(stamp, ["git:1"])])
    store.catalog.borrowed.note([(stamp, ["sha256:2"])])
    assert store.catalog.borrowed.identities(stamp) == ("git:1", "sha256:2")
    os.utime(path)
    assert store.catalog.borrowed.identities(stamp_of(path)) == ()
