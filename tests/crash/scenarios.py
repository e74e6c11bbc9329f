"""What is done to a store while it is crashed, and what must hold once it was done.

Each begins on a copy of a base: an empty store, one to which models were added, or one that has all of their bytes.
"""

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import msgspec
import trio

from cakefs.engine.recover import recover
from cakefs.engine.transfer import worker
from cakefs.engine.transfer.messages import (
    Arrived,
    FetchJob,
    Flush,
    Idle,
    Look,
    Report,
    Request,
    Settings,
    Unframer,
    frame,
    job_chunks,
)
from cakefs.engine.verify import Verifier
from cakefs.model import ByteRange, Locator, SpanKey
from cakefs.remotes.http import HttpRemote
from cakefs.store.store import Store
from tests.crash.place import LARGE, ONE, TWO, WEIGHTS, Place, published, shown
from tests.crash.shim import mark
from tests.exporting import files_in
from tests.store_child import flip


class Scenario(NamedTuple):
    """Attributes:
    done: Whether it was done, for good.
    prepare: After the base was copied, before the crash.
    keeps: What is shown all the while, and is whole all the while on a base that is; also what the copy of the catalog
        has.
    damaged: The store begins damaged, so that errors are what may be told.
    """

    base: str
    act: Callable[[Place], object]
    done: Callable[[Place], bool]
    prepare: Callable[[Place], object] = lambda place: None
    keeps: tuple[str, ...] = ()
    damaged: bool = False


def command(*arguments: str) -> Callable[[Place], object]:
    return lambda place: place.run(*(a.format(out=place.out, lenders=place.lenders) for a in arguments))


def shows(*names: str) -> Callable[[Place], bool]:
    return lambda place: set(names) <= place.names()


def pulled(*names: str) -> Callable[[Place], bool]:
    return lambda place: place.pulled(*names)


# What a transfer process does, within this process


def fetch(place: Place) -> None:
    """All of a model, as jobs; what had come before the last crash must not be asked for again."""
    here = place.arrived(LARGE)
    told = noted(place)
    assert told <= {span for spans in here.values() for span in spans}, "a chunk that was reported is gone"
    asked = transfer(place, lambda job: job)
    for identity, spans in here.items():
        for start, stop in spans:
            again = [r for r in asked.get(identity, []) if r[0] < stop and start < r[1]]
            assert not again, f"{start}..{stop} was here and is fetched again: {again}"


def look(place: Place) -> None:
    """Seals and confirms what an earlier process left undone."""
    assert not transfer(place, lambda job: Look(job.identity, job.locator.size)), "all had come"


def transfer(place: Place, request: Callable[[FetchJob], FetchJob | Look]) -> dict[str, list[tuple[int, int]]]:
    """Runs a transfer process's loop on a request for each upstream file. Returns: the ranges asked for."""
    asked: dict[str, list[tuple[int, int]]] = {}
    genuine, jobs = HttpRemote.fetch, list(jobs_of(place))
    by_url = {job.locator.url: job.identity for job in jobs}

    async def fetch(self: HttpRemote, locator: Locator, span: ByteRange, sink: Callable[[bytes], None]) -> None:
        asked.setdefault(by_url[locator.url], []).append((span.start, span.stop))
        await genuine(self, locator, span, sink)

    settings = Settings(str(place.store), {}, 30.0, 2)
    messages: list[Request] = [settings, *map(request, jobs), Flush()]
    with mock.patch.object(HttpRemote, "fetch", fetch), mock.patch.object(worker, "confine"):
        converse(messages, lambda report: note(place, jobs, report))
    return asked


def jobs_of(place: Place) -> list[FetchJob]:
    with Store.open(place.store, create=False) as store:
        manifest = store.catalog.models.manifest(store.catalog.models.all()[LARGE].manifest)
    jobs = []
    for number, source in enumerate(manifest.sources):
        spans = tuple((s.start, s.stop) for s in manifest.spans if s.source == number and s.size)
        size = source.locator.size
        jobs.append(FetchJob(number, source.locator, source.identity, 0, size, tuple(sorted(spans))))
    return jobs


def converse(messages: Sequence[Request], heard: Callable[[Report], None]) -> None:
    """Says these to a transfer process's loop, which runs here, and hears it until it is idle."""
    inward, outward = os.pipe(), os.pipe()
    decoder, unframer = msgspec.msgpack.Decoder(Report), Unframer()

    def other_end() -> None:
        for message in messages:
            os.write(inward[1], frame(message))
        while True:
            for body in unframer.feed(os.read(outward[0], 1 << 16)):
                heard(report := decoder.decode(body))
                if isinstance(report, Idle):
                    return os.close(inward[1])

    thread = threading.Thread(target=other_end)
    thread.start()
    with mock.patch("sys.stdin") as stdin, mock.patch("sys.stdout") as stdout:
        stdin.fileno.return_value, stdout.fileno.return_value = inward[0], outward[1]
        trio.run(worker._serve)
    thread.join()


def notes(place: Place) -> Path:
    """Beside what is crashed."""
    return place.directory.with_suffix(".arrived")


