"""add, read, pull against a real hub on loopback, with real transfer processes; no mount."""

import os
import signal
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from cakefs.app import TOKEN_S, App, open_app
from cakefs.config import Config
from cakefs.engine import jobs
from cakefs.engine.known.shown import Shown
from cakefs.engine.known.survey import is_verified
from cakefs.engine.models.sources import default_name, parse_source
from cakefs.engine.read import FileReader
from cakefs.engine.serve.library import LET_GO_S, Library
from cakefs.engine.transfer.flights import Priority
from cakefs.engine.transfer.messages import BEAT_S
from cakefs.engine.verify import Verifier
from cakefs.errors import AccessDenied, InvalidFormat, RemoteChanged, RemoteUnavailable, UserError
from cakefs.model import CHUNK, View
from cakefs.plan.requests import ChunkRef
from tests.hub import Hub
from tests.models import CONFIG, llama, sharded, single, tensor

Body = Callable[[App], Awaitable[None]]


def run(hub: Hub, store: Path, body: Body, **settings: object) -> None:
    """Runs a body inside an app over a store, with the hub as the Hub."""
    values: dict[str, object] = {"store": store, "mountpoint": store / "mnt", "endpoint": hub.endpoint}
    config = Config(**(values | {"workers": 1, "read_timeout_s": 5.0} | settings))  # type: ignore[arg-type]

    async def main() -> None:
        with trio.fail_after(60):
            async with open_app(config) as app:
                await body(app)

    trio.run(main)


async def add(app: App, text: str, name: str | None = None) -> str:
    source = parse_source(text, None)
    return (await app.add(source, name or default_name(source))).manifest_id


async def read_file(library: Library, name: str, path: str, view: View = View.MODEL, step: int = 100_000) -> bytes:
    manifest_id = library.names()[name]
    file = library.manifest(manifest_id).shown(view)[path]
    reader = library.open(manifest_id, file)
    pieces = []
    for offset in range(0, file.size, step):
        hit = reader.try_read(offset, step)
        pieces.append(bytes(hit if hit is not None else await reader.read(offset, step)))
    reader.close()
    return b"".join(pieces)


async def read_model(app: App, name: str = "org/name", path: str = "model.safetensors", **how: object) -> bytes:
    async with app.library() as library:
        return await read_file(library, name, path, **how)  # type: ignore[arg-type]


