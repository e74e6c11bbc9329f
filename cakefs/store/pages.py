"""The pages of an LMDB file, one by one: whether each is what it should be, and has one use only.

LMDB checks nothing of this. A page that took another's place, or that is on the list of free pages while a tree has it,
is met when some later command writes there; a tree that leads back to itself ends a process. The layout is that of
`mdb.c`, data version 1, on 64 bits in the byte order of the machine.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cakefs.errors import CorruptData

_BRANCH, _LEAF, _OVERFLOW, _META, _FIXED, _INNER = 0x01, 0x02, 0x04, 0x08, 0x20, 0x40  # of a page
_BIG, _TREE = 0x01, 0x02  # of a row: its value has pages of its own; is a tree
_PAGE = struct.Struct("=QHHHH")  # number, pad, flags, lower, upper
_COUNT = struct.Struct("=I")  # pages of an overflow, in the place of lower and upper
_NODE = struct.Struct(
    "=HHHH"
)  # low and high half of a size, flags, size of the key; in a branch three parts of a number
_ROOT = struct.Struct("=40xQ")  # of the record of a tree
_META_PAGE = struct.Struct("=16xIIQQI36xQI36xQQQ")  # of each tree the pad, which has the size of a page, and the root
_NUMBER = struct.Struct("=Q")
_MAGIC = 0xBEEFC0DE
_NONE = (1 << 64) - 1  # The root of an empty tree.


def check_pages(file: Path) -> None:
    """Of a file that nobody writes to. Raises CorruptData."""
    try:
        _Pages(file.read_bytes()).check()
    except (ValueError, struct.error) as error:
        raise CorruptData(f"catalog {file.parent} is broken: {error}", hint="cakefs verify --repair") from error


class _Row(NamedTuple):
    """Of a leaf. Attributes: at: Where its value begins in the file."""

    flags: int
    key: bytes
    at: int
    size: int


class _Pages:
    """Raises ValueError and struct.error."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._size, self._free, self._main, last = _newest(data)
        self._used = bytearray(last + 1)
        self._used[:2] = b"\1\1"  # the two that say where the trees are

    def check(self) -> None:
        for row in self._rows(self._main):
            if row.flags & _TREE:
                for each in self._rows(*_ROOT.unpack_from(self._data, row.at)):
                    if each.flags & _TREE:  # of the many values of a key
                        list(self._rows(*_ROOT.unpack_from(self._data, each.at)))
        latest = 0
        for row in list(self._rows(self._free, plain=True)):
            (transaction,) = _NUMBER.unpack(row.key)
            if transaction <= latest:
                raise ValueError("the list of free pages is not in order")
            latest = transaction
            (count,) = _NUMBER.unpack_from(self._data, row.at)
            if _NUMBER.size * (count + 1) > row.size:
                raise ValueError("the list of free pages is cut")
            for (number,) in _NUMBER.iter_unpack(self._data[row.at + 8 : row.at + 8 * (count + 1)]):
                self._use(number)

    def _rows(self, root: int, *, plain: bool = False) -> Iterator[_Row]:
        """Of a tree, in order. Args: plain: Also those whose value is just bytes."""
        waiting = [root] if root != _NONE else []
        while waiting:
            page, flags, nodes = self._tree_page(waiting.pop())
            if flags & _BRANCH:
                parts = (_NODE.unpack_from(self._data, node) for node in nodes)
                waiting += reversed([low | high << 16 | top << 32 for low, high, top, _ in parts])
                continue
            for node in nodes:
                low, high, kind, key_size = _NODE.unpack_from(self._data, node)
                if kind or plain:
                    yield self._row(page, node + _NODE.size, kind, key_size, low | high << 16)

    def _row(self, page: int, key: int, flags: int, key_size: int, size: int) -> _Row:
        at = key + key_size
        if at + (_NUMBER.size if flags & _BIG else size) > page + self._size:
            raise ValueError(f"a row of page {page // self._size} is longer than that")
        text = self._data[key:at]
        if flags & _BIG:
            (number,) = _NUMBER.unpack_from(self._data, at)
            at = self._big(number, size)
        return _Row(flags, text, at, size)

    def _tree_page(self, number: int) -> tuple[int, int, list[int]]:
        """Where it is in the file, its flags, and where its nodes are."""
        self._use(number)
        page = number * self._size
        own, _, flags, lower, upper = _PAGE.unpack_from(self._data, page)
        if own != number or flags & (_OVERFLOW | _META | _INNER) or bool(flags & _BRANCH) == bool(flags & _LEAF):
            raise ValueError(f"page {number} is none of a tree")
        if flags & _FIXED:
            return page, flags, []  # bare values
        if not _PAGE.size <= lower <= upper <= self._size:
            raise ValueError(f"page {number} has no sense in its head")
        places = struct.unpack_from(f"={(lower - _PAGE.size) // 2}H", self._data, page + _PAGE.size)
        if any(not upper <= place <= self._size - _NODE.size for place in places):
            raise ValueError(f"page {number} has rows outside of it")
        return page, flags, [page + place for place in places]

    def _big(self, number: int, size: int) -> int:
        """Where the bytes of a value begin that has pages of its own."""
        own, _, flags, *_ = _PAGE.unpack_from(self._data, number * self._size)
        (count,) = _COUNT.unpack_from(self._data, number * self._size + _PAGE.size - _COUNT.size)
        if own != number or flags & ~0x8000 != _OVERFLOW or _PAGE.size + size > count * self._size:
            raise ValueError(f"page {number} does not hold the value that it should")
        for each in range(number, number + count):
            self._use(each)
        return number * self._size + _PAGE.size

    def _use(self, number: int) -> None:
        if not number < len(self._used):
            raise ValueError(f"page {number} is beyond the last")
        if self._used[number]:
            raise ValueError(f"page {number} has two uses")
        self._used[number] = 1


def _newest(data: bytes) -> tuple[int, int, int, int]:
    """Of the two descriptions of the file, that of the later transaction: the size of a page, the root of the list of
    free pages, that of the table of tables, and the last page."""
    magic, _, _, _, size, *_ = _META_PAGE.unpack_from(data)
    if magic != _MAGIC or size not in (1 << n for n in range(9, 17)):
        raise ValueError("its first page is not that of an LMDB file")
    both = [_META_PAGE.unpack_from(data, at) for at in (0, size)]
    *_, free, _, main, last, _ = max(both, key=lambda one: one[-1])
    return size, free, main, last