def note(place: Place, jobs: list[FetchJob], report: Report) -> None:
    if isinstance(report, Arrived):
        chunk = job_chunks(jobs[report.job])[report.index]
        with notes(place).open("a") as file:
            file.write(f"{chunk.start} {chunk.stop}\n")


def noted(place: Place) -> set[tuple[int, int]]:
    if not notes(place).exists():
        return set()
    return {(int(a), int(b)) for a, b in map(str.split, notes(place).read_text().splitlines())}


# The others


def leave_unsealed(place: Place) -> None:
    """As a transfer process does that dies when all has come."""
    with mock.patch.object(Store, "seal", lambda store, keys: []):
        transfer(place, lambda job: job)


def remove(place: Place) -> None:
    place.run("rm", ONE, check=False)  # It may be gone.


def damage(place: Place) -> None:
    for path in sorted((place.store / "blobs").glob("??/*"))[::2]:
        flip(path, path.stat().st_size // 2)
        path.chmod(0o444)


def rot(place: Place) -> None:
    """One byte of the largest tensor."""
    path = max((place.store / "blobs").glob("??/*"), key=lambda path: path.stat().st_size)
    flip(path, path.stat().st_size // 2)
    path.chmod(0o444)


def repair(place: Place) -> None:
    """Of `verify --repair` what changes the store here: what is bad is dropped, and then counts as missing."""
    with Store.open(place.store) as store:
        for record in store.catalog.models.all().values():
            Verifier(store, repair=True).verify(store.catalog.models.manifest(record.manifest), lambda size: None)


def break_catalog(place: Place) -> None:
    """Both pages that a catalog begins with."""
    with (place.store / "catalog/data.mdb").open("r+b") as file:
        file.write(bytes(2 * 4096))


def recovered(place: Place) -> bool:
    return set(ALL) <= place.names() and any(place.store.glob("catalog-broken-*.mdb"))


SPANS = [(SpanKey("sha256:stored", 0, size), bytes([7]) * size) for size in (100, 10_000)]


def put(place: Place) -> None:
    """Into a store that is made for it; it is done when it is said to be, and not when the store is closed."""
    with Store.open(place.store) as store:
        store.put_spans(SPANS)
        mark("put")


def has(place: Place) -> bool:
    with Store.open(place.store, create=False) as store:
        return all(store.has(key) for key, _ in SPANS)


def exported(place: Place) -> bool:
    return files_in(place.out) == dict(shown()[TWO])


ALL = (ONE, TWO, LARGE)
SCENARIOS = {
    "create": Scenario("empty", command("add", ONE), shows(ONE)),
    "add": Scenario("added", command("add", TWO, "--as", ONE, "--update"), shows(ONE), keeps=(TWO, LARGE)),
    "fetch": Scenario("added", fetch, pulled(LARGE), keeps=ALL),
    "look": Scenario("added", look, pulled(LARGE), leave_unsealed, ALL),
    "rm": Scenario("pulled", remove, lambda place: ONE not in place.names(), keeps=(TWO, LARGE)),
    "gc": Scenario("pulled", command("gc"), pulled(TWO, LARGE), command("rm", ONE), (TWO, LARGE)),
    "evict": Scenario("pulled", command("evict", TWO), shows(TWO), keeps=(LARGE,)),
    "evict-begun": Scenario("added", command("evict", LARGE), shows(LARGE), leave_unsealed, (ONE, TWO)),
    "pin": Scenario("added", command("pin", ONE), shows(ONE), keeps=ALL),
    "import": Scenario("empty", command("import", "{lenders}/one", "--as", "mine"), pulled("mine")),
    "copy": Scenario("empty", command("import", "{lenders}/two", "--as", "copied", "--copy"), pulled("copied")),
    "slice": Scenario("pulled", command("slice", ONE, "--layers", "1", "--as", "slice"), pulled("slice"), keeps=ALL),
    "merge": Scenario("pulled", command("merge", ONE, "--repeat-map", "0,0", "--as", "twice"), pulled("twice")),
    "export": Scenario("pulled", command("export", TWO, "{out}", "--reflink", "never"), exported, keeps=ALL),
    "mend": Scenario("pulled", fetch, pulled(LARGE), rot, (ONE, TWO)),
    "repair": Scenario("pulled", repair, shows(*ALL), damage),
    "put": Scenario("empty", put, has),
    "recover": Scenario("added", lambda place: recover(place.store), recovered, break_catalog, ALL, damaged=True),
}


def prepare_base(place: Place, name: str) -> None:
    if name != "empty":
        for repo in published():
            place.run("add", repo)
    if name == "pulled":
        for repo in published():
            place.run("pull", repo)


def lend(directory: Path) -> None:
    for name, repo in (("one", ONE), ("two", TWO)):
        for path, data in published()[repo].items():
            (directory / name).mkdir(parents=True, exist_ok=True)
            (directory / name / path).write_bytes(data)


__all__ = ["SCENARIOS", "WEIGHTS", "Scenario", "lend", "prepare_base"]
