"""One LMDB environment per process and directory: opening, transactions, growth, and LMDB's errors made ours.

LMDB's locks belong to a process, so an environment must not be opened twice in one: `Environment.open` counts users.
For the same reason none may cross a fork: a child that touches one gets a RuntimeError. Transactions are short, and
each belongs to the thread that began it. The map is large and sparse; where the system grants less address space it
starts small and doubles, for which all other transactions of this process have to be over (the gate).
"""

import errno
import hashlib
import os
import secrets
import shutil
import struct
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import lmdb
import msgspec

from cakefs.errors import CakeError, CorruptData, StoreFull, UserError
from cakefs.model import GIB, KIB, MIB
from cakefs.store.files import sync_directories, sync_file, unlink

# Address space, not disk. A thousand models of a thousand tensors need about 1 GiB.
MAP_SIZE = 64 * GIB
SMALLEST_MAP = 16 * MIB
NEW = ".new-"  # Begins the name of an environment that is being made.
# One slot per concurrent read transaction of all processes; a slot is 64 bytes.
MAX_READERS = 512
MAX_TABLES = 16
LARGEST_WRITE = 256 * KIB  # By LMDB: 64 pages together.

_ERRNOS = (errno.EROFS, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EIO)
_BROKEN = (
    lmdb.InvalidError,
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.VersionMismatchError,
    lmdb.PanicError,
    lmdb.BadTxnError,  # what follows any of these in its transaction
    lmdb.CursorFullError,
    lmdb.PageFullError,
)
# What rows raise that are not as they were written.
_GARBLED = (msgspec.MsgspecError, struct.error, UnicodeError, KeyError)

T = TypeVar("T")
if TYPE_CHECKING:
    Transaction = lmdb.Transaction[memoryview]
    Table = lmdb._Database

_registry: dict[Path, "Environment"] = {}
_registry_lock = threading.Lock()