def big(tensors: int = 3, size: int = 3 * CHUNK + 12_345) -> dict[str, object]:
    return {f"t{i}": tensor(i, size // 4) for i in range(tensors)}


def test_a_single_file_reads_byte_identical(hub: Hub, tmp_path: Path) -> None:
    published = single(llama())
    hub.add_repo("org/name", {"config.json": CONFIG, "model.safetensors": published})

    async def body(app: App) -> None:
        await add(app, "org/name")
        assert await read_model(app) == published
        assert await read_model(app, path="config.json") == CONFIG

    run(hub, tmp_path / "store", body)


def test_shards_read_as_one_canonical_file_and_originals_as_published(hub: Hub, tmp_path: Path) -> None:
    tensors = llama(4)
    files = sharded(tensors, 3)
    hub.add_repo("org/name", files)

    async def body(app: App) -> None:
        await add(app, "org/name")
        assert await read_model(app) == single(tensors)
        for path, published in files.items():
            assert await read_model(app, path=path, view=View.ORIGINAL) == published

    run(hub, tmp_path / "store", body)


def test_who_wants_what_just_failed_waits_briefly_and_gets_it_when_it_comes(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel lets the readers of one page ask one after the other: each of them with all patience is a hang."""
    monkeypatch.setattr("cakefs.engine.transfer.flights.AGAIN_S", 0.3)
    published = single(big(1))
    hub.add_repo("org/name", {"model.safetensors": published})

    async def body(app: App) -> None:
        manifest = app.model(await add(app, "org/name") and "org/name")
        hub.fault("stall", times=None)
        async with app.library() as library:
            reader = library.open(library.names()["org/name"], manifest.shown(View.MODEL)["model.safetensors"])
            began = trio.current_time()
            for _ in range(10):
                with pytest.raises(RemoteUnavailable, match=r"localhost.* did not come in \d tr"):
                    await reader.read(CHUNK // 2, 10)
            assert 3.0 < trio.current_time() - began < 10 * 3.0
            hub.clear_faults()
            assert published[CHUNK // 2 : CHUNK // 2 + 10] in [await attempt(reader) for _ in range(20)]
            reader.close()

    async def attempt(reader: FileReader) -> bytes:
        try:
            return bytes(await reader.read(CHUNK // 2, 10))
        except RemoteUnavailable:
            return b""

    run(hub, tmp_path / "store", body, read_timeout_s=3.0)
    assert "did not come" in caplog.text


def test_who_queued_behind_what_stalls_waits_briefly_the_second_time(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The request for it begins when its reader gives up: a mapped page would wait for twice as long as a read."""
    monkeypatch.setattr("cakefs.engine.transfer.flights.AGAIN_S", 0.3)
    monkeypatch.setattr("cakefs.engine.fetch.READER_MARGIN_S", 0.5)
    readers = 20  # for 8 connections
    hub.add_repo("org/name", {"model.safetensors": single({"a": tensor(1, (readers + 1) * CHUNK // 4)})})
    seconds: list[float] = []

    async def body(app: App) -> None:
        manifest = app.model(await add(app, "org/name") and "org/name")
        hub.fault("stall", times=None)
        async with app.library() as library:
            reader = library.open(library.names()["org/name"], manifest.shown(View.MODEL)["model.safetensors"])

            async def read(place: int) -> None:
                with pytest.raises(RemoteUnavailable):
                    await reader.read(place * CHUNK + CHUNK // 2, 10)
                began = trio.current_time()
                with pytest.raises(RemoteUnavailable):
                    await reader.read(place * CHUNK + CHUNK // 2, 10)
                seconds.append(trio.current_time() - began)

            async with trio.open_nursery() as nursery:
                for place in range(readers):
                    nursery.start_soon(read, place)
            reader.close()

    run(hub, tmp_path / "store", body, read_timeout_s=3.0)
    assert len(seconds) == readers and max(seconds) < 1.5
    assert "did not come" in caplog.text


@asynccontextmanager
async def ahead_of(app: App, hub: Hub, chunks: int, rate: float) -> AsyncIterator[FileReader]:
    """A reader of a file of which so many chunks are being fetched ahead, over a slow link."""
    manifest = app.model(await add(app, "org/name") and "org/name")
    async with app.library() as library:
        reader = library.open(library.names()["org/name"], manifest.shown(View.MODEL)["model.safetensors"])
        await reader.read(0, 10)
        await app.fetcher.flush()
        hub.reset()
        hub.shape(rate=rate)
        span = next(t.span for t in manifest.tensors if t.name == "a")
        app.fetcher.want(manifest, [ChunkRef(span, i) for i in range(2, 2 + chunks)], Priority.AHEAD)
        yield reader
        reader.close()


def test_a_reader_waits_as_long_as_anything_of_his_file_comes(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """He may want the end of a large request, on a link that is slow and nothing else."""
    monkeypatch.setattr("cakefs.engine.fetch.READER_MARGIN_S", 0.5)
    published = single({"a": tensor(1, 12 * CHUNK // 4)})
    hub.add_repo("org/name", {"model.safetensors": published})

    async def body(app: App) -> None:
        async with ahead_of(app, hub, 8, rate=2e6) as reader:
            began = trio.current_time()
            at = 10 * CHUNK - 1000  # In the last chunk of the second request: 8 MiB come before it.
            assert bytes(await reader.read(at, 10)) == published[at : at + 10]
            assert trio.current_time() - began > 2.5

    run(hub, tmp_path / "store", body, read_timeout_s=2.0)


def test_a_reader_does_not_wait_for_what_is_fetched_ahead_of_the_same_file(hub: Hub, tmp_path: Path) -> None:
    published = single({"a": tensor(1, 40 * CHUNK // 4)})
    hub.add_repo("org/name", {"model.safetensors": published})

    async def body(app: App) -> None:
        async with ahead_of(app, hub, 32, rate=4e6) as reader:
            at = 38 * CHUNK
            assert bytes(await reader.read(at, 10)) == published[at : at + 10]
            assert hub.sent() < 7 * CHUNK, "two requests of 4 MiB are on their way"

    run(hub, tmp_path / "store", body)


def test_other_weights_beside_model_safetensors_are_original_only(hub: Hub, tmp_path: Path) -> None:
    files = sharded(llama(), 2) | {"consolidated.safetensors": single(llama()), "pytorch_model.bin": b"a pickle"}
    hub.add_repo("org/name", files | {"config.json": CONFIG, "onnx/model.onnx": b"graph"})

    async def body(app: App) -> None:
        await add(app, "org/name")
        manifest = app.model("org/name")
        assert set(manifest.shown(View.MODEL)) == {"model.safetensors", "config.json", "onnx/model.onnx"}
        assert set(manifest.shown(View.ORIGINAL)) == set(files) | {"config.json", "onnx/model.onnx"}

    run(hub, tmp_path / "store", body)


def test_the_second_read_asks_nothing_also_in_another_process_and_offline(hub: Hub, tmp_path: Path) -> None:
    published = single(big())
    hub.add_repo("org/name", {"model.safetensors": published})

    async def first(app: App) -> None:
        await add(app, "org/name")
        assert await read_model(app) == published
        hub.reset()
        assert await read_model(app) == published

    async def later(app: App) -> None:
        assert await read_model(app) == published

    run(hub, tmp_path / "store", first)
    run(hub, tmp_path / "store", later)
    run(hub, tmp_path / "store", later, offline=True)
    assert hub.requests == []


def test_a_tensor_of_another_model_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    """Known before transfer only for equal files; stored once in any case."""
    files = sharded(llama(4), 2)
    hub.add_repo("org/base", files)
    shared = "model-00001-of-00002.safetensors"
    hub.add_repo("org/tune", files)

    async def body(app: App) -> None:
        await add(app, "org/base")
        await read_model(app, "org/base")
        hub.reset()
        await add(app, "org/tune")
        assert await read_model(app, "org/tune") == await read_model(app, "org/base")
        assert hub.sent(shared) == 0

    run(hub, tmp_path / "store", body)


def test_equal_tensors_of_different_files_are_stored_once(hub: Hub, tmp_path: Path) -> None:
    one, other = big(3), big(3) | {"extra": tensor(99, 5000)}
    hub.add_repo("org/one", {"model.safetensors": single(one)})
    hub.add_repo("org/other", {"model.safetensors": single(other)})

    async def body(app: App) -> None:
        for name in ("org/one", "org/other"):
            await add(app, name)
            manifest = app.model(name)
            await jobs.pull(app.store, app.fetcher, manifest, manifest.files, lambda _: None)
        blobs = sum(size for _, size, _ in app.store.catalog.blobs())
        distinct = sum(t.nbytes for t in other.values())
        assert distinct <= blobs < distinct + 10_000

    run(hub, tmp_path / "store", body)


def test_a_small_read_fetches_one_chunk(hub: Hub, tmp_path: Path) -> None:
    published = single({"t": tensor(1, 8 * CHUNK // 4)})
    hub.add_repo("org/name", {"model.safetensors": published})

    async def body(app: App) -> None:
        await add(app, "org/name")
        hub.reset()
        async with app.library() as library:
            manifest_id = library.names()["org/name"]
            reader = library.open(manifest_id, library.manifest(manifest_id).shown(View.MODEL)["model.safetensors"])
            place = len(published) - 4 * CHUNK
            assert bytes(await reader.read(place, 4096)) == published[place : place + 4096]
        assert hub.sent("model.safetensors") <= CHUNK

    run(hub, tmp_path / "store", body)


def test_the_published_sha256_is_confirmed_when_the_file_is_complete(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("org/name", {"model.safetensors": single(big())})

    async def body(app: App) -> None:
        await add(app, "org/name")
        manifest = app.model("org/name")
        await jobs.pull(app.store, app.fetcher, manifest, manifest.files, lambda _: None)
        known = app.store.catalog.verified(manifest.sources[0].identity)
        assert known is not None and known.ok
        assert app.fetcher.counters.confirmed == 1

    run(hub, tmp_path / "store", body)


def test_corrupt_bytes_are_found_when_the_file_completes_and_fetched_again(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    published = single(big())
    hub.add_repo("org/name", {"model.safetensors": published})

    async def body(app: App) -> None:
        await add(app, "org/name")
        manifest = app.model("org/name")
        hub.fault("corrupt", "model.safetensors", times=1, after=1000)
        await jobs.pull(app.store, app.fetcher, manifest, manifest.files, lambda _: None)
        assert app.fetcher.counters.refuted == 1
        assert await read_model(app) == published

    run(hub, tmp_path / "store", body)


def test_offline_says_what_is_missing(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("org/name", {"model.safetensors": single(big())})

    async def online(app: App) -> None:
        await add(app, "org/name")

    async def offline(app: App) -> None:
        with pytest.raises(RemoteUnavailable, match=r"model.safetensors of org/name is not all local"):
            await read_model(app)

    run(hub, tmp_path / "store", online)
    run(hub, tmp_path / "store", offline, offline=True)


def test_an_index_that_breaks_its_rules_leaves_no_model(hub: Hub, tmp_path: Path) -> None:
    files = sharded(llama(), 2)
    hub.add_repo("org/name", files | {"model.safetensors.index.json": b'{"weight_map": {"t": "../../etc/passwd"}}'})

    async def body(app: App) -> None:
        with pytest.raises(InvalidFormat, match=r"model.safetensors.index.json"):
            await add(app, "org/name")
        assert app.store.catalog.models.all() == {}

    run(hub, tmp_path / "store", body)


@pytest.mark.parametrize("kind", ["drop", "short", "500", "wrong-range", "reset", "expired"])
def test_a_passing_fault_in_the_middle_is_not_seen_by_the_reader(hub: Hub, tmp_path: Path, kind: str) -> None:
    published = single(big())
    hub.add_repo("org/name", {"model.safetensors": published})

    async def body(app: App) -> None:
        await add(app, "org/name")
        hub.fault(kind, "model.safetensors", times=2, after=200_000)
        assert await read_model(app) == published

    run(hub, tmp_path / "store", body)


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_transfer_process_is_replaced_and_its_flights_are_taken_over(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: signal.Signals
) -> None:
    """Or one that hangs."""
    monkeypatch.setattr("cakefs.engine.transfer.workers.SILENT_S", 3 * BEAT_S)
    monkeypatch.setattr("cakefs.engine.transfer.workers.GRACE_S", 0.1)
    published = single(big(4))
    hub.add_repo("org/name", {"model.safetensors": published})

    async def body(app: App) -> None:
        await add(app, "org/name")
        hub.shape(rate=20_000_000, latency=0.01)

        async def kill() -> None:
            await trio.to_thread.run_sync(partial(hub.wait_for, "model.safetensors", 4))
            (pid,) = app.fetcher.pids()
            os.kill(pid, by)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill)
            assert await read_model(app) == published
        assert app.fetcher.counters.worker_deaths == 1

    run(hub, tmp_path / "store", body)


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system of one's own needs root")
def test_a_full_store_serves_and_does_not_keep(hub: Hub, tmp_path: Path) -> None:
    published = single(big(8))
    hub.add_repo("org/name", {"model.safetensors": published})
    store = tmp_path / "store"
    store.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m,mode=700", "tmpfs", store], check=True)

    async def body(app: App) -> None:
        await add(app, "org/name")
        assert await read_model(app) == published
        assert await read_model(app) == published
        assert app.fetcher.has_unkept
        assert Verifier(app.store, repair=False).verify(app.model("org/name"), lambda _: None).bad == []

    try:
        run(hub, store, body, readahead=False)
    finally:
        subprocess.run(["umount", "-l", store], check=True)


def test_more_stalled_files_than_connections_block_no_other(hub: Hub, tmp_path: Path) -> None:
    files = {f"{i}/model.safetensors": single({"t": tensor(i, 100_000)}) for i in range(7)}
    hub.add_repo("org/many", files)

    async def body(app: App) -> None:
        await add(app, "org/many")
        for i in range(6):
            hub.fault("stall", f"{i}/model.safetensors", times=None)
        async with trio.open_nursery() as nursery:
            for i in range(6):
                nursery.start_soon(read_model, app, "org/many", f"{i}/model.safetensors")
            await trio.testing.wait_all_tasks_blocked()
            assert app.fetcher.on_their_way >= 6
            assert await read_model(app, "org/many", "6/model.safetensors") == files["6/model.safetensors"]
            assert app.fetcher.counters.failures == 0, "while all the others wait"
            nursery.cancel_scope.cancel()

    run(hub, tmp_path / "store", body, connections=2, read_timeout_s=100.0)


@pytest.mark.parametrize("etag", ["", 'W/"v1"', '"v1"'])
def test_two_versions_of_a_plain_file_are_never_mixed(hub: Hub, tmp_path: Path, etag: str) -> None:
    one, other = single(big(4)), single({name: -value for name, value in big(4).items()})  # type: ignore[operator]
    url = hub.plain("dir/model.safetensors", one, etag=etag)

    @asynccontextmanager
    async def opened(app: App) -> AsyncIterator[FileReader]:
        async with app.library() as library:
            manifest_id = library.names()["plain"]
            yield library.open(manifest_id, library.manifest(manifest_id).shown(View.MODEL)["model.safetensors"])

    async def changed_while_open(app: App) -> None:
        await add(app, url, "plain")
        async with opened(app) as reader:
            place = len(one) - 100
            assert bytes(await reader.read(place, 100)) == one[place:]
            hub.plain("dir/model.safetensors", other, etag=etag.replace("1", "2"), modified=1_780_000_000.0)
            with pytest.raises(RemoteChanged, match="changed upstream"):
                await reader.read(0, len(one))

    async def changed_since(app: App) -> None:
        async with opened(app) as reader:
            with pytest.raises(RemoteChanged, match="changed upstream"):
                await reader.read(0, len(one))

    for body in (changed_while_open, changed_since):
        run(hub, tmp_path / "store", body, readahead=False)


def test_a_server_that_dates_nothing_is_refused(hub: Hub, tmp_path: Path) -> None:
    url = hub.plain("dir/model.safetensors", single(big()), etag="", modified=None)

    async def body(app: App) -> None:
        with pytest.raises(InvalidFormat, match="neither ETag nor Last-Modified"):
            await add(app, url, "plain")

    run(hub, tmp_path / "store", body)


def test_a_model_with_an_empty_tensor_becomes_complete(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("org/name", {"model.safetensors": single(llama() | {"empty": tensor(1, 0, 5)})})

    async def body(app: App) -> None:
        await add(app, "org/name")
        manifest = app.model("org/name")
        await jobs.pull(app.store, app.fetcher, manifest, manifest.files, lambda _: None)
        assert is_verified(app.store, manifest, Shown.of(manifest))

    run(hub, tmp_path / "store", body)


def test_a_removed_model_is_let_go_once_nothing_of_it_is_open(hub: Hub, tmp_path: Path) -> None:
    published = single(big())
    hub.add_repo("org/name", {"model.safetensors": published})

    async def body(app: App) -> None:
        await add(app, "org/name")
        async with app.library() as library:
            manifest_id = library.names()["org/name"]
            reader = library.open(manifest_id, library.manifest(manifest_id).shown(View.MODEL)["model.safetensors"])
            await reader.read(0, len(published))
            app.store.catalog.models.remove("org/name")
            await trio.sleep(2.5 * LET_GO_S)
            assert jobs.gc_plan(app.store).blobs == {}
            assert bytes(await reader.read(0, len(published))) == published
            reader.close()
            await trio.sleep(2.5 * LET_GO_S)
        assert jobs.collect(app.store).bytes > len(published) // 2

    run(hub, tmp_path / "store", body)


def test_a_login_after_the_mount_reaches_it(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = single(big())
    hub.add_repo("org/gated", {"model.safetensors": published}, gated=True, token="hf_mine")

    async def logged_in(app: App) -> None:
        await add(app, "org/gated")

    async def mounted(app: App) -> None:
        async with app.library() as library:
            with pytest.raises(AccessDenied, match="org/gated"):
                await read_file(library, "org/gated", "model.safetensors")
            monkeypatch.setenv("HF_TOKEN", "hf_mine")
            await trio.sleep(2 * TOKEN_S)
            assert await read_file(library, "org/gated", "model.safetensors") == published

    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    run(hub, tmp_path / "store", logged_in)
    monkeypatch.delenv("HF_TOKEN")
    run(hub, tmp_path / "store", mounted)


@pytest.mark.parametrize("name", ["org/name/config.json", "org/name/model.safetensors/x"])
def test_a_name_that_a_file_of_another_model_would_hide_is_refused(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.add_repo("org/name", {"model.safetensors": single(llama()), "config.json": CONFIG})
    hub.add_repo("org/other", {"model.safetensors": single(llama())})

    async def body(app: App) -> None:
        await add(app, "org/name")
        with pytest.raises(UserError, match="would be hidden by a file of org/name"):
            await add(app, "org/other", name)
        assert set(app.store.catalog.models.all()) == {"org/name"}

    run(hub, tmp_path / "store", body)
