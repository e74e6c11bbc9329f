"""A store as one run of a scenario uses it, what is published, and what must hold of the store after a crash."""

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

import trio

from cakefs.app import open_app
from cakefs.config import Config
from cakefs.engine.read import FileReader
from cakefs.engine.serve.library import Library
from cakefs.errors import CakeError, RemoteUnavailable
from cakefs.model import CHUNK, View
from cakefs.store.backup import check, copy_path
from cakefs.store.catalog import Catalog
from cakefs.store.content import Outcome
from cakefs.store.store import Store
from tests.inline import Inline
from tests.models import CONFIG, llama, sharded, single, tensor
from tests.reference_model import open_file, read_range

WEIGHTS = "model.safetensors"
ONE, TWO, LARGE = "org/one", "org/two", "org/large"


@cache
def published() -> dict[str, dict[str, bytes]]:
    """By repository: a file with a layer in common with shards, and one with a tensor of several chunks."""
    one, two = llama(2, seed=1, width=96), llama(2, seed=2, width=96)
    common = {name: one[name] for name in one if "layers.0" in name}
    large = {"large": tensor(7, (CHUNK + 3000) // 4), "small": tensor(8, 3000), "tiny": tensor(9, 30)}
    return {
        ONE: {WEIGHTS: single(one), "config.json": CONFIG},
        TWO: sharded(two | common, 2) | {"config.json": CONFIG, "notes.txt": b"two " * 2000},
        LARGE: {WEIGHTS: single(large)},
    }


@cache
def shown() -> Mapping[str, Mapping[str, bytes]]:
    """What each name must show, also those that scenarios make."""
    one, two = llama(2, seed=1, width=96), llama(2, seed=2, width=96)
    merged = single(two | {name: one[name] for name in one if "layers.0" in name})
    layer = single({name: one[name] for name in one if "layers.1" in name})
    twice = {name.replace("layers.0", "layers.1"): one[name] for name in one if "layers.1" not in name}
    small = {path: published()[TWO][path] for path in ("config.json", "notes.txt")}
    return {
        ONE: published()[ONE],
        TWO: small | {WEIGHTS: merged},
        LARGE: published()[LARGE],
        "slice": {WEIGHTS: layer},
        "twice": {WEIGHTS: single(twice | {name: one[name] for name in one if "layers.1" not in name})},
        "mine": published()[ONE],
        "copied": small | {WEIGHTS: merged},
    }


class Place(Inline):
    """Commands on a store of its own; everything that they change is below `directory`.

    Args:
        lenders: A directory that is borrowed from.
    """

    def __init__(self, directory: Path, endpoint: str, lenders: Path, config: str) -> None:
        super().__init__(directory, endpoint, CAKEFS_CONFIG=config)
        self.directory = directory
        self.lenders = lenders
        self.out = directory / "out"

    def names(self) -> set[str]:
        with Store.open(self.store, create=False) as store:
            return set(store.catalog.models.all())

    def copied(self) -> set[str]:
        """The models in the copy of the catalog, which is whole where there is one."""
        copy = copy_path(self.store)
        if not copy.exists():
            return set()
        assert copy.stat().st_size, "a copy of the catalog without a byte"
        with tempfile.TemporaryDirectory(dir=self.directory.parent) as directory:  # LMDB writes beside what it opens
            shutil.copy(copy, directory)
            check(Path(directory))
            catalog = Catalog.open(Path(directory))
            try:
                return set(catalog.models.all())
            finally:
                catalog.close()

    def pulled(self, *names: str) -> bool:
        """Whether all bytes of these can be had offline."""
        return set(names) <= self.names() and not self.missing(names)

    def keeps(self, names: Iterable[str], *, whole: bool) -> bool:
        names = tuple(names)  # Where there are none there may be no store.
        return not names or (self.pulled(*names) if whole else set(names) <= self.names())

    def missing(self, names: Iterable[str]) -> int:
        """Chunks of what these show that are not here; raises AssertionError for a wrong byte."""
        return trio.run(self._missing, names)

    async def _missing(self, names: Iterable[str]) -> int:
        config = Config(store=self.store, mountpoint=self.store / "mnt", offline=True, on_demand=False)
        async with open_app(config) as app, app.library() as library:
            return sum([await _missing(library, name, path) for name in names for path in shown()[name]])

    def arrived(self, name: str) -> dict[str, set[tuple[int, int]]]:
        """The chunks that are here and good: ranges of upstream files, by identity."""
        found: dict[str, set[tuple[int, int]]] = {}
        with Store.open(self.store, create=False) as store:
            manifest = store.catalog.models.manifest(store.catalog.models.all()[name].manifest)
            for key in (manifest.key(i) for i, span in enumerate(manifest.spans) if span.size):
                content = store.content(key)
                for at in range(key.start, key.stop, CHUNK):
                    part = memoryview(bytearray(min(CHUNK, key.stop - at)))
                    if content and content.read_into(part, at - key.start, wait=True) is Outcome.DONE:
                        found.setdefault(key.identity, set()).add((at, at + len(part)))
        return found

    def check_served(self, *, damaged: bool = False) -> None:
        """Every byte that is served is right. Args: damaged: So that errors are what may be told."""
        with suppress(*[CakeError] * damaged):
            for name in self.names() if (self.store / "format").exists() else ():
                with suppress(*[CakeError] * damaged):
                    self.missing([name])
        for path in self.out.glob("[!.]*"):
            assert path.read_bytes() == shown()[TWO][path.name], f"{path} was exported, and is wrong"

    def heal(self, names: Iterable[str]) -> None:
        """What can be had from upstream is whole after what the user is told to do."""
        self.run("verify", "--repair", check=False)
        for name in names:
            self.run("add", name)
            if self.missing([name]):
                self.run("pull", name)
        assert self.pulled(*names)
        self.check_clean()

    def check_clean(self) -> None:
        """Nothing that is stored is bad; without models and after gc nothing is left over."""
        self.run("verify")
        if names := self.names():
            self.run("rm", *names)
        self.run("gc")
        left = {str(p.relative_to(self.store)) for p in self.store.rglob("*") if p.is_file()}
        locks = {path for path in left if path.endswith(".lock")}
        left -= locks | {path for path in left if path.startswith("catalog-broken-")}
        assert left == {"format", "catalog/data.mdb", "catalog/lock.mdb", "backup/data.mdb"}, left
        assert list((self.store / "run").iterdir()) == []


async def _missing(library: Library, name: str, path: str) -> int:
    data, reader = shown()[name][path], open_file(library, name, View.MODEL, path)
    try:
        assert reader.size == len(data)
        return sum([await _is_missing(reader, data, at) for at in range(0, len(data), CHUNK)])
    finally:
        reader.close()


async def _is_missing(reader: FileReader, data: bytes, at: int) -> bool:
    try:
        got = await read_range(reader, at, min(CHUNK, len(data) - at))
    except RemoteUnavailable:
        return True
    assert got == data[at : at + CHUNK], f"wrong bytes at {at}"
    return False
