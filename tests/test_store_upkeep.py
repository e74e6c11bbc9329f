"""Removing, counting, leases, quarantine, the guard of gc."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cakefs.model import SpanKey
from cakefs.store import Store
from cakefs.store.files import open_file, try_lock
from tests.store_child import MAP_SIZE, THREE, TWO, blob_path, chunks, data, key, write

ROOT = Path(__file__).parent.parent
HOLDER = """
import sys
from pathlib import Path
from cakefs.model import SpanKey
from cakefs.store import Store
lease = Store.open(Path(sys.argv[1])).lease()
lease.hold("sha256:other")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", map_size=MAP_SIZE) as store:
        yield store


def test_leases_count_and_end(store: Store) -> None:
    lease, other = store.lease(), store.lease()
    lease.hold("sha256:a")
    lease.hold("sha256:a")
    lease.hold("sha256:b")
    other.hold("sha256:b")
    assert store.leased() == {"sha256:a", "sha256:b"}
    lease.release("sha256:a")
    assert store.leased() == {"sha256:a", "sha256:b"}
    lease.release("sha256:a")
    assert store.leased() == {"sha256:b"}
    lease.close()
    assert store.leased() == {"sha256:b"}
    other.close()
    lease.close()
    assert store.leased() == set()
    assert list(store.run_path.iterdir()) == []


def test_leases_of_dead_processes_are_removed(store: Store) -> None:
    command = [sys.executable, "-c", HOLDER, str(store.path)]
    holder = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    assert store.leased() == {"sha256:other"}
    assert len(list(store.run_path.iterdir())) == 1
    holder.kill()
    holder.communicate()
    assert store.leased() == set()
    assert list(store.run_path.iterdir()) == []


def test_dropping_a_span_puts_its_blob_aside(store: Store) -> None:
    span = key("two", len(TWO))
    store.put_span(span, TWO)
    store.write_chunk(key("three", len(THREE)), 0, chunks(THREE)[0])
    store.drop_span(span)
    store.drop_span(key("three", len(THREE)))
    assert store.content(span) is None
    assert store.content(key("three", len(THREE))) is None
    assert [path.read_bytes() for path in (store.path / "quarantine").iterdir()] == [TWO]
    assert store.usage()[:3] == (0, 0, 0) and store.usage().quarantine_bytes >= len(TWO)
    store.put_span(span, TWO)
    store.sweep()
    assert list((store.path / "quarantine").iterdir()) == []
    assert store.has(span)


def test_dropping_a_span_spares_what_others_have(store: Store) -> None:
    store.put_spans([(key("a", len(TWO)), TWO), (key("b", len(TWO)), TWO), (key("c", 9), b"123456789")])
    store.drop_span(key("a", len(TWO)))
    store.drop_span(key("c", 9))
    store.drop_span(key("unknown", 9))
    assert [span for span, _ in store.catalog.listing()] == [key("b", len(TWO))]
    assert len(store.catalog.blobs()) == 1
    assert blob_path(store, key("b", len(TWO))).read_bytes() == TWO
    assert list((store.path / "quarantine").iterdir()) == []


def test_deletes_only_blobs_that_no_span_names(store: Store) -> None:
    store.put_spans([(key("a", len(TWO)), TWO), (key("b", len(THREE)), THREE), (key("c", 9), b"123456789")])
    digests = [digest for digest, _, _ in store.catalog.blobs()]
    store.catalog.forget_spans([key("b", len(THREE)), key("c", 9)])
    assert store.delete_blobs([*digests, "xxh3:00"]) == len(THREE) + 9
    assert [digest for digest, _ in store.blobs.files()] == [digest for digest, _, _ in store.catalog.blobs()]
    assert store.has(key("a", len(TWO)))
    assert store.delete_blobs([]) == 0


def test_more_blobs_are_evicted_than_can_be_open(store: Store) -> None:
    keys = [SpanKey("sha256:many", i * 10_000, (i + 1) * 10_000) for i in range(600)]
    store.put_spans([(key, i.to_bytes(4, "little") * 2500) for i, key in enumerate(keys)])
    digests = [digest for _, digest in store.catalog.listing()]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 300, limits[1]))
    try:
        for dry_run in (True, False):
            assert store.evict(digests, dry_run=dry_run) == set(digests)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert store.usage().blob_count == 0 and list(store.blobs.files()) == []


def test_what_was_found_of_files_that_no_model_has_is_forgotten(store: Store) -> None:
    store.put_span(SpanKey("sha256:here", 0, 3), b"abc")
    for identity in ("sha256:here", "sha256:named", "sha256:gone"):
        store.catalog.set_verified(identity, False, 1)
    store.put_span(SpanKey("sha256:gone", 0, 3), b"xyz")
    store.catalog.forget_spans([SpanKey("sha256:gone", 0, 3)])
    store.catalog.keep_files(["sha256:here", "sha256:named"])
    assert store.catalog.verified("sha256:here") and store.catalog.verified("sha256:named")
    assert store.catalog.verified("sha256:gone") is None
    assert [key.identity for key, _ in store.catalog.listing()] == ["sha256:here"]


def test_usage_and_partials(store: Store) -> None:
    store.put_spans([(key("a", len(TWO)), TWO), (key("c", 9), b"123456789")])
    flying = write(store, "three", THREE)
    sizes = dict(store.partials())
    assert list(sizes) == [flying]
    assert sizes[flying] >= len(THREE)
    assert store.usage() == (len(TWO) + 9, 2, sizes[flying], 0)
    store.drop_partial(flying)
    store.drop_partial(flying)
    assert list(store.partials()) == []


def test_sweep_spares_what_is_used(store: Store) -> None:
    store.put_span(key("two", len(TWO)), TWO)
    store.write_chunk(key("three", len(THREE)), 1, chunks(THREE)[1])
    assert store.sweep() == 0
    assert store.has(key("two", len(TWO)))
    assert store.local_bytes([key("three", len(THREE))]) == len(chunks(THREE)[1])


def test_sweep_forgets_records_without_a_file(store: Store) -> None:
    store.put_span(key("two", len(TWO)), TWO)
    blob_path(store, key("two", len(TWO))).unlink()
    store.sweep()
    assert store.catalog.blobs() == []


def test_sweep_removes_a_copy_of_the_catalog_that_was_not_finished(store: Store) -> None:
    unfinished = store.path / "backup/new"
    unfinished.mkdir(parents=True)
    (unfinished / "data.mdb").write_bytes(b"half of it")
    store.sweep()
    assert not unfinished.exists()


def test_sweep_removes_empty_partials(store: Store) -> None:
    store.write_chunk(key("three", len(THREE)), 1, chunks(THREE)[1])
    (map_path,) = store.partial_path.glob("*.map")
    with open(map_path, "r+b") as file:
        file.seek(-24, os.SEEK_END)
        file.write(bytes(24))
    store.sweep()
    assert list(store.partial_path.iterdir()) == []


def test_partials_of_long_identities(store: Store) -> None:
    """An ETag with its URL names a source that has nothing better."""
    span = key("https://example.org/" + "ü" * 3000, 9000)
    store.write_chunk(span, 0, data("long", 9000))
    assert [found for found, _ in store.partials()] == [span]
    assert store.seal([span]) == [span]
    assert [found for found, _ in store.catalog.listing()] == [span]


def test_guard_keeps_gc_from_those_who_add(store: Store) -> None:
    def free() -> bool:
        return try_lock(open_file(store.path / "gc.lock", os.O_RDWR))

    with store.guard(), store.guard():
        assert not free()
    assert free()
    with store.guard(exclusive=True):
        assert not free()
    assert free()
