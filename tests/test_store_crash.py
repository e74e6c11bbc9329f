"""Killed at every step, and many processes at once: the store is always old or new, and loses nothing."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cakefs.model import CHUNK, SpanKey
from cakefs.store import Outcome, Store
from tests import store_child as child
from tests.store_child import MAP_SIZE, PUT, SMALL, THREE, TWO, chunks, key

ROOT = Path(__file__).parent.parent


def spawn(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.store_child", *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def survivors(scenario: str, directory: Path) -> Iterator[Store]:
    """The stores that each kill of a scenario left, and last the one of the run that was not killed."""
    process = spawn("kill", scenario, directory)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    runs = int(output)
    assert runs > 2, "the killer never met an event"
    for step in range(1, runs + 1):
        with Store.open(directory / str(step), map_size=MAP_SIZE) as store:
            yield store


def read(store: Store, span: SpanKey) -> bytes | None:
    """All of a span; None when any of it is missing."""
    content = store.content(span)
    if content is None:
        return None
    buffer = bytearray(span.size)
    return bytes(buffer) if content.read_into(memoryview(buffer), 0, wait=True) is Outcome.DONE else None


def absent(store: Store, span: SpanKey, truth: bytes) -> list[int]:
    """The chunks that are not served; those that are must be right."""
    content = store.content(span)
    if content is None:
        return list(range(len(chunks(truth))))
    for i, chunk in enumerate(chunks(truth)):
        buffer = bytearray(len(chunk))
        outcome = content.read_into(memoryview(buffer), i * CHUNK, wait=True)
        assert outcome is Outcome.MISSING or (outcome is Outcome.DONE and buffer == chunk)
    return content.missing(0, span.size)


def assert_clean(store: Store) -> None:
    """After what gc does there is nothing on disk that the catalog does not know, and no sealed span in flight."""
    store.delete_blobs([digest for digest, _, _ in store.catalog.blobs()])
    store.sweep()
    assert {digest for digest, _ in store.blobs.files()} == {d for d, _, inline in store.catalog.blobs() if not inline}
    flying = {name.split(".")[0] for name in os.listdir(store.partial_path)}
    assert len(flying) == len(dict(store.partials()))
    assert not any(store.has(span) for span, _ in store.partials())
    assert not store.catalog.unreferenced([digest for digest, _, _ in store.catalog.blobs()])
    assert os.listdir(store.path / "quarantine") == []


def finish(store: Store, spans: dict[str, bytes]) -> None:
    """What a new process does after the crash: write what is missing, seal; then everything must be there."""
    for name, truth in spans.items():
        span = key(name, len(truth))
        for i in absent(store, span, truth):
            store.write_chunk(span, i, chunks(truth)[i])
        assert read(store, span) == truth
    store.seal(key(name, len(truth)) for name, truth in spans.items())
    assert_clean(store)
    for name, truth in spans.items():
        assert store.has(key(name, len(truth)))
        assert read(store, key(name, len(truth))) == truth
    assert not dict(store.partials()).keys() & {key(name, len(truth)) for name, truth in spans.items()}


def test_killed_while_writing_chunks(tmp_path: Path) -> None:
    span = key("three", len(THREE))
    for store in survivors("write", tmp_path):
        assert 0 not in absent(store, span, THREE), "a completed chunk was lost"
        finish(store, {"three": THREE})


def test_killed_while_sealing_loses_no_chunk(tmp_path: Path) -> None:
    spans = {"old": TWO, "same": TWO, "new": THREE, "twin": THREE, "small": SMALL}
    for store in survivors("seal", tmp_path):
        for name, truth in spans.items():
            assert read(store, key(name, len(truth))) == truth
        store.sweep()
        for name, truth in spans.items():
            assert read(store, key(name, len(truth))) == truth
        finish(store, spans)
        assert len(store.catalog.blobs()) == 3


def test_killed_while_putting_whole_spans(tmp_path: Path) -> None:
    for store in survivors("put", tmp_path):
        finish(store, dict(PUT))


def test_killed_while_repairing_a_blob(tmp_path: Path) -> None:
    for store in survivors("repair", tmp_path):
        finish(store, {"three": THREE})


def test_killed_while_rewriting_what_a_crash_linked(tmp_path: Path) -> None:
    for store in survivors("unshare", tmp_path):
        finish(store, {"three": THREE})


def test_killed_while_removing(tmp_path: Path) -> None:
    for store in survivors("remove", tmp_path):
        assert read(store, key("kept", len(TWO))) == TWO
        dropped = child.data("dropped", len(TWO))
        for name, truth in (("shared", TWO), ("dropped", dropped), ("flying", THREE), ("evicted", THREE)):
            assert read(store, key(name, len(truth))) in (None, truth)
        assert_clean(store)
        assert read(store, key("kept", len(TWO))) == TWO


def test_killed_while_sweeping(tmp_path: Path) -> None:
    for store in survivors("sweep", tmp_path):
        finish(store, {"three": THREE})


def test_killed_while_creating_the_store(tmp_path: Path) -> None:
    for store in survivors("create", tmp_path):
        finish(store, {"three": THREE})


@pytest.mark.parametrize("evictions", [0, 100])
def test_processes_write_and_seal_the_same_spans(tmp_path: Path, evictions: int) -> None:
    with Store.open(tmp_path / "store", map_size=MAP_SIZE) as store:
        others = [spawn("race", store.path, seed) for seed in (1, 2, 3)]
        for process in others:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for process in others:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        evicted = 0
        while any(process.poll() is None for process in others):
            for name, truth in child.RACE.items():
                absent(store, key(name, len(truth)), truth)
                evicted += len(store.evict([key(name, len(truth))])) if evicted < evictions else 0
        for process in others:
            again, _ = process.communicate()
            assert process.returncode == 0
            assert evictions or int(again) == 0, "something was lost"
        for name, truth in child.RACE.items():
            assert store.has(key(name, len(truth)))
            assert read(store, key(name, len(truth))) == truth
        assert len(store.catalog.blobs()) == len(set(child.RACE.values()))
        assert list(store.partials()) == []
        assert_clean(store)


@pytest.mark.parametrize("suffix", [".map", ".data"])
def test_half_of_a_partial_is_no_partial(tmp_path: Path, suffix: str) -> None:
    """As a power cut may leave it: one of two files that were never synced."""
    with Store.open(tmp_path / "store", map_size=MAP_SIZE) as store:
        span = child.write(store, "three", THREE)
        (file,) = store.partial_path.glob(f"*{suffix}")
        file.unlink()
        assert read(store, span) is None
        assert store.local_bytes([span]) == 0
        finish(store, {"three": THREE})


@pytest.mark.parametrize("size", [0, 7, 60])
def test_a_map_cut_short_says_nothing(tmp_path: Path, size: int) -> None:
    with Store.open(tmp_path / "store", map_size=MAP_SIZE) as store:
        span = child.write(store, "three", THREE)
        content = store.content(span)
        assert content is not None
        (map_path,) = store.partial_path.glob("*.map")
        os.truncate(map_path, size)
        assert content.missing(0, span.size) == [0, 1, 2]
        assert read(store, span) is None
        finish(store, {"three": THREE})


def test_sweep_removes_what_has_no_whole_map(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store", map_size=MAP_SIZE) as store:
        span = child.write(store, "three", THREE)
        child.write(store, "two", TWO)
        (store.partial_path / ("0" * 32 + ".data")).write_bytes(b"x" * 5000)
        (store.partial_path / ("1" * 32 + ".map")).write_bytes(b"")
        (store.partial_path / ("2" * 32 + ".map")).write_bytes(next(store.partial_path.glob("*.map")).read_bytes())
        assert store.sweep() > 0
        assert len(list(store.partial_path.iterdir())) == 4
        assert read(store, span) == THREE
