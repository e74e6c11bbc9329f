"""The whole engine against a dict of bytes: a hypothesis state machine that adds, reads, pulls, evicts, damages, kills
and restarts at random, and knows what each shown file must contain.

Two apps in threads of their own (each with a transfer process) and a third opening of the store, which does what the
commands do, share one store: as the mount, another mount and a shell would.
"""

import itertools
import json
import os
import random
import shutil
import signal
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import numpy as np
import trio
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from numpy.typing import NDArray

from cakefs.app import App, open_app
from cakefs.config import Config
from cakefs.engine import evict, jobs
from cakefs.engine.local import stream
from cakefs.engine.models import views
from cakefs.engine.models.sources import parse_source
from cakefs.engine.read import FileReader
from cakefs.engine.serve import library
from cakefs.engine.serve.library import Library
from cakefs.engine.verify import Verifier
from cakefs.errors import CakeError, RemoteUnavailable
from cakefs.model import CHUNK, SpanKey, View
from cakefs.plan.recipe import ModelRef, Repeat
from cakefs.store.store import Store
from tests.fs_child import eventually
from tests.hub import Hub
from tests.models import sharded, single, tensor

T = TypeVar("T")
Tensors = dict[str, NDArray[np.float32]]
Shown = Mapping[tuple[View, str], bytes]

LARGE = CHUNK * 12 // 10 // 4  # Values of a tensor that spans two chunks.
VERSIONS = 3  # Of each repository.
LAYERS = 3
CONFIG = json.dumps({"model_type": "llama", "num_hidden_layers": LAYERS}).encode()
WEIGHTS = "model.safetensors"
# What passes without a reader noticing.
PASSING = ["drop", "reset", "short", "long", "wrong-range", "no-range", "500", "503", "expired", "slow", "429"]
LASTING = ["404", "403"]


def weights(repo: str, version: int) -> Tensors:
    """Layer 1 is another one in each version and repository; the others are those of all."""
    own = 1000 * version + 100 * ord(repo[-1])
    named: Tensors = {"model.embed_tokens.weight": tensor(1, 64, 32), "model.norm.weight": tensor(2, 2000)}
    for layer in range(LAYERS):
        seed = own if layer == 1 else layer
        named[f"model.layers.{layer}.mlp.down_proj.weight"] = tensor(10 + seed, LARGE)
        named[f"model.layers.{layer}.input_layernorm.weight"] = tensor(20 + seed, 96)
    return named


class Version(NamedTuple):
    """A state of a repository: what is published, what is shown of it, and its tensors."""

    files: dict[str, bytes]
    shown: Shown
    tensors: Tensors


