"""What a transfer process asks of the network when others fill the same store."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest
import trio

from cakefs.engine.models.sources import UrlSource, default_name
from cakefs.engine.transfer.messages import Arrived, Confirmed, Done, FetchJob, Idle, Report, Settings, frame
from cakefs.engine.transfer.network import Network
from cakefs.engine.transfer.worker import Worker
from cakefs.execute import child_environment, python_command
from cakefs.model import CHUNK, ByteRange, Locator, SpanKey
from cakefs.remotes.base import Sink, read
from cakefs.store.store import Store
from tests.fs_child import eventually
from tests.hub import Hub

DATA = b"".join(bytes([n]) * CHUNK for n in range(1, 6)) + b"end"
KEY = SpanKey("sha256:file", 100, 100 + len(DATA))
FILE = Locator("https://server/file", 100 + len(DATA))
JOB = FetchJob(7, FILE, KEY.identity, KEY.start, KEY.stop, ((KEY.start, KEY.stop),))


class Remote:
    """Knows one file; remembers the ranges that were asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    async def fetch(self, locator: Locator, span: ByteRange, sink: Sink) -> None:
        self.asked.append((span.start - KEY.start, span.stop - KEY.start))
        sink(DATA[span.start - KEY.start : span.stop - KEY.start])


def fetched(store: Store) -> tuple[list[tuple[int, int]], list[Report]]:
    """Ranges asked for and reports of one job for the whole span."""
    remote, reports = Remote(), list[Report]()
    worker = Worker(store, remote, reports.append)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            worker.start(nursery, JOB)
        await worker.seal_pending()

    trio.run(main)
    return remote.asked, reports


def test_chunks_that_another_process_brought_are_not_fetched_again(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    try:
        for chunk in (0, 3):
            store.write_chunk(KEY, chunk, DATA[chunk * CHUNK : (chunk + 1) * CHUNK])
        asked, reports = fetched(store)
        assert asked == [(CHUNK, 3 * CHUNK), (4 * CHUNK, len(DATA))]
        assert sorted(r.index for r in reports if isinstance(r, Arrived)) == list(range(6))
        assert reports[-1] == Done(7)
        assert store.has(KEY)
        asked, reports = fetched(store)
        assert asked == [] and reports[-1] == Done(7)
    finally:
        store.close()


def test_a_chunk_that_rotted_is_fetched_again(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    try:
        fetched(store)
        (blob,) = (p for p in (tmp_path / "store" / "blobs").rglob("*") if p.is_file())
        blob.chmod(0o600)
        with blob.open("r+b") as file:
            file.seek(2 * CHUNK + 5)
            file.write(b"rot")
        asked, _ = fetched(store)
        assert asked == [(2 * CHUNK, 3 * CHUNK)]
        assert blob.read_bytes() == DATA
    finally:
        store.close()


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://h.org/model.safetensors", "h.org"),
        ("http://127.0.0.1:80/dir/model.safetensors", "127.0.0.1/dir"),
        ("https://h.org/a/b/My%20Model.gguf?x=1", "b/My Model"),
        ("https://h.org/org/name/resolve/main/model.safetensors.index.json", "org/name"),
        ("https://h.org/x.safetensors", "h.org/x"),
        ("https://h.org/a%2F..%2Fb/model.safetensors", "h.org/a-..-b"),
        ("https://h.org/.git/../%00/model.safetensors", "h.org/git"),
    ],
)
def test_a_url_is_shown_under_the_last_two_of_host_directories_and_file(url: str, name: str) -> None:
    assert default_name(UrlSource(url)) == name


def test_a_store_that_is_gone_ends_it_with_a_line(tmp_path: Path) -> None:
    settings = frame(Settings(str(tmp_path / "gone"), {}, 30.0, 2))
    command = python_command("cakefs.engine.transfer.worker")
    done = subprocess.run(command, input=settings, capture_output=True, env=child_environment(), timeout=60)
    assert done.stderr.decode() == f"ERROR no store at {tmp_path}/gone\n"