class Environment:
    """LMDB at `path`. Made by `open`, ended by one `close` for each `open`.

    Attributes:
        table: The handles of the tables, by name.
        readonly: On a read-only file system: reads work, writes raise UserError.
    """

    def __init__(self, path: Path, tables: Mapping[str, bool], required: Collection[str], map_size: int) -> None:
        self.path = path
        self.readonly = False
        self.table: dict[str, Table] = {}
        self._names = tables
        self._required = required
        self._users = 0
        self._pid = os.getpid()
        self._gate = _Gate()
        self._connect(map_size)

    @classmethod
    def open(
        cls, path: Path, tables: Mapping[str, bool], required: Collection[str], *, map_size: int = MAP_SIZE
    ) -> "Environment":
        """Opens or creates; `tables` maps names to whether a key has many values. No environment is without those that
        are required.

        Raises:
            UserError: It may not be read.
            CorruptData: It is no LMDB environment, or a broken one.
        """
        path = path.resolve()
        with _registry_lock:
            env = _registry.get(path)
            if env is None:
                with _translated(path):
                    env = _registry[path] = cls(path, tables, required, map_size)
            env._check_process()
            env._users += 1
            return env

    def close(self) -> None:
        with _registry_lock:
            self._users -= 1
            if not self._users and self._pid == os.getpid():
                del _registry[self.path]
                self._env.close()

    @contextmanager
    def read(self) -> Iterator["Transaction"]:
        """A read transaction. The buffers it hands out end with it: copy what you keep."""
        self._check_process()
        try:
            txn = self._enter_read()
            try:
                with txn:
                    yield txn
            finally:
                self._gate.leave()
        except lmdb.Error as error:
            raise _catalog_error(error, self.path) from error
        except _GARBLED as error:
            raise _broken(self.path, f"a row makes no sense ({error})") from error

    def write(self, work: "Callable[[Transaction], T]") -> T:
        """Runs `work` in a write transaction and commits it durably. It runs again after the map has grown."""
        self._check_process()
        if self.readonly:
            raise UserError(f"store {self.path.parent} is on a read-only file system: it only serves what it has")
        with _translated(self.path):
            while True:
                try:
                    return self._write_once(work)
                except lmdb.MapResizedError:
                    self._resize(0)
                except lmdb.MapFullError:
                    self._resize(2 * self._env.info()["map_size"])

    @property
    def changed(self) -> bool:
        """Whether anybody has written since we opened it."""
        return self._env.info()["last_txnid"] != self._began

    @property
    def used_bytes(self) -> int:
        """Up to its last page."""
        self._check_process()
        return (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]

    def copy(self, directory: Path) -> None:
        """As it is now, into an empty directory, without its free pages."""
        self._check_process()
        with _translated(self.path):
            self._gate.enter()
            try:
                self._env.copy(str(directory), compact=True)
            finally:
                self._gate.leave()

    def walk(self) -> None:
        """Touches every row. Raises CorruptData where they are not in order."""
        with self.read() as txn:
            for name, table in self.table.items():
                many = self._names[name]
                keys = ((bytes(key), bytes(value) if many else b"") for key, value in txn.cursor(table))
                if any(after <= before for before, after in pairwise(keys)):
                    raise _broken(self.path, f"the rows of {name} are not in order")

    def digest(self) -> bytes:
        """A hash of all rows."""
        hasher = hashlib.blake2b()
        with self.read() as txn:
            for table in self.table.values():
                for key, value in txn.cursor(table):
                    hasher.update(struct.pack("<QQ", len(key), len(value)))
                    hasher.update(key)
                    hasher.update(value)
        return hasher.digest()

    def rewrite(self) -> None:
        """Writes every row once more, as it is: some damage is met only by who changes a page. May end the process."""
        for name, table in self.table.items():
            with self.read() as txn:
                keys = [(bytes(key), bytes(value) if self._names[name] else None) for key, value in txn.cursor(table)]
            self.write(partial(_put_again, keys=keys, table=table))

    def copy_file(self, directory: Path) -> None:
        """The file itself, as it is now, with all damage: nobody writes to it meanwhile."""
        self.write(lambda txn: shutil.copy(self.path / "data.mdb", directory))

    def _write_once(self, work: "Callable[[Transaction], T]") -> T:
        self._gate.enter()
        try:
            with self._env.begin(write=True, buffers=True) as txn:
                return work(txn)
        finally:
            self._gate.leave()

    def _enter_read(self) -> "Transaction":
        """Begins a read transaction, inside the gate."""
        while True:
            self._gate.enter()
            try:
                return self._env.begin(buffers=True)
            except lmdb.MapResizedError:  # another process made the map larger
                self._gate.leave()
                self._resize(0)
            except BaseException:
                self._gate.leave()
                raise

    def _resize(self, map_size: int) -> None:
        """Enlarges the map; with 0 adopts the size that another process gave it."""
        with self._gate.alone():
            before = self._env.info()["map_size"]
            if 0 < map_size <= before:
                return  # another thread was here first
            try:
                self._env.set_mapsize(map_size)
            except lmdb.MemoryError as error:
                self._env.close()  # LMDB has unmapped it already
                self._connect(before)
                raise StoreFull(
                    f"catalog {self.path} cannot grow beyond {before} bytes of address space",
                    hint="raise the limit of virtual memory (ulimit -v)",
                ) from error

    def _connect(self, map_size: int) -> None:
        if not (self.path / "data.mdb").exists():
            _make(self.path)
        self._env = self._open_what_fits(map_size)
        self._began = self._env.info()["last_txnid"]
        self._hold_up()
        self._env.reader_check()  # slots of killed processes would keep old pages from being reused
        self.table = self._open_tables()

    def _open_tables(self) -> dict[str, "Table"]:
        """Makes those that are not there: all in a new environment, in one that has tables only what later versions
        added. One that lost others is broken, and no empty one."""
        new = not self._env.stat()["entries"]
        missing = []
        found: dict[str, Table] = {}
        for name, dupsort in self._names.items():
            try:
                # Without a transaction of ours: handles opened in a read transaction are lost when py-lmdb resets it.
                found[name] = self._env.open_db(name.encode(), dupsort=dupsort, create=False)
            except lmdb.NotFoundError:
                if self.readonly or (name in self._required and not new):
                    raise lmdb.CorruptedError(f"it has no table {name}") from None
                missing.append(name)
        if missing:
            with self._env.begin(write=True) as txn:  # all or none: a kill must not leave a part of them
                for name in missing:
                    found[name] = self._env.open_db(name.encode(), txn=txn, dupsort=self._names[name], create=True)
        return found

    def _hold_up(self) -> None:
        """A file that was cut short ends whoever reads its map; with room in it, what is lost there is an error."""
        if not self.readonly:
            with open(self.path / "data.mdb", "rb+") as file:
                if os.fstat(file.fileno()).st_size < (size := self.used_bytes):
                    os.posix_fallocate(file.fileno(), size - 1, 1)

    def _open_what_fits(self, map_size: int) -> lmdb.Environment:
        while True:
            try:
                return self._open_once(map_size, readonly=self.readonly)
            except (lmdb.Error, OSError) as error:
                if _code(error) == errno.EROFS and not self.readonly:
                    self.readonly = True
                elif _code(error) == errno.ENOMEM and map_size > SMALLEST_MAP:
                    map_size //= 4
                else:
                    raise

    def _open_once(self, map_size: int, *, readonly: bool) -> lmdb.Environment:
        return lmdb.Environment(
            str(self.path),
            map_size=map_size,
            readonly=readonly,
            create=not readonly,
            mode=0o600,
            max_dbs=MAX_TABLES,
            max_readers=MAX_READERS,
            max_spare_txns=4,
            readahead=False,  # lookups are random: reading ahead would only fill memory
        )

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise RuntimeError("a store does not survive a fork: execute a new process that opens it")


