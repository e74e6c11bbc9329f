"""What a power cut may leave of the files below a directory: replayed from a record of shim.c.

A disk is held to what POSIX promises and to no more. Bytes are kept once their file was synced (or came through
O_DSYNC), names once their directory was. Of everything later any part may be there: of a file any of its 4 KiB blocks,
each as it was after any of the writes to it, in any length that it had; of names any that do not depend on a name that
is absent. A state is drawn with `Dice`, or is all but one `Loss`.
"""

import os
import random
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")
BLOCK = 4096
_ENTRY = struct.Struct("<IIQQQII")  # struct entry


class Op(IntEnum):
    CREATE = 1
    TRUNCATE = 2
    WRITE = 3
    SYNC = 4
    SYNC_DIRECTORY = 5
    RENAME = 6
    LINK = 7
    UNLINK = 8
    MKDIR = 9
    RMDIR = 10
    SYMLINK = 11
    MARK = 12


class Entry(NamedTuple):
    """As in shim.c; paths are relative to the root."""

    op: Op
    durable: bool
    inode: int
    offset: int
    one: str
    other: str
    data: bytes


def entries(log: Path, root: Path) -> Iterator[Entry]:
    record, at = log.read_bytes(), 0
    while at < len(record):
        op, durable, inode, offset, size, one, other = _ENTRY.unpack_from(record, at)
        at += _ENTRY.size
        first, second = (os.fsdecode(t) for t in (record[at : at + one], record[at + one : at + one + other]))
        at += one + other
        yield Entry(
            Op(op), bool(durable), inode, offset, _below(first, root), _below(second, root), record[at : at + size]
        )
        at += size


def _below(path: str, root: Path) -> str:
    return path.removeprefix(f"{root}").removeprefix("/")


