"""What a power cut may leave of the files below a directory: replayed from a record of shim.c.

A disk is held to what POSIX promises and to no more. Bytes are kept once their file was synced (or came through
O_DSYNC), names once their directory was. Of everything later any part may be there: of a file any of its 4 KiB blocks,
each as it was after any of the writes to it, in any length that it had; of names any that do not depend on a name that
is absent. A state is drawn with `Dice`.
"""

import os
import random
import struct
from collections.abc import Iterable, Iterator
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
        self.sizes, self.blocks = [len(self.now)], {}

    def draw(self, dice: "Dice") -> bytes:
        """The bytes that a cut leaves."""
        size = dice.one_of(self.sizes)
        data = bytearray(self.now[:size])
        data.extend(bytes(size - len(data)))
        for block, versions in self.blocks.items():
            at = block * BLOCK
            if at < size:
                data[at : at + BLOCK] = dice.one_of(versions).ljust(BLOCK, b"\0")[: size - at]
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

    def one_of(self, versions: list[T]) -> T:
        if self._data in (0, 1):
            return versions[-int(self._data)]
        return self._random.choice(versions)

    def happened(self) -> bool:
        return self._random.random() < self.names


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

    def draw(self, dice: Dice) -> State:
        """What a cut at this moment leaves."""
        names, lost = dict(self.kept), set[str]()
        for change in self.pending:
            if lost.isdisjoint(change) and dice.happened():
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


def states(disk: Disk, record: Iterable[Entry], seed: int) -> Iterator[tuple[int, bool, State]]:
    """What a cut may leave, before each sync and at the end: the number of the entry, whether the mark was passed.

    The last is what is left at the end when nothing was kept but what had to be: all that was said to be done is in it.
    """
    done, seen = False, set[int]()
    for number, entry in enumerate([*record, None]):
        if entry is None or entry.durable or entry.op in (Op.SYNC, Op.SYNC_DIRECTORY, Op.MARK):
            for dice in (Dice(0, 1, 0), Dice(1, 0, 0), *(Dice(0.5, 0.5, seed + i) for i in range(3)), Dice(0, 0, 0)):
                state = disk.draw(dice)
                if (known := hash((done, *state.items()))) not in seen:
                    seen.add(known)
                    yield number, done, state
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
