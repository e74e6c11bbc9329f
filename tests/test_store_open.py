"""Opening a store: formats, foreign directories, read-only and full disks, limits, forks."""

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import lmdb
import pytest

from cakefs.errors import CakeError, CorruptData, StoreFull, UserError
from cakefs.model import CHUNK, Manifest
from cakefs.store import Catalog, Outcome, Store
from tests.store_child import MAP_SIZE, THREE, TWO, chunks, data, key, write

ROOT = Path(__file__).parent.parent


def read(store: Store, name: str, size: int) -> bytes | None:
    content = store.content(key(name, size))
    if content is None:
        return None
    buffer = bytearray(size)
    return bytes(buffer) if content.read_into(memoryview(buffer), 0, wait=True) is Outcome.DONE else None


def manifest(name: str, revision: str = "") -> Manifest:
    return Manifest(name, "", revision, "", 0, (), (), (), ())


def test_a_new_store_is_private(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "store"
    with Store.open(path) as store:
        assert store.path == path
        assert (path / "format").read_text() == "cakefs-store 1\n"
        for directory in [path, *(p for p in path.iterdir() if p.is_dir())]:
            assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    with Store.open(path, create=False):
        pass


def test_no_store_where_none_may_be_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no store"):
        Store.open(tmp_path / "absent", create=False)
    assert not (tmp_path / "absent").exists()


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    Store.open(tmp_path).close()
    (tmp_path / "format").write_text("cakefs-store 2\n")
    with pytest.raises(UserError, match="has format 2") as caught:
        Store.open(tmp_path)
    assert "upgrade" in caught.value.hint


@pytest.mark.parametrize("text", ["", "something else 1", "cakefs-store one", "\xff\xfe"])
def test_an_unknown_format_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "format").write_text(text)
    with pytest.raises(UserError, match="not a cakefs store"):
        Store.open(tmp_path)


def test_other_peoples_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        Store.open(tmp_path)
    with pytest.raises(UserError, match="not a directory"):
        Store.open(tmp_path / "thesis.tex")
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_stores_opened_twice_in_one_process_share_the_catalog(tmp_path: Path) -> None:
    first = Store.open(tmp_path / "store", map_size=MAP_SIZE)
    second = Store.open(tmp_path / "." / "store", map_size=MAP_SIZE)
    first.put_span(key("two", len(TWO)), TWO)
    first.close()
    assert read(second, "two", len(TWO)) == TWO
    second.close()
    with Store.open(tmp_path / "store", map_size=MAP_SIZE) as third:
        assert third.has(key("two", len(TWO)))


def test_a_broken_catalog_is_told(tmp_path: Path) -> None:
    Store.open(tmp_path).close()
    (tmp_path / "catalog" / "data.mdb").write_bytes(b"no catalog" * 5000)
    with pytest.raises(CorruptData, match="broken"):
        Store.open(tmp_path)


FORK = """
import os, sys
from pathlib import Path
from cakefs.store import Store
store = Store.open(Path(sys.argv[1]))
if os.fork() == 0:
    refused = 0
    for use in (store.catalog.models.all, lambda: Store.open(Path(sys.argv[1]))):
        try:
            use()
        except RuntimeError as error:
            refused += "fork" in str(error)
    os._exit(refused)
print(os.waitstatus_to_exitcode(os.wait()[1]), store.catalog.models.all())
"""

LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))
from cakefs.store import Store
from tests.store_child import TWO, key
with Store.open(Path(sys.argv[1])) as store:
    store.put_span(key("two", len(TWO)), TWO)
    print(store.has(key("two", len(TWO))))
"""

GROWER = """
import sys
from pathlib import Path
from cakefs.store import Catalog
from cakefs.model import Manifest
catalog = Catalog.open(Path(sys.argv[1]), map_size=1 << 19)
for i in range(40):
    catalog.models.put(Manifest(f"model-{i}", "", "r" * 50000, "", 0, (), (), (), ()))
