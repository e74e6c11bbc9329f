"""Pins, eviction and the limit of the store: through the commands and a real mount."""

import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from cakefs.app import App, open_app
from cakefs.config import load_config, parse_size
from cakefs.engine import follow, jobs
from cakefs.engine.evict import make_room, room_plan
from cakefs.engine.held import held
from cakefs.engine.read import FileReader
from cakefs.engine.serve import library
from cakefs.engine.serve.library import Library
from cakefs.engine.transfer.quota import left_free
from cakefs.errors import StoreFull, UserError
from cakefs.model import CHUNK, MIB, Locator, Manifest, Source, SpanKey, View
from cakefs.plan.evict import HEADER_LIMIT, Resident, evictable, plan_eviction, shown_by
from cakefs.store.content import FileContent
from cakefs.store.store import Store
from tests.hub import Hub
from tests.inside import Inside
from tests.models import CONFIG, single, tensor
from tests.mounts import Cakefs, needs_fuse
from tests.reference_model import read_range

SIZE = 3 * CHUNK + 4000  # Of a tensor; large enough to be cut into chunks.
LIMIT = 32_000_000  # Not quite two models of six such tensors, with what is left free for transfers.
SHARED = tensor(1, SIZE // 4)


def model(seed: int, tensors: int = 2) -> dict[str, bytes]:
    """A model of some tensors of its own and one that all have."""
    own = {f"layer.{i}": tensor(10 * seed + i, SIZE // 4) for i in range(tensors)}
    return {"config.json": CONFIG, "model.safetensors": single({"shared": SHARED} | own)}


@pytest.fixture
def cakefs(hub: Hub, tmp_path: Path) -> Cakefs:
    return Cakefs(tmp_path, hub.endpoint)


def published(hub: Hub, cakefs: Cakefs, name: str, seed: int, *, tensors: int = 2, pull: bool = True) -> bytes:
    files = model(seed, tensors)
    hub.add_repo(name, files)
    cakefs.run("add", name)
    if pull:
        cakefs.run("pull", name)
    return files["model.safetensors"]


def blobs(cakefs: Cakefs) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (cakefs.store / "blobs").glob("??/*")}


def stored(cakefs: Cakefs) -> int:
    """Bytes that the store takes on the disk, its catalog not counted."""
    blocks: dict[int, int] = {}
    for path in (p for d in ("blobs", "partial", "quarantine") for p in (cakefs.store / d).rglob("*")):
        with suppress(FileNotFoundError):  # sealed, or evicted, between two looks
            status = path.stat()
            blocks[status.st_ino] = status.st_blocks if S_ISREG(status.st_mode) else 0
    return 512 * sum(blocks.values())


def files(cakefs: Cakefs) -> dict[str, list[Path]]:
    """Where the bytes of tensors lie, whole or begun."""
    return {"blobs": list((cakefs.store / "blobs").glob("??/*")), "partials": partials(cakefs)}


def partials(cakefs: Cakefs) -> list[Path]:
    return list((cakefs.store / "partial").glob("*.data"))


def age(cakefs: Cakefs, hours: int, *kinds: str) -> None:
    """Makes all that is in the store, or all of these kinds, unused for so long."""
    then = time.time() - 3600 * hours
    for path in (path for kind, paths in files(cakefs).items() if kind in (kinds or files(cakefs)) for path in paths):
        os.utime(path, (then, path.stat().st_mtime))


def inner_bytes(data: bytes) -> list[int]:
    """A place in the second chunk of each tensor of a file."""
    size = 8 + int.from_bytes(data[:8], "little")
    entries = [entry for name, entry in json.loads(data[8:size]).items() if name != "__metadata__"]
    return [size + entry["data_offsets"][0] + CHUNK + CHUNK // 2 for entry in entries]


def begun(hub: Hub, cakefs: Cakefs, name: str, seed: int, *, tensors: int = 2) -> bytes:
    """As `published`; of each tensor one chunk is here, as somebody looked into it."""
    data = published(hub, cakefs, name, seed, tensors=tensors, pull=False)

    async def read() -> None:
        async with serving(hub, cakefs) as (app, models):
            reader = opened(models, name)
            for at in inner_bytes(data):
                assert await read_range(reader, at, 1) == data[at : at + 1]
            reader.close()
            assert len(list(app.store.partials())) >= tensors

    trio.run(read)
    return data


@asynccontextmanager
async def serving(hub: Hub, cakefs: Cakefs) -> AsyncIterator[tuple[App, Library]]:
    """As a mount does it, and nothing ahead of a reader."""
    async with open_app(load_config({"store": cakefs.store, "endpoint": hub.endpoint})) as app, app.library() as models:
        app.reading.readahead = False
        yield app, models


def opened(models: Library, name: str) -> FileReader:
    manifest_id = models.names()[name]
    return models.open(manifest_id, models.manifest(manifest_id).shown(View.MODEL)["model.safetensors"])


def test_evicted_bytes_are_fetched_again_and_the_model_stays(hub: Hub, cakefs: Cakefs) -> None:
    data = published(hub, cakefs, "org/one", 1)
    published(hub, cakefs, "org/two", 2)
    before = blobs(cakefs)
    plan = cakefs.json("evict", "org/one", "--dry-run")
    assert blobs(cakefs) == before
    assert plan["bytes"] == 2 * SIZE and len(plan["blobs"]) == 2, "not what org/two has as well"
    done = cakefs.json("evict", "org/one")
    assert done == plan | {"dry_run": False}
    gone = {blob["digest"].partition(":")[2] for blob in done["blobs"]}
    assert blobs(cakefs).keys() == before.keys() - gone
    states = {m["name"]: (m["complete"], m["local_bytes"]) for m in cakefs.json("ls")}
    assert states["org/two"][0] and not states["org/one"][0]
    hub.reset()
    assert cakefs.json("pull", "org/one")["fetched_bytes"] == 2 * SIZE
    assert hub.sent("*/model.safetensors") == 2 * SIZE
    out = cakefs.store.parent / "one.safetensors"
    cakefs.run("export", "org/one", str(out), "--file", "model.safetensors")
    assert out.read_bytes() == data


def test_files_that_cakefs_does_not_look_into_are_evicted_whole(hub: Hub, cakefs: Cakefs) -> None:
    large = {"onnx/model.onnx": os.urandom(2 * MIB), "tokenizer.json": os.urandom(2 * MIB)}
    hub.add_repo("org/one", {"config.json": CONFIG} | large)
    cakefs.run("add", "org/one")
    cakefs.run("pull", "org/one")
    (gone,) = cakefs.json("evict", "org/one")["blobs"]
    assert gone["size"] == 2 * MIB
    assert cakefs.json("pull", "org/one", "--files", "tokenizer.json")["fetched_bytes"] == 0
    assert cakefs.json("pull", "org/one")["fetched_bytes"] == 2 * MIB


def test_what_comes_back_is_confirmed_again(hub: Hub, cakefs: Cakefs) -> None:
    published(hub, cakefs, "org/one", 1)
    assert cakefs.json("show", "org/one")["sources"][-1]["verified"] is True
    cakefs.run("evict", "org/one")
    assert cakefs.json("show", "org/one")["sources"][-1]["verified"] is None
    hub.fault("corrupt", "org/one/model.safetensors", after=5000)
    assert cakefs.json("pull", "org/one")["fetched_bytes"] > 2 * SIZE, "found to be wrong, and fetched once more"
    assert cakefs.run("verify", "org/one").returncode == 0


def test_a_pinned_model_is_not_evicted(hub: Hub, cakefs: Cakefs) -> None:
    published(hub, cakefs, "org/one", 1)
    assert cakefs.json("pin", "org/one") == [{"name": "org/one", "pinned": True}]
    assert cakefs.json("ls")[0]["pinned"] and cakefs.json("show", "org/one")["pinned"]
    assert cakefs.run("ls").stdout.endswith("verified, pinned\n")
    refused = cakefs.run("evict", "org/one", check=False)
    assert refused.returncode == UserError.exit_code
    assert refused.stderr == "error: org/one is pinned\nhint: cakefs unpin org/one\n"
    assert cakefs.json("unpin", "org/one") == [{"name": "org/one", "pinned": False}]
    assert cakefs.json("evict", "org/one")["bytes"] == 3 * SIZE
    assert cakefs.json("rm", "org/one") == {"removed": ["org/one"]} and not cakefs.json("ls")


def test_what_a_command_works_on_is_not_evicted(hub: Hub, cakefs: Cakefs) -> None:
    published(hub, cakefs, "org/one", 1)
    with Store.open(cakefs.store) as store, held(store, ["org/one"]):
        done = cakefs.json("evict", "org/one")
        assert (done["bytes"], len(done["in_use"])) == (0, 3)
    assert cakefs.json("evict", "org/one")["bytes"] == 3 * SIZE


def digests(store: Store, manifest: Manifest) -> set[str]:
    """The blobs of a model that have files of their own."""
    found = map(store.catalog.find, map(manifest.key, range(len(manifest.spans))))
    return {record.digest for record in found if record is not None and record.inline is None}


def test_what_another_open_file_has_as_well_stays_in_use(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two models with the same bytes is closed, and its bytes are let go: not those that are open still."""
    cakefs = Inside(tmp_path, hub)
    published(hub, cakefs, "org/one", 1)
    cakefs("add", "org/one", "--as", "twin")
    published(hub, cakefs, "org/two", 2)
    monkeypatch.setattr(library, "IDLE_S", 0)
    monkeypatch.setattr(library, "LET_GO_S", 0.01)

    async def serve() -> None:
        config = load_config({"store": cakefs.store, "endpoint": hub.endpoint})
        async with open_app(config) as app, app.library() as models:
            readers = {name: opened(models, name) for name in models.names()}
            for reader in readers.values():
                for offset in range(0, reader.size, MIB):
                    await reader.read(offset, MIB)
            readers["org/one"].close()
            readers["org/two"].close()
            ours, theirs = (digests(app.store, app.model(name)) for name in ("twin", "org/two"))
            with trio.fail_after(60):
                while app.store.evict(sorted(theirs - ours), dry_run=True) != theirs - ours:  # noqa: ASYNC110
                    await trio.sleep(0.01)
            assert app.store.evict(sorted(ours), dry_run=True) == set()

    trio.run(serve)


def test_bytes_that_go_while_they_are_pulled_are_no_false_bytes(
    hub: Hub, cakefs: Cakefs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody takes all that comes: that says nothing of what was published."""
    published(hub, cakefs, "org/one", 1, pull=False)

    async def pull() -> None:
        config = load_config({"store": cakefs.store, "endpoint": hub.endpoint})
        async with open_app(config) as app:
            confirm = follow.confirm_source

            def late(store: Store, identity: str, size: int, **how: Any) -> bool | None:
                store.evict([digest for digest, _, inline in store.catalog.blobs() if not inline])
                return confirm(store, identity, size, **how)

            monkeypatch.setattr(follow, "confirm_source", late)
            manifest = app.model("org/one")
            await jobs.pull(app.store, app.fetcher, manifest, manifest.files, lambda _: None)

    with pytest.raises(StoreFull, match="evicted by others"):
        trio.run(pull)


@pytest.mark.parametrize("older", ["blobs", "partials"])
def test_what_was_used_least_recently_goes_first_whatever_it_is(hub: Hub, tmp_path: Path, older: str) -> None:
    cakefs = Inside(tmp_path, hub)
    published(hub, cakefs, "org/whole", 1)
    begun(hub, cakefs, "org/begun", 2)
    age(cakefs, 1)
    age(cakefs, 2, older)
    before = files(cakefs)
    with Store.open(cakefs.store) as store:
        make_room(store, 2 * MIB, stored(cakefs))
    assert {kind for kind, left in files(cakefs).items() if len(left) < len(before[kind])} == {older}


def test_what_has_just_come_of_a_tensor_makes_no_room(hub: Hub, tmp_path: Path) -> None:
    cakefs = Inside(tmp_path, hub)
    begun(hub, cakefs, "org/one", 1)
    with Store.open(cakefs.store) as store:
        make_room(store, stored(cakefs), stored(cakefs))
    assert len(partials(cakefs)) == 3


def test_evict_gives_up_a_tensor_of_which_a_part_is_here(hub: Hub, tmp_path: Path) -> None:
    cakefs = Inside(tmp_path, hub)
    begun(hub, cakefs, "org/one", 1)
    before = stored(cakefs)
    plan = cakefs.told("evict", "org/one", "--dry-run")
    assert cakefs("evict", "org/one", "--dry-run").endswith(" of org/one, 3 unfinished transfers\n")
    assert (len(partials(cakefs)), stored(cakefs)) == (3, before)
    done = cakefs.told("evict", "org/one")
    assert done == plan | {"dry_run": False}
    assert (done["bytes"], len(done["partials"]), done["blobs"], done["in_use"]) == (before, 3, [], [])
    assert (stored(cakefs), list((cakefs.store / "partial").iterdir())) == (0, [])
    assert cakefs("evict", "org/one").startswith("freed 0 B of org/one, 0 blobs\n")
    assert cakefs.told("pull", "org/one")["fetched_bytes"] == 3 * SIZE


def test_a_part_of_a_tensor_stays_that_another_model_has_or_that_is_pinned(hub: Hub, tmp_path: Path) -> None:
    cakefs = Inside(tmp_path, hub)
    begun(hub, cakefs, "org/one", 1)
    cakefs("add", "org/one", "--as", "twin")
    assert cakefs.told("evict", "org/one")["bytes"] == 0
    assert room_of(cakefs) == stored(cakefs) > 0
    cakefs("pin", "twin")
    assert room_of(cakefs) == 0
    assert len(partials(cakefs)) == 3


def test_what_a_pull_is_to_complete_makes_no_room_for_the_rest_of_it(hub: Hub, tmp_path: Path) -> None:
    cakefs = Inside(tmp_path, hub)
    begun(hub, cakefs, "org/one", 1, tensors=3)
    age(cakefs, 2)
    hub.reset()
    enough = 4 * (SIZE - CHUNK) + stored(cakefs) + left_free(0) + MIB // 2
    refused = cakefs.run("pull", "org/one", check=False, CAKEFS_CONFIG=_config(cakefs, limit=str(enough - MIB)))
    assert refused.returncode == StoreFull.exit_code
    assert hub.sent("*/model.safetensors") == 0
    cakefs.run("pull", "org/one", CAKEFS_CONFIG=_config(cakefs, limit=str(enough)))
    assert hub.sent("*/model.safetensors") == 4 * (SIZE - CHUNK)


def test_a_reader_goes_on_when_what_it_has_open_is_evicted(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As happens where one opens a tensor at the very moment at which another process gives it up."""
    cakefs = Inside(tmp_path, hub)
    data = published(hub, cakefs, "org/one", 1, pull=False)
    monkeypatch.setattr(FileContent, "note_use", lambda content: None)
    gone: set[str | SpanKey] = set()

    async def serve() -> None:
        async with serving(hub, cakefs) as (app, models):
            reader = opened(models, "org/one")
            for at in range(0, len(data), CHUNK // 2):
                assert await read_range(reader, at, CHUNK // 2) == data[at : at + CHUNK // 2]
                gone.update(app.store.evict([key for key, _ in app.store.partials()]))
            for at in range(0, len(data), CHUNK):
                assert await read_range(reader, at, CHUNK) == data[at : at + CHUNK]
            reader.close()

    trio.run(serve)
    assert len(gone) == 3
    assert cakefs.run("verify").returncode == 0
    assert cakefs.told("ls")[0]["complete"]


def damaged_and_mended(cakefs: Cakefs) -> None:
    """What was damaged is set aside."""
    for name in blobs(cakefs):
        path = cakefs.store / "blobs" / name[:2] / name
        path.chmod(0o600)
        with path.open("r+b") as file:
            file.write(b"damaged")
    cakefs.run("verify", "--repair")


def test_what_was_set_aside_is_in_the_plan_of_gc(hub: Hub, cakefs: Cakefs) -> None:
    published(hub, cakefs, "org/one", 1)
    damaged_and_mended(cakefs)
    plan, before = cakefs.json("gc", "--dry-run"), stored(cakefs)
    assert cakefs.json("gc") == plan | {"dry_run": False}
    assert plan["bytes"] == plan["set_aside_bytes"] == before - stored(cakefs) >= 3 * SIZE


def test_what_was_set_aside_counts_and_is_the_first_to_go(hub: Hub, cakefs: Cakefs) -> None:
    published(hub, cakefs, "org/one", 1)
    damaged_and_mended(cakefs)
    published(hub, cakefs, "org/two", 2, pull=False)
    limit = 6 * SIZE + left_free(0) + MIB // 2  # what both have is fetched, and then not stored twice
    cakefs.run("pull", "org/two", CAKEFS_CONFIG=_config(cakefs, limit=str(limit)))
    assert stored(cakefs) < limit
    assert all(model["complete"] for model in cakefs.json("ls"))


def test_copies_of_an_import_keep_the_limit(hub: Hub, cakefs: Cakefs, tmp_path: Path) -> None:
    published(hub, cakefs, "org/one", 1)
    for number in (2, 3):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "model.safetensors").write_bytes(model(number)["model.safetensors"])
    limited = {"CAKEFS_CONFIG": _config(cakefs, limit=str(5 * SIZE))}
    age(cakefs, 2)
    cakefs.run("import", str(tmp_path / "2"), "--as", "me/two", "--copy", **limited)
    assert stored(cakefs) < 5 * SIZE, "org/one made room"
    refused = cakefs.run("import", str(tmp_path / "3"), "--as", "me/three", "--copy", check=False, **limited)
    assert refused.returncode == StoreFull.exit_code and stored(cakefs) < 5 * SIZE
    cakefs.run("import", str(tmp_path / "3"), "--as", "me/three", **limited)


def test_one_job_after_the_other_finds_room_below_the_limit(hub: Hub, tmp_path: Path) -> None:
    """At once: what the one brought is not fresh for the next. So a disk of models can be written by way of a store
    that holds one of them."""
    cakefs = Inside(tmp_path, hub)
    limited = {"CAKEFS_CONFIG": _config(cakefs, limit=str(LIMIT))}
    names = ("a/1", "a/2", "a/3")
    data = {name: published(hub, cakefs, name, n, tensors=5, pull=False) for n, name in enumerate(names)}
    for name in names:
        cakefs.run("export", name, str(tmp_path / name), **limited)
        assert (tmp_path / name / "model.safetensors").read_bytes() == data[name]
        assert stored(cakefs) < LIMIT
    cakefs.run("pull", "a/1", **limited)
    cakefs.run("import", str(tmp_path / "a/2"), "--as", "mine/two", "--copy", **limited)
    assert stored(cakefs) < LIMIT


def test_what_is_here_is_used_below_a_lower_limit(hub: Hub, cakefs: Cakefs, tmp_path: Path) -> None:
    data = published(hub, cakefs, "org/one", 1)
    limited = {"CAKEFS_CONFIG": _config(cakefs, limit=str(SIZE))}
    hub.reset()
    cakefs.run("export", "org/one", str(tmp_path / "out"), **limited)
    cakefs.run("pull", "org/one", **limited)
    assert (tmp_path / "out/model.safetensors").read_bytes() == data
    assert hub.sent() == 0 and sum(blobs(cakefs).values()) == 3 * SIZE, "all of it stays"


def test_what_was_copied_from_this_machine_is_not_given_up_for_the_address_of_another_model(
    hub: Hub, cakefs: Cakefs, tmp_path: Path
) -> None:
    data = published(hub, cakefs, "org/one", 1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/model.safetensors").write_bytes(data)
    cakefs.run("import", str(tmp_path / "mine"), "--as", "me/one", "--copy")
    assert cakefs.json("evict", "me/one")["bytes"] == 0 and room_of(cakefs) == 0
    cakefs.run("rm", "me/one")
    assert room_of(cakefs) == 3 * SIZE


def room_of(cakefs: Cakefs) -> int:
    """What a limit could free."""
    with Store.open(cakefs.store) as store:
        return room_plan(store, 1 << 40, unused_since=time.time() + 1).bytes


def test_an_unknown_model_cannot_be_pinned(cakefs: Cakefs, hub: Hub) -> None:
    published(hub, cakefs, "org/one", 1, pull=False)
    for command in ("pin", "unpin", "evict"):
        refused = cakefs.run(command, "org/on", check=False)
        assert refused.returncode == UserError.exit_code and "org/one" in refused.stderr


@needs_fuse
class TestMounted:
    @pytest.fixture
    def small(self, hub: Hub, cakefs: Cakefs) -> Iterator[Path]:
        with cakefs.provoking("WARNING the store is full").mounted("--limit", str(LIMIT)) as mountpoint:
            yield mountpoint

    def test_what_is_open_is_not_evicted(self, hub: Hub, cakefs: Cakefs) -> None:
        data = published(hub, cakefs, "org/one", 1)
        with cakefs.mounted() as mountpoint, (mountpoint / "org/one/model.safetensors").open("rb") as file:
            assert file.read() == data
            plan = cakefs.json("evict", "org/one", "--dry-run")
            done = cakefs.json("evict", "org/one")
            assert done == plan | {"dry_run": False}
            assert (done["bytes"], len(done["in_use"])) == (0, 3)
            assert cakefs.json("ls")[0]["complete"]

    def test_tensors_of_which_a_part_is_here_make_room(self, hub: Hub, cakefs: Cakefs) -> None:
        """The store is full of such, and of nothing else."""
        old = begun(hub, cakefs, "org/old", 1, tensors=25)
        new = published(hub, cakefs, "org/new", 2, tensors=5, pull=False)
        count = len(partials(cakefs))
        assert (count, blobs(cakefs)) == (26, {})
        assert LIMIT - len(new) < stored(cakefs) < LIMIT
        age(cakefs, 2)
        with cakefs.provoking("WARNING the store is full").mounted("--limit", str(LIMIT)) as mountpoint:
            assert (mountpoint / "org/new/model.safetensors").read_bytes() == new
            assert stored(cakefs) <= LIMIT
            assert 0 < len(partials(cakefs)) < count, "as many went as had to"
            state = next(m for m in cakefs.json("ls") if m["name"] == "org/new")
            assert state["local_bytes"] == state["size"], "kept as it came"
            assert (mountpoint / "org/old/model.safetensors").read_bytes() == old

    def test_a_tensor_of_which_a_part_is_here_stays_while_a_mount_serves_from_it(
        self, hub: Hub, cakefs: Cakefs
    ) -> None:
        data = published(hub, cakefs, "org/one", 1, pull=False)
        with cakefs.mounted() as mountpoint, (mountpoint / "org/one/model.safetensors").open("rb") as file:
            for at in inner_bytes(data):
                assert os.pread(file.fileno(), 1, at) == data[at : at + 1]
            done = cakefs.json("evict", "org/one")
            assert (done["bytes"], len(done["in_use"]), len(partials(cakefs))) == (0, 3, 3)
            hub.reset()
            assert file.read() == data
            assert hub.sent("*/model.safetensors") == 3 * (SIZE - CHUNK), "what had come was used"

    def test_gc_tells_what_a_mount_still_serves(self, hub: Hub, cakefs: Cakefs) -> None:
        data = published(hub, cakefs, "org/one", 1)
        with cakefs.mounted() as mountpoint, (mountpoint / "org/one/model.safetensors").open("rb") as file:
            cakefs.run("rm", "org/one")
            done = cakefs.json("gc")
            assert (done["bytes"], done["held"]) == (0, ["org/one"])
            assert file.read() == data

    def test_the_least_recently_used_model_makes_room(self, hub: Hub, cakefs: Cakefs, small: Path) -> None:
        published(hub, cakefs, "org/old", 1, tensors=5)
        published(hub, cakefs, "org/new", 2, tensors=5, pull=False)
        age(cakefs, 2)
        data = model(2, 5)["model.safetensors"]
        assert (small / "org/new/model.safetensors").read_bytes() == data
        states = {m["name"]: m for m in cakefs.json("ls")}
        assert states["org/new"]["local_bytes"] == states["org/new"]["size"]
        assert 0 < states["org/old"]["local_bytes"] < states["org/old"]["size"]
        assert stored(cakefs) <= LIMIT
        assert (small / "org/old/model.safetensors").read_bytes() == model(1, 5)["model.safetensors"]

    def test_a_model_larger_than_the_limit_is_served_and_the_limit_kept(
        self, hub: Hub, cakefs: Cakefs, small: Path
    ) -> None:
        data = published(hub, cakefs, "org/huge", 3, tensors=20, pull=False)
        assert len(data) > 2 * LIMIT
        with (small / "org/huge/model.safetensors").open("rb") as file:
            for at in range(0, len(data), MIB):
                file.seek(at)
                assert file.read(MIB) == data[at : at + MIB]
                assert stored(cakefs) <= LIMIT
        assert stored(cakefs) > LIMIT // 2

    def test_pull_refuses_what_cannot_fit_before_it_fetches(self, hub: Hub, cakefs: Cakefs, small: Path) -> None:
        published(hub, cakefs, "org/huge", 3, tensors=20, pull=False)
        hub.reset()
        refused = cakefs.run("pull", "org/huge", check=False)
        assert refused.returncode == StoreFull.exit_code
        assert "limit" in refused.stderr and "hint:" in refused.stderr
        assert hub.sent("*/model.safetensors") == 0

    def test_what_is_left_free_for_transfers_is_no_room_for_a_pull(self, hub: Hub, cakefs: Cakefs) -> None:
        data = published(hub, cakefs, "org/near", 3, pull=False)
        hub.reset()
        limited = {"CAKEFS_CONFIG": _config(cakefs, limit=str(len(data) + MIB))}
        assert cakefs.run("pull", "org/near", check=False, **limited).returncode == StoreFull.exit_code
        assert hub.sent("*/model.safetensors") == 0

    def test_pinned_models_make_no_room(self, hub: Hub, cakefs: Cakefs, small: Path) -> None:
        published(hub, cakefs, "org/old", 1, tensors=5)
        cakefs.run("pin", "org/old")
        published(hub, cakefs, "org/new", 2, tensors=5, pull=False)
        age(cakefs, 2)
        assert (small / "org/new/model.safetensors").read_bytes() == model(2, 5)["model.safetensors"]
        assert {m["name"]: m["complete"] for m in cakefs.json("ls")} == {"org/old": True, "org/new": False}


def test_without_a_limit_in_the_mount_there_is_none_any_more(hub: Hub, cakefs: Cakefs) -> None:
    published(hub, cakefs, "org/one", 1, pull=False)
    refused = cakefs.run("pull", "org/one", check=False, CAKEFS_CONFIG=_config(cakefs, limit="1 MB"))
    assert refused.returncode == StoreFull.exit_code
    assert cakefs.run("pull", "org/one").returncode == 0


def _config(cakefs: Cakefs, **settings: str) -> str:
    path = cakefs.store.parent / "config.toml"
    path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
    return str(path)


ITEMS = st.one_of(st.uuids().map(str), st.builds(SpanKey, st.uuids().map(str), st.integers(0, 9), st.integers(10, 99)))
RESIDENTS = st.lists(st.builds(Resident, ITEMS, st.integers(1, 10**12), st.floats(0, 1e10)), max_size=20)


@given(RESIDENTS, st.integers(0, 10**13))
def test_a_plan_takes_the_oldest_and_not_one_too_many(candidates: list[Resident], wanted: int) -> None:
    plan = plan_eviction(candidates, wanted)
    chosen = plan.residents
    stay = set(candidates) - set(chosen)
    assert plan.short == max(0, wanted - plan.bytes)
    assert not plan.short or not stay
    assert plan.bytes - (chosen[-1].size if chosen else 0) < max(wanted, 1)
    assert all(gone.used <= kept.used for gone in chosen for kept in stay)


def test_what_cannot_come_back_or_shows_the_model_stays() -> None:
    def key(identity: str, start: int, stop: int) -> SpanKey:
        return SpanKey(identity, start, stop)

    spans = [
        (key("a", 0, 100), "header"),
        (key("a", 100, 200), "weight"),
        (key("a", 200, 300), "twice"),
        (key("gone", 50, 150), "twice"),
        (key("gone", 150, 250), "unknown"),
        (key("b", 0, 900), "opaque"),
        (key("b", 5, 10), "pinned"),
    ]
    begun = [key("a", 0, 50), key("a", 200, 299), key("gone", 0, 20), key("b", 5, 10)]
    listing = [*spans, *((one, one) for one in begun)]
    assert evictable(listing, {"a": 299, "b": 899}, {key("b", 5, 10)}) == {"weight", "opaque", key("a", 200, 299)}


@pytest.mark.parametrize(
    ("path", "size", "front"),
    [
        ("model.safetensors", 10**9, HEADER_LIMIT),
        ("onnx/model.onnx", 9 * MIB, 9 * MIB - 1),
        ("config.json", MIB, MIB),
        ("tokenizer/tokenizer.json", 9 * MIB, 9 * MIB),
        ("tokenizer.model", 9 * MIB, 9 * MIB),
    ],
)
def test_of_a_file_that_is_no_model_all_may_go(path: str, size: int, front: int) -> None:
    assert shown_by(Source(path, "sha256:a", Locator("https://x", size))) == front


@pytest.mark.parametrize(
    ("text", "size"),
    [("1000", 1000), ("200 GB", 200 * 10**9), ("1.5TiB", 3 << 39), ("500M", 500 * 10**6), ("2kib", 2048), ("7b", 7)],
)
def test_sizes_are_read_as_users_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "1 iB", "-5", "1e9", "ten", "5 XB"])
def test_what_is_no_size_is_said(text: str) -> None:
    with pytest.raises(UserError, match="not a size"):
        parse_size(text)