@pytest.mark.parametrize("turn", range(8))  # trio runs tasks in an order by chance
def test_a_flush_right_behind_a_job_waits_for_it(tmp_path: Path, turn: int) -> None:
    store = Store.open(tmp_path / "store")
    reports: list[Report] = []
    idle = trio.Event()

    def heard(report: Report) -> None:
        reports.append(report)
        if isinstance(report, Idle):
            idle.set()

    worker = Worker(store, Remote(), heard)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker.seal_forever)
            nursery.start_soon(worker.confirm_forever)
            worker.start(nursery, JOB)
            worker.flush()
            with trio.fail_after(30):
                await idle.wait()
            nursery.cancel_scope.cancel()

    try:
        trio.run(main)
        assert [r for r in reports if not isinstance(r, Arrived | Confirmed)] == [Done(7), Idle()]
        assert store.has(KEY)
    finally:
        store.close()


@pytest.mark.parametrize("came", [DATA, b"\xff" + DATA[1:]], ids=["right", "wrong"])
def test_a_file_is_confirmed_while_another_stalls(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, came: bytes
) -> None:
    identity, here = f"sha256:{hashlib.sha256(DATA).hexdigest()}", ByteRange(0, len(DATA))
    job = FetchJob(8, Locator("https://server/other", here.stop), identity, 0, here.stop, ((0, here.stop),))
    confirmed = trio.Event()
    reports: list[Report] = []

    class Stalling:
        async def fetch(self, locator: Locator, span: ByteRange, sink: Sink) -> None:
            if locator == FILE:
                await trio.sleep_forever()
            sink(came[span.start : span.stop])

    def heard(report: Report) -> None:
        if isinstance(report, Confirmed):
            reports.append(report)
            confirmed.set()

    with Store.open(tmp_path / "store") as store:
        worker = Worker(store, Stalling(), heard)

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(worker.seal_forever)
                nursery.start_soon(worker.confirm_forever)
                worker.start(nursery, JOB)
                worker.start(nursery, job)
                with trio.fail_after(30):
                    await confirmed.wait()
                nursery.cancel_scope.cancel()

        trio.run(main)
        assert reports == [Confirmed(identity, came == DATA)]
        assert store.has(SpanKey(identity, 0, here.stop)) == (came == DATA)
    assert ("came wrong" in caplog.text) == (came != DATA)


# Connections

WHOLE = ByteRange(0, len(DATA))


def logged_in(times: int) -> Settings:
    """Each time with another token."""
    return Settings("", {"https://hub": f"hf_{times}"}, 30.0, 2)


def sockets() -> set[str]:
    """That this process has open."""
    return {link for fd in os.listdir("/proc/self/fd") if (link := linked(fd)).startswith("socket:")}


def linked(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:  # that of the listing itself
        return ""


def test_another_token_leaves_no_connection_open(hub: Hub) -> None:
    file = Locator(hub.plain("file", DATA), len(DATA))
    open_now = list[int]()

    async def main() -> None:
        network = Network()
        for turn in range(4):
            remote = await network.remote(logged_in(turn))
            assert await read(remote, file, WHOLE) == DATA
            # The server's ends are of this process, too, and it closes them when it notices.
            assert await trio.to_thread.run_sync(eventually, lambda: len(sockets()) <= min(open_now, default=1000))
            open_now.append(len(sockets()))
        await network.aclose()

    trio.run(main)
    assert hub.connections == 4


def test_a_transfer_under_way_keeps_the_connection_it_began_with(hub: Hub) -> None:
    file, got = Locator(hub.plain("file", DATA), len(DATA)), list[bytes]()
    stalled = hub.fault("stall", after=CHUNK)

    async def main() -> None:
        network = Network()
        remote = await network.remote(logged_in(0))

        async def fetch() -> None:
            got.append(await read(remote, file, WHOLE))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fetch)
            await trio.to_thread.run_sync(eventually, lambda: stalled.hits)
            await network.remote(logged_in(1))
            stalled.release()
        await network.aclose()

    trio.run(main)
    assert got == [DATA] and hub.connections == 1