"""


def python(code: str, *arguments: str | Path) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True).stdout


@pytest.mark.parametrize("table", ["models", "spans"])
def test_a_catalog_that_lost_a_table_is_broken_and_no_empty_one(tmp_path: Path, table: str) -> None:
    with Store.open(tmp_path / "store", map_size=MAP_SIZE) as store:
        store.catalog.models.put(manifest("model"))
    with lmdb.Environment(str(tmp_path / "store/catalog"), max_dbs=20) as env:
        lost = env.open_db(table.encode(), create=False)
        with env.begin(write=True) as txn:
            txn.drop(lost)
    with pytest.raises(CorruptData, match=f"no table {table}"):
        Store.open(tmp_path / "store", map_size=MAP_SIZE)


def test_a_fork_must_not_use_the_store(tmp_path: Path) -> None:
    assert python(FORK, tmp_path) == "2 {}\n"


def test_little_address_space_is_enough(tmp_path: Path) -> None:
    assert python(LITTLE_MEMORY, tmp_path) == "True\n"


def test_the_catalog_grows(tmp_path: Path) -> None:
    catalog = Catalog.open(tmp_path / "catalog", map_size=1 << 19)
    for i in range(40):
        catalog.models.put(manifest(f"model-{i}", "r" * 50_000))
    assert len(catalog.models.all()) == 40
    catalog.close()


def test_the_catalog_follows_the_growth_of_others(tmp_path: Path) -> None:
    catalog = Catalog.open(tmp_path / "catalog", map_size=1 << 19)
    python(GROWER, tmp_path / "catalog")
    assert len(catalog.models.all()) == 40
    assert catalog.models.generation() == 40
    python(GROWER, tmp_path / "catalog")
    catalog.models.put(manifest("mine"))
    assert len(catalog.models.all()) == 41
    catalog.close()


def test_where_the_catalog_cannot_grow_it_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unwilling:
        """An environment for which the system has no more address space."""

        def __init__(self, real: lmdb.Environment) -> None:
            self._real = real

        def set_mapsize(self, size: int) -> None:
            raise lmdb.MemoryError("mdb_env_set_mapsize", errno.ENOMEM)

        def __getattr__(self, name: str) -> object:
            return getattr(self._real, name)

    catalog = Catalog.open(tmp_path / "catalog", map_size=1 << 19)
    catalog.models.put(manifest("first"))
    monkeypatch.setattr(catalog._env, "_env", Unwilling(catalog._env._env))
    with pytest.raises(StoreFull, match="cannot grow"):
        catalog.models.put(manifest("second", "r" * 1_000_000))
    assert list(catalog.models.all()) == ["first"]
    catalog.models.put(manifest("third"))
    catalog.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "cakefs-test", str(path)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("this machine does not let us mount a tmpfs")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        for size in (65536, 4096):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError as error:
                assert error.errno == errno.ENOSPC


def test_a_full_disk_loses_nothing(disk: Path) -> None:
    with Store.open(disk / "store", map_size=MAP_SIZE) as store:
        store.put_span(key("two", len(TWO)), TWO)
        store.put_span(key("small", 500), data("small", 500))
        complete = write(store, "three", THREE)
        fill(disk / "filler")
        refused: list[str] = []
        attempts: dict[str, Callable[[], object]] = {
            "chunk": lambda: write(store, "more", data("more", 3 * CHUNK)),
            "seal": lambda: store.seal([complete]),
            "small": lambda: store.put_span(key("tiny", 9), b"123456789"),
            "large": lambda: store.put_span(key("large", 9000), data("large", 9000)),
            "literal": lambda: store.put_literal(data("literal", 9000)),
            "model": lambda: store.catalog.models.put(manifest("model", "r" * 100_000)),
            "lease": lambda: store.lease(),
        }
        for name, attempt in attempts.items():
            try:
                attempt()
            except StoreFull as error:
                assert "space" in error.message
                refused.append(name)
            assert read(store, "two", len(TWO)) == TWO
            assert read(store, "small", 500) == data("small", 500)
            assert read(store, "three", len(THREE)) == THREE
        assert {"chunk", "large", "literal", "model"} <= set(refused)
        assert store.content(key("large", 9000)) is None
        assert store.catalog.models.all() == {}
        # There is room again: everything goes on.
        os.unlink(disk / "filler")
        for attempt in attempts.values():
            attempt()
        assert store.seal([complete]) == [complete]
        assert read(store, "large", 9000) == data("large", 9000)
        assert list(store.catalog.models.all()) == ["model"]
        store.sweep()
        assert {d for d, _ in store.blobs.files()} == {d for d, _, inline in store.catalog.blobs() if not inline}


def test_writes_that_find_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, where no small file system can be had: the disk takes half a chunk, then nothing."""
    with Store.open(tmp_path / "store", map_size=MAP_SIZE) as store:
        store.write_chunk(key("three", len(THREE)), 0, chunks(THREE)[0])
        real, left = os.pwrite, CHUNK // 2

        def pwrite(fd: int, content: bytes | memoryview, offset: int) -> int:
            nonlocal left
            if not left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            count = real(fd, memoryview(content)[:left], offset)
            left -= count
            return count

        monkeypatch.setattr(os, "pwrite", pwrite)
        with pytest.raises(StoreFull) as caught:
            store.write_chunk(key("three", len(THREE)), 1, chunks(THREE)[1])
        assert "No space left" in caught.value.message
        monkeypatch.undo()
        content = store.content(key("three", len(THREE)))
        assert content is not None and content.missing(0, len(THREE)) == [1, 2]
        assert content.read_into(memoryview(bytearray(CHUNK)), 0, wait=True) is Outcome.DONE
        for chunk in (1, 2):
            store.write_chunk(key("three", len(THREE)), chunk, chunks(THREE)[chunk])
        assert read(store, "three", len(THREE)) == THREE