@cache
def version_of(repo: str, number: int) -> Version:
    """org/a is a single file with a large opaque one beside it; org/b comes in shards."""
    tensors = weights(repo, number)
    small = {"config.json": CONFIG, "README.md": f"{repo} {number}\n".encode() * 50}
    if repo == "org/a":
        opaque = tensor(number + 7, CHUNK * 3 // 2 // 4).tobytes()
        files = small | {WEIGHTS: single(tensors), "onnx/model.onnx": opaque}
        shown = {(view, path): data for view in View if view is not View.BOTH for path, data in files.items()}
        return Version(files, shown, tensors)
    parts = sharded(tensors, 2)
    files = small | parts
    shown = {(View.ORIGINAL, path): data for path, data in files.items()}
    shown |= {(View.MODEL, path): data for path, data in (small | {WEIGHTS: single(tensors)}).items()}
    return Version(files, shown, tensors)


class Running:
    """An app with its library, in a thread of its own."""

    def __init__(self, config: Config) -> None:
        self.offline = config.offline
        self._config = config
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="app")
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:
            self._failure = error
            self._ready.set()

    async def _main(self) -> None:
        self.app: App
        async with open_app(self._config) as self.app, self.app.library() as self.library:
            self._token = trio.lowlevel.current_trio_token()
            self._stop = trio.Event()
            self._ready.set()
            await self._stop.wait()

    def call(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Runs an async function in the app's thread."""
        return trio.from_thread.run(function, *args, trio_token=self._token)

    def call_sync(self, function: Callable[..., T], *args: Any) -> T:
        return trio.from_thread.run_sync(function, *args, trio_token=self._token)

    def close(self) -> None:
        trio.from_thread.run_sync(self._stop.set, trio_token=self._token)
        self._thread.join()
        if self._failure is not None:
            raise self._failure


class Handle(NamedTuple):
    """A file that stays open, and what it must contain whatever happens to its name."""

    running: Running
    reader: FileReader
    expected: bytes


async def read_range(reader: FileReader, offset: int, size: int) -> bytes:
    hit = reader.try_read(offset, size)
    return bytes(hit if hit is not None else await reader.read(offset, size))


def open_file(library: Library, name: str, view: View, path: str) -> FileReader:
    manifest_id = library.names()[name]
    return library.open(manifest_id, library.manifest(manifest_id).shown(view)[path])


APPS = st.integers(0, 1)
REPOS = st.sampled_from(["org/a", "org/b"])
PICK = st.integers(0, 1 << 16)  # One of what there is, by its number modulo their count.
PART = st.floats(0, 1)


class Engine(RuleBasedStateMachine):
    """The rules. `models` is all that the model is: name -> file -> bytes.

    Args:
        hub: Shared by all examples; its repositories are set back at the beginning of each.
    """

    def __init__(self, hub: Hub) -> None:
        super().__init__()
        self.hub = hub
        hub.clear_faults()
        self.directory = Path(tempfile.mkdtemp(prefix="cakefs-model-"))
        self.published: dict[str, int] = {}
        for repo in ("org/a", "org/b"):
            self._publish(repo, 0)
        self._patch = mock.patch.object(library, "LET_GO_S", 0.1)
        self._patch.start()
        self.store = Store.open(self.directory / "store")
        self.models: dict[str, Shown] = {}
        self.tensors: dict[str, Tensors] = {}
        self.pinned: set[str] = set()
        self.apps = [self._start(offline=False) for _ in range(2)]
        self.handles: list[Handle] = []
        self.refused = False  # Upstream refuses everything.
        self.serial = itertools.count()

    # Parts

    def _start(self, *, offline: bool) -> Running:
        place = self.directory / "store"
        config = Config(
            store=place,
            mountpoint=place / "mnt",
            endpoint=self.hub.endpoint,
            read_timeout_s=30.0,
            workers=1,
            connections=4,
            offline=offline,
            on_demand=False,
        )
        return Running(config)

    def _publish(self, repo: str, version: int) -> None:
        self.hub.add_repo(repo, version_of(repo, version).files)
        self.published[repo] = version

    def _name(self, pick: int) -> str:
        return sorted(self.models)[pick % len(self.models)]

    def _file(self, pick: int) -> tuple[str, View, str, bytes]:
        files = [(name, view, path) for name in sorted(self.models) for view, path in sorted(self.models[name])]
        name, view, path = files[pick % len(files)]
        return name, view, path, self.models[name][view, path]

    def _may_fail(self, running: Running) -> bool:
        return self.refused or running.offline

    def _check(self, running: Running, reader: FileReader, expected: bytes, offset: int, size: int) -> None:
        try:
            got = running.call(read_range, reader, offset, size)
        except CakeError as error:
            assert self._may_fail(running), f"a read failed without a reason: {error}"
        else:
            assert got == expected[offset : offset + size], f"wrong bytes in {offset}+{size}"

    def _read(self, running: Running, name: str, view: View, path: str, offset: int, size: int) -> None:
        expected = self.models[name][view, path]
        reader = running.call_sync(open_file, running.library, name, view, path)
        try:
            assert reader.size == len(expected)
            self._check(running, reader, expected, offset, size)
        finally:
            running.call_sync(reader.close)

    def _online(self, app: int) -> Running | None:
        """An app that can fetch."""
        running = self.apps[app] if not self.apps[app].offline else self.apps[1 - app]
        return None if self._may_fail(running) else running

    def _pull(self, running: Running, name: str) -> int:
        manifest = self.store.catalog.models.manifest(self.store.catalog.models.all()[name].manifest)
        return running.call(jobs.pull, running.app.store, running.app.fetcher, manifest, manifest.files, lambda _: None)

    def _quiet(self) -> None:
        """Waits until nothing is fetched any more, sealed or confirmed."""
        for running in self.apps:
            assert eventually(lambda r=running: not r.app.fetcher.on_their_way)  # type: ignore[misc]
            running.call(running.app.fetcher.flush)

    # Names

    @rule(repo=REPOS, app=APPS)
    def add(self, repo: str, app: int) -> None:
        running = self._online(app)
        if running is not None:
            version = version_of(repo, self.published[repo])
            running.call(_add, running.app, repo)
            self.models[repo], self.tensors[repo] = version.shown, version.tensors

    @rule(repo=REPOS, version=st.integers(0, VERSIONS - 1))
    def publish(self, repo: str, version: int) -> None:
        self._publish(repo, version)

    @precondition(lambda self: self.models)
    @rule(pick=PICK)
    def remove(self, pick: int) -> None:
        name = self._name(pick)
        assert self.store.catalog.models.remove(name)
        del self.models[name]
        self.tensors.pop(name, None)
        self.pinned.discard(name)

    @precondition(lambda self: self.tensors)
    @rule(pick=PICK, first=st.integers(0, LAYERS - 1), size=st.integers(1, LAYERS), whole=st.booleans())
    def slice(self, pick: int, first: int, size: int, whole: bool) -> None:
        parent = sorted(self.tensors)[pick % len(self.tensors)]
        layers = range(first, min(first + size, LAYERS))
        tensors = {n: t for n, t in self.tensors[parent].items() if _layer(n) in layers or (whole and _layer(n) < 0)}
        self._made(parent, f"slice-{next(self.serial) % 3}", tensors, None, layers, whole)

    @precondition(lambda self: self.tensors)
    @rule(pick=PICK, layers=st.lists(st.integers(0, LAYERS - 1), min_size=1, max_size=4))
    def merge(self, pick: int, layers: list[int]) -> None:
        parent = sorted(self.tensors)[pick % len(self.tensors)]
        own = self.tensors[parent]
        tensors = {name: t for name, t in own.items() if _layer(name) < 0}
        for number, layer in enumerate(layers):
            old, new = f"model.layers.{layer}.", f"model.layers.{number}."
            tensors |= {name.replace(old, new): t for name, t in own.items() if name.startswith(old)}
        self._made(parent, f"merge-{next(self.serial) % 3}", tensors, layers, range(0), True)

    def _made(
        self, parent: str, name: str, tensors: Tensors, repeat: list[int] | None, layers: range, whole: bool
    ) -> None:
        try:
            if repeat is None:
                numbers = ",".join(map(str, layers))
                views.slice_model(
                    self.store, parent, numbers, name, update=True, with_embeddings=whole, with_head=whole
                )
            else:
                recipe = Repeat(ModelRef(parent, "MODEL"), layers=tuple(repeat))
                views.merge_models(self.store, recipe, name, update=True)
        except CakeError as error:
            assert "config" in error.message, error  # Damaged, and a view fetches nothing.
            return
        self.models[name] = {(View.MODEL, WEIGHTS): single(tensors)}

    @precondition(lambda self: self.models)
    @rule(pick=PICK, pinned=st.booleans())
    def pin(self, pick: int, pinned: bool) -> None:
        name = self._name(pick)
        self.store.catalog.models.set_pinned(name, pinned)
        (self.pinned.add if pinned else self.pinned.discard)(name)

    # Reading

    @precondition(lambda self: self.models)
    @rule(app=APPS, pick=PICK, at=PART, size=st.sampled_from([1, 4096, 65_536, CHUNK, 3 * CHUNK]), ahead=st.booleans())
    def read(self, app: int, pick: int, at: float, size: int, ahead: bool) -> None:
        """Args: ahead: Of what is fetched ahead, hardly a tensor stays in parts."""
        self.apps[app].app.reading.readahead = ahead
        name, view, path, expected = self._file(pick)
        self._read(self.apps[app], name, view, path, int(at * len(expected)), size)

    @precondition(lambda self: self.models)
    @rule(app=APPS, pick=PICK)
    def read_all(self, app: int, pick: int) -> None:
        name, view, path, expected = self._file(pick)
        self._read(self.apps[app], name, view, path, 0, len(expected))

    @precondition(lambda self: self.models)
    @rule(app=APPS, pick=PICK)
    def open(self, app: int, pick: int) -> None:
        name, view, path, expected = self._file(pick)
        running = self.apps[app]
        reader = running.call_sync(open_file, running.library, name, view, path)
        self.handles.append(Handle(running, reader, expected))

    @precondition(lambda self: self.handles)
    @rule(pick=PICK, at=PART, size=st.sampled_from([4096, CHUNK]))
    def read_open(self, pick: int, at: float, size: int) -> None:
        handle = self.handles[pick % len(self.handles)]
        self._check(handle.running, handle.reader, handle.expected, int(at * len(handle.expected)), size)

    @precondition(lambda self: self.handles)
    @rule(pick=PICK)
    def close(self, pick: int) -> None:
        handle = self.handles.pop(pick % len(self.handles))
        handle.running.call_sync(handle.reader.close)

    # Keeping and giving up

    @precondition(lambda self: self.models)
    @rule(app=APPS, pick=PICK)
    def pull(self, app: int, pick: int) -> None:
        running = self._online(app)
        if running is not None:
            self._pull(running, self._name(pick))

    @precondition(lambda self: self.models)
    @rule(pick=PICK, idle=st.booleans())
    def evict(self, pick: int, idle: bool) -> None:
        """Args: idle: The apps have nothing open any more that they served from."""
        self._let_go(idle)
        manifest = self.store.catalog.models.manifest(self.store.catalog.models.all()[self._name(pick)].manifest)
        with self._sparing_pinned():
            evict.evict(self.store, evict.eviction_of(self.store, manifest))

    @precondition(lambda self: self.models)
    @rule(size=st.integers(1, 8 * CHUNK), idle=st.booleans())
    def make_room(self, size: int, idle: bool) -> None:
        """As below a limit that is reached; nothing is too fresh."""
        self._let_go(idle)
        with self._sparing_pinned(), mock.patch.object(evict, "FRESH_S", 0.0):
            evict.make_room(self.store, size, evict.used_bytes(self.store))

    def _let_go(self, idle: bool) -> None:
        for running in self.apps if idle else ():
            running.call_sync(running.app.reading.pool.discard_all)

    @contextmanager
    def _sparing_pinned(self) -> Iterator[None]:
        pinned = {p: self._intact(p) for p in self.pinned}
        yield
        assert all(self._intact(p) >= before for p, before in pinned.items()), "evicted what is pinned"

    @rule()
    def gc(self) -> None:
        self._quiet()
        before = {name: self._intact(name) for name in self.models}
        jobs.collect(self.store)
        for name in self.models:
            assert self._intact(name) >= before[name], f"gc took bytes of {name}"

    @precondition(lambda self: self.models)
    @rule(pick=PICK)
    def repair(self, pick: int) -> None:
        manifest = self.store.catalog.models.manifest(self.store.catalog.models.all()[self._name(pick)].manifest)
        Verifier(self.store, repair=True).verify(manifest, lambda _: None)
        self._quiet()
        again = Verifier(self.store, repair=False).verify(manifest, lambda _: None)
        assert (again.bad, again.lost) == ([], [])

    def _intact(self, name: str) -> set[SpanKey]:
        """The spans of a model whose bytes are all here and good."""
        manifest = self.store.catalog.models.manifest(self.store.catalog.models.all()[name].manifest)
        return {key for i, s in enumerate(manifest.spans) if s.size and self._is_intact(key := manifest.key(i))}

    def _is_intact(self, key: SpanKey) -> bool:
        try:
            return self.store.has(key) and sum(map(len, stream(self.store, key, memoryview(bytearray(CHUNK))))) > 0
        except CakeError:
            return False

    # Misfortune

    @rule(pick=PICK, at=PART, kind=st.sampled_from(["flip", "truncate", "delete"]))
    def damage(self, pick: int, at: float, kind: str) -> None:
        """To a file of the store, while nothing is written; who has it open opens it anew, as what was checked after
        it was opened is not checked again."""
        self._quiet()
        place = self.directory / "store"
        found = sorted([*(place / "blobs").glob("??/*"), *(place / "partial").iterdir()])
        if not found:
            return
        path = found[pick % len(found)]
        size = path.stat().st_size
        if kind == "delete":
            path.unlink()
        elif kind == "truncate":
            os.truncate(path, int(at * size))
        elif size:
            _flip(path, min(int(at * size), size - 1))
            for running in self.apps:
                running.call_sync(running.app.reading.pool.discard_all)

    @rule(kind=st.sampled_from(PASSING), after=st.integers(0, 2 * CHUNK), times=st.integers(1, 2))
    def passing_fault(self, kind: str, after: int, times: int) -> None:
        options: dict[str, Any] = {"retry_after": 0.1} if kind == "429" else {}
        options |= {"rate": 4_000_000.0} if kind == "slow" else {}
        stage = {"stage": "resolve"} if kind.isdigit() else {}
        after = 0 if kind.isdigit() or kind in ("expired", "no-range", "wrong-range", "long") else after
        self.hub.fault(kind, times=times, after=after, **options, **stage)

    @rule(kind=st.sampled_from(LASTING))
    def refuse(self, kind: str) -> None:
        self._quiet()
        self.hub.fault(kind, times=None, stage=["resolve", "cache", "cdn"])
        self.refused = True

    @rule()
    def calm(self) -> None:
        self.hub.clear_faults()
        self.refused = False

    @precondition(lambda self: self.models)
    @rule(app=APPS, pick=PICK, at=PART)
    def corrupt_answer(self, app: int, pick: int, at: float) -> None:
        """A wrong byte from upstream is found when the file is complete, and then nobody serves it any more."""
        running, name = self._online(app), self._name(pick)
        if running is None or name not in self.tensors:
            return
        self._quiet()
        self.hub.clear_faults()
        files = {path: data for (view, path), data in self.models[name].items() if view is View.ORIGINAL}
        path = random.Random(pick).choice(sorted(files))
        self.hub.fault("corrupt", f"{name}/{path}", position=int(at * (len(files[path]) - 1)))
        self._pull(running, name)
        self.hub.clear_faults()
        assert eventually(lambda: self._serve_right(name))

    def _serve_right(self, name: str) -> bool:
        try:
            for running in self.apps:
                for (view, path), data in self.models[name].items():
                    self._read(running, name, view, path, 0, len(data))
        except AssertionError:
            return False
        return True

    @rule(app=APPS)
    def kill_transfers(self, app: int) -> None:
        for pid in self.apps[app].app.fetcher.pids():
            with suppress(ProcessLookupError):  # killed a moment ago, and not yet noticed
                os.kill(pid, signal.SIGKILL)

    @rule(app=APPS, offline=st.booleans())
    def restart(self, app: int, offline: bool) -> None:
        old = self.apps[app]
        self.handles = [handle for handle in self.handles if handle.running is not old]
        old.close()
        self.apps[app] = self._start(offline=offline)

    # Always

    @invariant()
    def names_are_those_of_the_model(self) -> None:
        for running in self.apps:
            assert set(running.library.names()) == set(self.models)

    def teardown(self) -> None:
        try:
            self._end()
        finally:
            self._patch.stop()
            for running in self.apps:
                running.close()
            self.store.close()
            shutil.rmtree(self.directory)

    def _end(self) -> None:
        """When all misfortune is over everything works again, everywhere, and then offline; nothing is left over."""
        self.calm()
        for app in range(2):
            if self.apps[app].offline:
                self.restart(app, False)
        for handle in self.handles:
            self._check(handle.running, handle.reader, handle.expected, 0, len(handle.expected))
        for name, files in self.models.items():
            for view, path in files:
                for running in self.apps:
                    self._read(running, name, view, path, 0, len(files[view, path]))
        self._quiet()
        for name in self.models:
            manifest = self.store.catalog.models.manifest(self.store.catalog.models.all()[name].manifest)
            Verifier(self.store, repair=True).verify(manifest, lambda _: None)
        for name in self.models:
            self._pull(self.apps[0], name)
            manifest = self.store.catalog.models.manifest(self.store.catalog.models.all()[name].manifest)
            found = Verifier(self.store, repair=False).verify(manifest, lambda _: None)
            assert (found.bad, found.lost) == ([], [])
        self._quiet()
        self._offline()
        for name in list(self.models):
            self.store.catalog.models.remove(name)
        for handle in self.handles:
            handle.running.call_sync(handle.reader.close)
        assert eventually(lambda: jobs.gc_plan(self.store).held == [])
        jobs.collect(self.store)
        left = [p for d in ("blobs", "partial", "quarantine") for p in (self.store.path / d).rglob("*") if p.is_file()]
        assert left == []

    def _offline(self) -> None:
        running = self._start(offline=True)
        try:
            for name, files in self.models.items():
                for view, path in files:
                    expected = files[view, path]
                    reader = running.call_sync(open_file, running.library, name, view, path)
                    try:
                        got = running.call(read_range, reader, 0, len(expected))
                    except RemoteUnavailable as error:
                        raise AssertionError(f"not all of {name} is here after a pull: {error}") from error
                    finally:
                        running.call_sync(reader.close)
                    assert got == expected
        finally:
            running.close()


async def _add(app: App, repo: str) -> None:
    await app.add(parse_source(repo, None), repo, update=True)


def _layer(name: str) -> int:
    """The layer's number, -1 for what is none."""
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else -1


def _flip(path: Path, at: int) -> None:
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))