class Inode:
    """The bytes of a file: those that are on the disk, and for each block what it may be instead."""

    def __init__(self, data: bytes = b"") -> None:
        self.now = bytearray(data)
        self.sizes = [len(data)]  # that it may have; the first is on the disk
        self.blocks: dict[int, list[bytes]] = {}  # what they may be; the first is on the disk
        self.fresh = not data  # never synced

    def write(self, offset: int, data: bytes, *, durable: bool) -> None:
        stop = offset + len(data)
        blocks = range(offset // BLOCK, -(-stop // BLOCK))
        for block in blocks:
            self.blocks.setdefault(block, [self._block(block)])
        self.now.extend(bytes(max(0, stop - len(self.now))))
        self.now[offset:stop] = data
        self.sizes.append(len(self.now))
        for block in blocks:
            self.blocks[block].append(self._block(block))
            if durable:
                del self.blocks[block]
        if durable:
            self.sizes = [len(self.now)]

    def truncate(self, size: int) -> None:
        for block in range(size // BLOCK, -(-len(self.now) // BLOCK)):
            self.blocks.setdefault(block, [self._block(block)])
        del self.now[size:]
        self.now.extend(bytes(size - len(self.now)))
        self.sizes.append(size)

    def sync(self) -> None:
        self.sizes, self.blocks, self.fresh = [len(self.now)], {}, False

    @property
    def dirty(self) -> bool:
        return bool(self.blocks) or len(self.sizes) > 1

    def draw(self, dice: "Dice | Loss") -> bytes:
        """The bytes that a cut leaves."""
        size = dice.size_of(self)
        data = bytearray(self.now[:size])
        data.extend(bytes(size - len(data)))
        for block, versions in self.blocks.items():
            at = block * BLOCK
            if at < size:
                data[at : at + BLOCK] = dice.block_of(self, versions).ljust(BLOCK, b"\0")[: size - at]
        return bytes(data)

    def _block(self, block: int) -> bytes:
        return bytes(self.now[block * BLOCK : (block + 1) * BLOCK])


class Dice:
    """What of the things not synced is there.

    Args:
        data: Of bytes: none (0), all (1), or each block by chance.
        names: Of names, likewise.
    """

    def __init__(self, data: float, names: float, seed: int) -> None:
        self.names = names
        self._data = data
        self._random = random.Random(seed)

    def size_of(self, inode: Inode) -> int:
        return self._one_of(inode.sizes)

    def block_of(self, inode: Inode, versions: list[bytes]) -> bytes:
        return self._one_of(versions)

    def happened(self, change: "Names") -> bool:
        return self._random.random() < self.names

    def _one_of(self, versions: list[T]) -> T:
        if self._data in (0, 1):
            return versions[-int(self._data)]
        return self._random.choice(versions)


class Loss:
    """All is there but what some syncs would have kept: bytes of files, which are as large as they were and have zeros
    or old bytes, and names of directories."""

    def __init__(self, inodes: list[Inode], directories: set[str]) -> None:
        self._inodes = {id(inode) for inode in inodes}
        self._directories = directories

    def size_of(self, inode: Inode) -> int:
        return inode.sizes[-1]

    def block_of(self, inode: Inode, versions: list[bytes]) -> bytes:
        return versions[0 if id(inode) in self._inodes else -1]

    def happened(self, change: "Names") -> bool:
        return self._directories.isdisjoint(map(os.path.dirname, change))


DIRECTORY = "directory"
Names = dict[str, Inode | str | None]  # By path: a file, DIRECTORY, or nothing.
State = dict[str, bytes | None]  # By path: the bytes of a file, None for a directory.


class Disk:
    """A directory while entries are replayed on it."""

    def __init__(self, root: Path) -> None:
        self.kept: Names = {}  # what is on the disk
        self.pending: list[Names] = []  # changes since, each atomic
        self._by_number: dict[int, Inode] = {}
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root).as_posix()
            if path.is_file():
                self.kept[name] = self._by_number.setdefault(path.stat().st_ino, Inode(path.read_bytes()))
            else:
                self.kept[name] = DIRECTORY
        self.now: Names = dict(self.kept)

    def apply(self, e: Entry) -> None:
        inode = self._by_number.get(e.inode)
        match e.op:
            case Op.CREATE:
                self._by_number[e.inode] = Inode()
                self._name({e.one: self._by_number[e.inode]})
            case Op.WRITE if inode:
                inode.write(e.offset, e.data, durable=e.durable)
            case Op.TRUNCATE if inode:
                inode.truncate(e.offset)
            case Op.SYNC if inode:
                inode.sync()
            case Op.SYNC_DIRECTORY:
                self._sync_directory(e.one)
            case Op.RENAME:
                self._name({e.one: None, e.other: self.now[e.one]})
            case Op.LINK:
                self._name({e.other: self.now[e.one]})
            case Op.UNLINK | Op.RMDIR:
                self._name({e.one: None})
            case Op.MKDIR:
                self._name({e.one: DIRECTORY})
            case _:
                pass

    def _name(self, names: Names) -> None:
        self.pending.append(names)
        self.now |= names

    def _sync_directory(self, path: str) -> None:
        """Its names are kept, and so is what must have come before them."""
        wanted = {name for change in self.pending for name in change if os.path.dirname(name) == path}
        left: list[Names] = []
        for change in reversed(self.pending):
            if wanted & change.keys():
                wanted |= change.keys()
            else:
                left.append(change)
        for change in self.pending:
            if all(change is not other for other in left):
                self.kept |= change
        self.pending = left[::-1]

    def kept_by(self, syncs: list[Entry]) -> Loss | None:
        """What these keep; None for nothing, or no more than a commit of LMDB, which knows how to sync. The first sync
        of a new catalog is ours."""
        inodes = [self._by_number[e.inode] for e in syncs if e.op is Op.SYNC and e.inode in self._by_number]
        directories = {e.one for e in syncs if e.op is Op.SYNC_DIRECTORY}
        names = [name for change in self.pending for name in change if os.path.dirname(name) in directories]
        catalog = self.now.get("store/catalog/data.mdb")
        dirty = [inode for inode in inodes if inode.dirty and (inode.fresh or inode is not catalog)]
        return Loss(dirty, directories) if dirty or names else None

    def names_of(self, inode: int) -> list[str]:
        return [name for name, what in self.now.items() if what is self._by_number.get(inode, DIRECTORY)]

    def draw(self, dice: Dice | Loss) -> State:
        """What a cut at this moment leaves."""
        names, lost = dict(self.kept), set[str]()
        for change in self.pending:
            if lost.isdisjoint(change) and dice.happened(change):
                names |= change
            else:
                lost |= change.keys()  # What came later to the same name cannot be there without it.
        drawn: dict[int, bytes] = {}  # A file with two names has the same bytes under both.
        state: State = {}
        for name, what in sorted(names.items(), key=lambda item: item[0].split("/")):
            parent = os.path.dirname(name)
            if what is None or (parent and parent not in state):
                continue
            if isinstance(what, Inode) and id(what) not in drawn:
                drawn[id(what)] = what.draw(dice)
            state[name] = drawn[id(what)] if isinstance(what, Inode) else None
        return state


class Cut(NamedTuple):
    """Attributes:
    before: The number of the entry.
    done: Whether the mark was passed.
    lost: Names of what is lost, where that is one thing.
    """

    before: int
    done: bool
    lost: str
    state: State


def losses(disk: Disk, record: Sequence[Entry]) -> Iterator[Cut]:
    """A cut before each sync, or several without anything between them, that leaves all but what these keep; those of
    the like of what was lost already are left out. At the end a cut that leaves only what must be there.

    So a sync that is missing from what was recorded shows: either another one keeps later what it would have kept, and
    all that relies on it is there when that is lost; or none does, and it is lost at the end.
    """
    done, seen, at = False, set[str](), 0
    while at < len(record):
        stop = at
        while stop < len(record) and record[stop].op in (Op.SYNC, Op.SYNC_DIRECTORY):
            stop += 1
        syncs = list(record[at:stop])
        if syncs and (loss := disk.kept_by(syncs)) is not None:
            lost = " ".join(sorted({_kind(e.one or next(iter(disk.names_of(e.inode)), "")) for e in syncs}))
            if lost not in seen:
                seen.add(lost)
                yield Cut(at, done, lost, disk.draw(loss))
        for entry in record[at : max(stop, at + 1)]:
            disk.apply(entry)
            done |= entry.op is Op.MARK
        at = max(stop, at + 1)
    yield Cut(at, done, "", disk.draw(Dice(0, 0, 0)))


def _kind(name: str) -> str:
    """A name without what is another in each run."""
    return re.sub(r"\b[0-9a-f]{2}\b|[0-9a-f]{8,}", "*", name)


def states(disk: Disk, record: Iterable[Entry], seed: int) -> Iterator[Cut]:
    """What a cut may leave, before each sync and at the end.

    The last is what is left at the end when nothing was kept but what had to be: all that was said to be done is in it.
    """
    done, seen = False, set[int]()
    for number, entry in enumerate([*record, None]):
        if entry is None or entry.durable or entry.op in (Op.SYNC, Op.SYNC_DIRECTORY, Op.MARK):
            for dice in (Dice(0, 1, 0), Dice(1, 0, 0), *(Dice(0.5, 0.5, seed + i) for i in range(3)), Dice(0, 0, 0)):
                state = disk.draw(dice)
                if (known := hash((done, *state.items()))) not in seen:
                    seen.add(known)
                    yield Cut(number, done, "", state)
        if entry is not None:
            disk.apply(entry)
            done |= entry.op is Op.MARK


def write_state(state: State, directory: Path) -> None:
    directory.mkdir(mode=0o700)
    for name, data in state.items():
        path = directory / name
        if data is None:
            path.mkdir(mode=0o700)
        else:
            path.write_bytes(data)
            path.chmod(0o600)
