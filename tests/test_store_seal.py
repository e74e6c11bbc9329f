"""Sealing: batches, equality proved by bytes, bad chunks, syncs."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from cakefs.errors import CorruptData
from cakefs.model import CHUNK, INLINE_LIMIT, SpanKey
from cakefs.store import Outcome, Store
from cakefs.store.hashes import DigestHasher
from tests.store_child import MAP_SIZE, THREE, TWO, blob_path, chunks, data, flip, key, write


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", map_size=MAP_SIZE) as store:
        yield store


@pytest.fixture
def colliding(monkeypatch: pytest.MonkeyPatch) -> str:
    """Every blob has this digest."""
    digest = "xxh3:" + "ab" * 16
    monkeypatch.setattr(DigestHasher, "digest", lambda self: digest)
    return digest


def read(store: Store, span: SpanKey) -> bytes | None:
    content = store.content(span)
    if content is None:
        return None
    buffer = bytearray(span.size)
    return bytes(buffer) if content.read_into(memoryview(buffer), 0, wait=True) is Outcome.DONE else None


def digest(store: Store, span: SpanKey) -> str | None:
    record = store.catalog.find(span)
    return record and record.digest


def test_seal_is_idempotent_and_takes_the_complete_ones(store: Store) -> None:
    done = write(store, "two", TWO)
    flying = key("three", len(THREE))
    store.write_chunk(flying, 0, chunks(THREE)[0])
    unknown = key("unknown", 10_000)
    assert store.seal([flying, done, unknown, done]) == [done]
    assert store.seal([done, flying]) == [done]
    assert [span for span, _ in store.partials()] == [flying]
    path = blob_path(store, done)
    assert path.read_bytes() == TWO
    assert path.stat().st_mode & 0o777 == 0o444
    assert path.stat().st_nlink == 1
    assert path.parent.name == path.name[:2]


def test_equal_bytes_are_one_blob(store: Store) -> None:
    spans = [write(store, name, TWO) for name in ("a", "b")]
    assert sorted(store.seal(spans)) == sorted(spans)
    store.put_span(key("c", len(TWO)), TWO)
    assert {digest(store, key(name, len(TWO))) for name in "abc"} == {digest(store, spans[0])}
    assert len(list(store.blobs.files())) == 1
    assert store.usage()[:2] == (len(TWO), 1)
    assert store.local_bytes([*spans, *spans]) == 2 * len(TWO)


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("sizes", [(9000, 9000, 9000, CHUNK + 1), (600, 600, 600, 601), (600, 9000, 600, 9000)])
def test_equal_digests_of_unequal_bytes(store: Store, colliding: str, batch: bool, sizes: tuple[int, ...]) -> None:
    contents = {f"n{i}": data(f"n{i}", size) for i, size in enumerate(sizes)}
    contents |= {f"again{i}": contents[f"n{i}"] for i in range(len(sizes))}
    items = [(key(name, len(content)), content) for name, content in contents.items()]
    for group in [items] if batch else [[item] for item in items]:
        store.put_spans(group)
    digests = {name: digest(store, key(name, len(content))) for name, content in contents.items()}
    assert {digests[f"n{i}"] for i in range(4)} == {colliding, *(f"{colliding}-{n}" for n in (1, 2, 3))}
    for name, content in contents.items():
        assert read(store, key(name, len(content))) == content
        assert digests[name] == digests[name.replace("again", "n")]
    assert len(store.catalog.blobs()) == 4


def test_a_digest_can_be_used_again_for_other_bytes(store: Store, colliding: str) -> None:
    first, second = key("first", 9000), key("second", 9000)
    store.put_span(first, data("first", 9000))
    store.catalog.drop_blobs([colliding])
    store.put_span(second, data("second", 9000))
    assert digest(store, second) == colliding
    assert read(store, second) == data("second", 9000)
    assert store.content(first) is None, "the old span must not find the new bytes"


def test_rotten_twin_does_not_cost_the_good_bytes(store: Store) -> None:
    first, second = key("first", len(TWO)), key("second", len(TWO))
    store.put_span(first, TWO)
    flip(blob_path(store, first), 77)
    store.put_span(second, TWO)
    assert read(store, first) is None
    assert read(store, second) == TWO
    assert digest(store, second) == f"{digest(store, first)}-1"


def test_a_file_without_a_record_is_nobodys(store: Store) -> None:
    """What a crash between link and commit leaves."""
    span = key("two", len(TWO))
    store.put_span(span, TWO)
    path = blob_path(store, span)
    store.catalog.drop_blobs([str(digest(store, span))])
    flip(path, 0)
    store.put_span(span, TWO)
    assert blob_path(store, span) == path
    assert read(store, span) == TWO


def test_a_bad_chunk_is_fetched_again_before_sealing(store: Store) -> None:
    bad, good = write(store, "three", THREE), write(store, "two", TWO)
    for path in store.partial_path.glob("*.data"):
        if path.stat().st_size == len(THREE):
            flip(path, CHUNK)
    assert store.seal([bad, good]) == [good]
    content = store.content(bad)
    assert content is not None
    assert content.missing(0, len(THREE)) == [1]
    assert store.write_chunk(bad, 1, chunks(THREE)[1]) is True
    assert store.seal([bad]) == [bad]
    assert read(store, bad) == THREE


def test_small_spans_go_into_the_catalog(store: Store) -> None:
    for size, inline in ((1, True), (INLINE_LIMIT, True), (INLINE_LIMIT + 1, False)):
        span = write(store, f"of {size}", data(str(size), size))
        assert store.seal([span]) == [span]
        record = store.catalog.find(span)
        assert record is not None and (record.inline is not None) is inline
        assert read(store, span) == data(str(size), size)
    assert len(list(store.blobs.files())) == 1
    assert list(store.partial_path.iterdir()) == []


def test_many_spans_share_their_syncs(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    spans = [write(store, f"s{i}", data(f"s{i}", 5000)) for i in range(60)]
    copies = [write(store, f"copy{i}", data(f"s{i}", 5000)) for i in range(60)]
    calls: Counter[str] = Counter()
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd, name=name: calls.update([name]))
    assert len(store.seal(spans)) == 60
    directories = {path.parent for _, path in store.blobs.files()}
    assert calls == {"fdatasync": 60, "fsync": len(directories) + 1}
    calls.clear()
    assert len(store.seal(copies)) == 60
    assert not calls, "bytes that are dropped are not worth a sync"


def test_more_spans_than_descriptors(store: Store) -> None:
    spans = [write(store, f"s{i}", data(f"s{i}", 5000)) for i in range(300)]
    before = len(os.listdir("/proc/self/fd"))
    assert len(store.seal(spans)) == 300
    assert len(os.listdir("/proc/self/fd")) <= before  # fewer where something of an earlier test was let go meanwhile
    assert all(map(store.has, spans))


@pytest.mark.parametrize("size", [1, 900, 5000, 3 * CHUNK + 1])
def test_literals(store: Store, size: int) -> None:
    content = data("literal", size)
    name = store.put_literal(content)
    assert store.put_literal(content) == name
    assert store.literal(name) == content
    assert [span.identity.partition(":")[0] for span, _ in store.catalog.listing()] == ["literal"]


def test_a_damaged_literal_is_refused(store: Store) -> None:
    name = store.put_literal(TWO)
    flip(store.blobs.path(name), 9)
    with pytest.raises(CorruptData):
        store.literal(name)
    with pytest.raises(CorruptData):
        store.literal("xxh3:" + "0" * 32)


def test_wrong_sizes_are_refused(store: Store) -> None:
    span = key("two", len(TWO))
    for chunk, content in ((0, b"x"), (1, TWO[:CHUNK]), (2, b""), (-1, TWO[:CHUNK])):
        with pytest.raises(ValueError):
            store.write_chunk(span, chunk, content)
    for content in (b"", TWO + b"x", TWO[1:]):
        with pytest.raises(ValueError):
            store.put_span(span, content)
    assert store.content(span) is None