@pytest.mark.parametrize("call", ["link", "fsync", "fdatasync"])
def test_no_room_while_sealing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with Store.open(tmp_path / "store", map_size=MAP_SIZE) as store:
        span = write(store, "three", THREE)
        monkeypatch.setattr(os, call, full)
        with pytest.raises(StoreFull):
            store.seal([span])
        monkeypatch.undo()
        assert read(store, "three", len(THREE)) == THREE
        assert list(store.blobs.files()) == []
        assert store.seal([span]) == [span]


def enter(context: AbstractContextManager[None]) -> None:
    with context:
        pass


def test_a_read_only_store_serves_what_it_has(disk: Path) -> None:
    with Store.open(disk / "store", map_size=MAP_SIZE) as store:
        store.put_span(key("two", len(TWO)), TWO)
        store.put_span(key("small", 500), data("small", 500))
        store.write_chunk(key("three", len(THREE)), 0, chunks(THREE)[0])
        store.put_span(key("cut", len(TWO)), data("cut", len(TWO)))
        record = store.catalog.find(key("cut", len(TWO)))
        assert record is not None
        os.truncate(store.blobs.path(record.digest), 5)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with Store.open(disk / "store", map_size=MAP_SIZE) as store:
        assert read(store, "two", len(TWO)) == TWO
        assert read(store, "small", 500) == data("small", 500)
        assert store.content(key("cut", len(TWO))) is None
        assert store.local_bytes([key("three", len(THREE))]) == CHUNK
        attempts: list[Callable[[], object]] = [
            lambda: write(store, "three", THREE),
            lambda: write(store, "new", TWO),
            lambda: store.put_span(key("tiny", 9), b"123456789"),
            lambda: store.catalog.models.put(manifest("model")),
            lambda: store.drop_span(key("two", len(TWO))),
            lambda: store.sweep(),
            lambda: enter(store.guard()),
            lambda: enter(store.guard(exclusive=True)),
            lambda: enter(store.evicting()),
            lambda: enter(store.confirming("sha256:a")),
            lambda: store.leased(),
        ]
        for attempt in attempts:
            with pytest.raises(UserError, match="ead-only"):
                attempt()
        lease = store.lease()
        lease.hold("sha256:a")
        lease.release("sha256:a")
        lease.close()


def test_a_store_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store.open(tmp_path / "store").close()

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(lmdb, "Environment", denied)
    with pytest.raises(UserError, match="Permission denied"):
        Store.open(tmp_path / "store")
    monkeypatch.undo()
    with Store.open(tmp_path / "store") as store:
        monkeypatch.setattr(os, "open", denied)
        with pytest.raises(UserError, match="Permission denied"):
            store.write_chunk(key("two", len(TWO)), 0, chunks(TWO)[0])


def test_a_failing_disk_is_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Store.open(tmp_path / "store") as store:
        monkeypatch.setattr(os, "pwrite", failing)
        with pytest.raises(CakeError) as caught:
            store.write_chunk(key("two", len(TWO)), 0, chunks(TWO)[0])
        assert type(caught.value) is CakeError
        assert "\n" not in caught.value.message