def _put_again(txn: "Transaction", keys: list[tuple[bytes, bytes | None]], table: "Table") -> None:
    for key, value in keys:
        again = txn.get(key, db=table) if value is None else value
        if again is None:
            raise lmdb.CorruptedError("a row is not found by its key")
        txn.put(key, bytes(again), db=table)


def _make(path: Path) -> None:
    """An empty environment, durably: LMDB syncs neither its first pages by themselves nor that there is a file."""
    path.mkdir(mode=0o700, exist_ok=True)
    new = path / f"{NEW}{secrets.token_hex(8)}"
    lmdb.Environment(str(new), map_size=SMALLEST_MAP, subdir=False, lock=False, mode=0o600).close()
    with suppress(FileNotFoundError, FileExistsError):  # another process made it
        sync_file(new)
        os.link(new, path / "data.mdb")
    unlink(new)
    sync_directories([path])


class _Gate:
    """Lets transactions overlap, and a change of the map happen alone."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._inside = 0

    def enter(self) -> None:
        with self._condition:
            self._inside += 1

    def leave(self) -> None:
        with self._condition:
            self._inside -= 1
            if not self._inside:
                self._condition.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._inside)
            yield  # holding the condition: nobody enters


def _code(error: Exception) -> int:
    """The errno behind an error; lmdb before 3 only tells it in words."""
    code = error.errno if isinstance(error, OSError) else getattr(error, "code", 0)
    return code or next((number for number in _ERRNOS if str(error).endswith(os.strerror(number))), 0)


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except lmdb.Error as error:
        raise _catalog_error(error, path) from error
    except _GARBLED as error:
        raise _broken(path, f"a row makes no sense ({error})") from error
    except OSError as error:
        raise UserError(f"cannot open catalog {path}: {error.strerror}", hint="see CAKEFS_STORE") from error


def _catalog_error(error: lmdb.Error, path: Path) -> CakeError:
    code = _code(error)
    # EIO: how LMDB tells that of a write only a part had room.
    if isinstance(error, lmdb.DiskError) or code in (errno.ENOSPC, errno.EDQUOT) or (code == errno.EIO and _full(path)):
        return StoreFull(f"no space left for catalog {path}", hint="free space on that disk, or cakefs gc")
    if isinstance(error, lmdb.ReadonlyError | lmdb.LockError) or code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"catalog {path} may not be written: {error}", hint="is the store yours? see CAKEFS_STORE")
    if isinstance(error, _BROKEN):
        return _broken(path, str(error))
    return CakeError(f"catalog {path}: {error}")


def _full(path: Path) -> bool:
    """Less room on the disk than one write of LMDB takes."""
    fs = os.statvfs(path)
    return fs.f_bavail * fs.f_frsize < LARGEST_WRITE


def _broken(path: Path, why: str) -> CorruptData:
    return CorruptData(f"catalog {path} is broken: {why}", hint="cakefs verify --repair")
