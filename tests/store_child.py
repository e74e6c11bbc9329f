"""Processes that share a store with the tests and die in it.

`store_child.py kill SCENARIO DIRECTORY` runs the scenario once per *step*: a store is prepared under
`DIRECTORY/<step>`, and the step-th event of what then changes it (before each system call and each catalog commit, and
in the middle of each write) is SIGKILL. The first run that gets through ends the series; stdout has the number of runs.
Each run is a fork of this process, which itself never opens a store.

`store_child.py race DIRECTORY SEED` waits for a line on stdin, then writes and seals the spans of `RACE` in an order of
its own, beside other processes that do the same. Where others evict it begins again; stdout has the number of times.
"""

import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cakefs.model import CHUNK, SpanKey
from cakefs.store import Store
from cakefs.store.environment import Environment
from cakefs.store.partial import partial_name

# Every call by which the store changes something on disk, apart from LMDB.
CALLS = ("pwrite", "link", "unlink", "replace", "mkdir", "chmod", "ftruncate", "fchmod")
SYNCS = ("fdatasync", "fsync")
MAP_SIZE = 1 << 22  # of the small catalogs here


def data(name: str, size: int) -> bytes:
    return random.Random(name).randbytes(size)


def key(name: str, size: int) -> SpanKey:
    return SpanKey(f"sha256:{name}", 8, 8 + size)


def chunks(content: bytes) -> list[bytes]:
    return [content[i : i + CHUNK] for i in range(0, len(content), CHUNK)]


def write(store: Store, name: str, content: bytes) -> SpanKey:
    """All chunks of a span, unsealed."""
    span = key(name, len(content))
    for i, chunk in enumerate(chunks(content)):
        store.write_chunk(span, i, chunk)
    return span


# Scenarios: prepare() fills a store before the killing starts, act() is what dies.

TWO = data("two", CHUNK + 700)
THREE = data("three", 2 * CHUNK + 5)
SMALL = data("small", 900)
PUT = [("small", SMALL), ("tiny", b"x"), ("large", TWO)]


def flip(path: Path, offset: int) -> None:
    os.chmod(path, 0o600)
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def blob_path(store: Store, span: SpanKey) -> Path:
    record = store.catalog.find(span)
    assert record is not None
    return store.blobs.path(record.digest)


def prepare_write(store: Store) -> None:
    store.write_chunk(key("three", len(THREE)), 0, chunks(THREE)[0])


def act_write(store: Store) -> None:
    for i in (1, 2):
        store.write_chunk(key("three", len(THREE)), i, chunks(THREE)[i])


def prepare_seal(store: Store) -> None:
    write(store, "old", TWO)
    store.seal([key("old", len(TWO))])
    for name, content in (("same", TWO), ("new", THREE), ("twin", THREE), ("small", SMALL)):
        write(store, name, content)


def act_seal(store: Store) -> None:
    store.seal([key("same", len(TWO)), key("new", len(THREE)), key("twin", len(THREE)), key("small", len(SMALL))])


def act_put(store: Store) -> None:
    store.put_spans([(key(name, len(content)), content) for name, content in PUT])


def prepare_repair(store: Store) -> None:
    store.put_span(key("three", len(THREE)), THREE)
    flip(blob_path(store, key("three", len(THREE))), CHUNK + 9)


def act_repair(store: Store) -> None:
    store.write_chunk(key("three", len(THREE)), 1, chunks(THREE)[1])


def prepare_unshare(store: Store) -> None:
    """A crash between link and commit, and then a chunk that rots."""
    span = write(store, "three", THREE)
    path = store.partial_path / (partial_name(span) + ".data")
    (store.path / "blobs" / "00").mkdir()
    os.link(path, store.path / "blobs" / "00" / ("00" * 16))
    flip(path, CHUNK + 9)


def prepare_remove(store: Store) -> None:
    for name in ("kept", "dropped", "shared", "deleted"):
        store.put_span(key(name, len(TWO)), TWO if name in ("kept", "shared") else data(name, len(TWO)))
    write(store, "flying", THREE)
    write(store, "evicted", THREE)
    store.catalog.forget_spans([key("deleted", len(TWO))])


def act_remove(store: Store) -> None:
    for name in ("dropped", "shared"):
        store.drop_span(key(name, len(TWO)))
    store.drop_partial(key("flying", len(THREE)))
    store.evict([key("evicted", len(THREE))])
    store.delete_blobs([digest for digest, _, _ in store.catalog.blobs()])


def prepare_sweep(store: Store) -> None:
    prepare_unshare(store)
    prepare_remove(store)
    store.drop_span(key("dropped", len(TWO)))
    (store.partial_path / ("0" * 32 + ".data")).write_bytes(b"data without a map")
    (store.run_path / "dead").mkdir()


def nothing(store: Store) -> None:
    pass


SCENARIOS: dict[str, tuple[Callable[[Store], None], Callable[[Store], object]]] = {
    "write": (prepare_write, act_write),
    "seal": (prepare_seal, act_seal),
    "put": (nothing, act_put),
    "repair": (prepare_repair, act_repair),
    "unshare": (prepare_unshare, act_repair),
    "remove": (prepare_remove, act_remove),
    "sweep": (prepare_sweep, Store.sweep),
}


class Killer:
    """Counts events, and ends the process at one of them."""

    def __init__(self, step: int) -> None:
        self._left = step
        self._lock = threading.Lock()

    def event(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            self.event()
            if call is real_pwrite and len(args[1]) > 1:
                real_pwrite(args[0], memoryview(args[1])[: len(args[1]) // 2], args[2])
                self.event()
            return call(*args, **options)

        return wrapped

    def arm(self) -> None:
        for name in CALLS:
            setattr(os, name, self.around(getattr(os, name)))
        for name in SYNCS:  # what SIGKILL cannot undo needs no wait for the disk
            setattr(os, name, self.around(lambda fd: None))
        Environment.write = self.around(Environment.write)  # type: ignore[method-assign]


real_pwrite = os.pwrite


def run_once(scenario: str, directory: Path, step: int) -> None:
    if scenario == "create":
        Killer(step).arm()
        Store.open(directory, map_size=MAP_SIZE)
        return
    prepare, act = SCENARIOS[scenario]
    store = Store.open(directory, map_size=MAP_SIZE)
    prepare(store)
    Killer(step).arm()
    act(store)


def kill_at_each_step(scenario: str, directory: Path) -> int:
    """Returns the number of runs; the last one was not killed."""
    for step in range(1, 1000):
        pid = os.fork()
        if pid == 0:
            try:
                run_once(scenario, directory / str(step), step)
            except BaseException:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if not os.WIFSIGNALED(status):
            assert status == 0, f"step {step} of {scenario} failed"
            return step
    raise AssertionError("no end of steps")


RACE = {f"race-{i}": data(f"race-{i % 4}", size) for i, size in enumerate([3 * CHUNK + 1, 900, 9000, CHUNK] * 2)}


def race(directory: Path, seed: int) -> None:
    store = Store.open(directory, map_size=MAP_SIZE)
    order = random.Random(seed)
    work = [(name, i, chunk) for name, content in RACE.items() for i, chunk in enumerate(chunks(content))]
    order.shuffle(work)
    print("ready", flush=True)
    sys.stdin.readline()
    pending: list[SpanKey] = []
    for name, i, chunk in work:
        span = key(name, len(RACE[name]))
        if store.write_chunk(span, i, chunk):
            pending.append(span)
        if len(pending) >= order.randint(1, 3):
            store.seal(pending)
            pending = []
    spans, again = [key(name, len(content)) for name, content in RACE.items()], 0
    while set(store.seal(spans)) < set(spans):
        again += 1
        for name, i, chunk in work:
            store.write_chunk(key(name, len(RACE[name])), i, chunk)
    store.close()
    print(again)


if __name__ == "__main__":
    if sys.argv[1] == "kill":
        print(kill_at_each_step(sys.argv[2], Path(sys.argv[3])))
    else:
        race(Path(sys.argv[2]), int(sys.argv[3]))
