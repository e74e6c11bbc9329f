"""Walks the opcodes of a pickle without unpickling it. Pure.

Nothing that a pickle names is ever imported, called or built: a global is a `Name`, and what calling it would give is
for the caller to say, as inert values. Python's own unpicklers, restricted or not, trust sizes (9 bytes made one take
8 GB), so this is not one: the memo is a dictionary, strings are never longer than the pickle, and every opcode and item
costs from one budget. 16 MiB of the worst pickle cost about 200 MB and some seconds.

Opcodes are those that pickles of data use in the binary protocols 2 to 5. Text protocols, extension codes, objects made
by INST and OBJ, frozen sets and buffers out of band are unknown here, and so refused.
"""

import struct
from collections.abc import Callable
from typing import NamedTuple, Protocol

from cakefs.formats.strictjson import brief

PICKLE_LIMIT = 16 * 1024 * 1024
_MAX_WORK = 4_000_000  # 60,000 tensors: a parameter takes 65.
CONTAINER = 6  # Work that an empty list or dictionary counts as: it takes so many times the memory of a number.
_MAX_STACK = 1_000_000
_MAX_LINE = 1024
_MAX_INT = 64
_HIGHEST_PROTOCOL = 5


class Short(Exception):
    """The data ends in the middle of the pickle, which needs at least `size` bytes of it."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


class TooLarge(ValueError):
    """The pickle is over one of the limits here."""


class Name(NamedTuple):
    """A global that the pickle refers to."""

    module: str
    name: str

    def __str__(self) -> str:
        return brief(f"{self.module}.{self.name}")[1:-1]


class Opaque(NamedTuple):
    """Something that is no plain data; `what` says what, for messages; `tensor` whether it would be one."""

    what: str
    tensor: bool = False


class Table:
    """A dictionary.

    Attributes:
        unnamed: Values under keys that are no text.
    """

    __slots__ = ("items", "unnamed")

    def __init__(self) -> None:
        self.items: dict[str, object] = {}
        self.unnamed: list[object] = []

    def set(self, key: object, value: object) -> None:
        if isinstance(key, str):
            self.items[key] = value
        else:
            self.unnamed.append(value)


class Meaning(Protocol):
    """What the walker asks of its caller. All raise ValueError to refuse the pickle."""

    def find(self, name: Name) -> object:
        """The value of a global: the name itself where it may be called."""

    def call(self, function: Name, arguments: tuple[object, ...], spend: Callable[[int], None]) -> object:
        """The value of a call; whoever walks a list of any length spends that first."""

    def load(self, key: object) -> object:
        """The value of a persistent id."""


def walk(data: bytes, start: int, meaning: Meaning) -> tuple[object, int]:
    """The value of the pickle that starts at `data[start]`, and where it ends.

    Numbers, text, bytes, True, False, None, tuples and lists are Python's, dictionaries a `Table`, all else as
    `meaning` has it. Values may share parts and so be huge when written out: never print, compare or hash one.

    Raises:
        Short: When the data ends first.
        ValueError: For anything that is no such pickle, or is too large.
    """
    walker = _Walker(data, start, meaning)
    try:
        return walker.run(), walker.at
    except (IndexError, KeyError):
        raise ValueError("pickle takes from its stack or memo what is not there") from None


class _Walker:
    def __init__(self, data: bytes, start: int, meaning: Meaning) -> None:
        self._data = data
        self._start = start
        self.at = start
        self._meaning = meaning
        self._stack: list[object] = []
        self._marks: list[int] = []
        self._memo: dict[int, object] = {}
        self._left = _MAX_WORK

    def run(self) -> object:
        data, stack = self._data, self._stack
        while True:
            self.spend(1)
            if self.at >= len(data):
                raise Short(self.at + 1)
            opcode = data[self.at]
            self.at += 1
            if opcode == 0x2E:  # STOP
                return self._pop()
            if self.at - self._start > PICKLE_LIMIT:
                raise TooLarge(f"pickle is longer than {PICKLE_LIMIT} bytes")
            operation = _OPERATIONS.get(opcode)
            if operation is None:
                raise ValueError(
                    f"pickle has an opcode {bytes([opcode])!r} at byte {self.at - 1} that is not known here"
                )
            operation(self)
            if len(stack) > _MAX_STACK:
                raise TooLarge(f"pickle has more than {_MAX_STACK} values on its stack")

    def spend(self, work: int) -> None:
        self._left -= work
        if self._left < 0:
            raise TooLarge(f"pickle has more than {_MAX_WORK} steps")

    # --- reading arguments ------------------------------------------------------------------------------------------

    def _take(self, size: int) -> bytes:
        if size > PICKLE_LIMIT:
            raise TooLarge(f"pickle has a value of {size} bytes")
        at = self.at
        if at + size > len(self._data):
            raise Short(at + size)
        self.at = at + size
        return self._data[at : at + size]

    def _number(self, size: int, *, signed: bool = False) -> int:
        return int.from_bytes(self._take(size), "little", signed=signed)

    def _line(self) -> str:
        stop = self._data.find(b"\n", self.at, self.at + _MAX_LINE)
        if stop < 0:
            if len(self._data) < self.at + _MAX_LINE:
                raise Short(len(self._data) + 1)
            raise ValueError(f"pickle names something in more than {_MAX_LINE} bytes")
        line = self._data[self.at : stop]
        self.at = stop + 1
        return line.decode()

    # --- the stack --------------------------------------------------------------------------------------------------

    def _push(self, value: object) -> None:
        self._stack.append(value)

    def _pop(self) -> object:
        if self._marks and self._marks[-1] >= len(self._stack):
            raise ValueError("pickle takes a mark for a value")
        return self._stack.pop()

    def _top(self) -> object:
        value = self._pop()
        self._stack.append(value)
        return value

    def _from_mark(self) -> list[object]:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        self.spend(len(items))
        return items

    def _remember(self, index: int) -> None:
        self._memo[index] = self._top()

    # --- opcodes ----------------------------------------------------------------------------------------------------

    def _protocol(self) -> None:
        protocol = self._take(1)[0]
        if not 2 <= protocol <= _HIGHEST_PROTOCOL:
            raise ValueError(f"pickle of protocol {protocol}")

    def _text(self, length_size: int) -> None:
        self._push(self._take(self._number(length_size)).decode())

    def _old_text(self, length_size: int) -> None:
        """Text of Python 2, which may be bytes as well."""
        value = self._take(self._number(length_size))
        try:
            self._push(value.decode())
        except UnicodeDecodeError:
            self._push(value)

    def _bytes(self, length_size: int) -> None:
        self._push(self._take(self._number(length_size)))

    def _long(self, length_size: int) -> None:
        size = self._number(length_size)
        value = self._take(size)
        self._push(int.from_bytes(value, "little", signed=True) if size <= _MAX_INT else Opaque("a huge number"))

    def _container(self, value: object) -> None:
        self.spend(CONTAINER)
        self._push(value)

    def _float(self) -> None:
        self._push(struct.unpack(">d", self._take(8))[0])

    def _tuple(self, size: int) -> None:
        items = [self._pop() for _ in range(size)]
        self._push(tuple(reversed(items)))

    def _global(self) -> None:
        self._push(self._meaning.find(Name(self._line(), self._line())))

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("pickle names a global by something that is no text")
        self._push(self._meaning.find(Name(module, name)))

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(arguments, tuple) or not isinstance(function, Name):
            raise ValueError("pickle calls something that is no function")
        self._push(self._meaning.call(function, tuple(arguments), self.spend))

    def _build(self) -> None:
        """State given to an object. Attributes of a dictionary are of no interest; a tensor has none."""
        self._pop()
        if not isinstance(self._top(), Table | Opaque):
            raise ValueError("pickle gives a state to something that has none")

    def _append(self, items: list[object]) -> None:
        target = self._top()
        if type(target) is not list:
            raise ValueError("pickle appends to something that is no list")
        target.extend(items)

    def _set_items(self, items: list[object]) -> None:
        target = self._top()
        if not isinstance(target, Table) or len(items) % 2:
            raise ValueError("pickle sets items of something that is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target.set(key, value)

    def _add_items(self) -> None:
        self._from_mark()
        if not isinstance(self._top(), Opaque):
            raise ValueError("pickle adds items to something that is no set")

    def _two(self) -> list[object]:
        value, key = self._pop(), self._pop()
        return [key, value]


def _constant(value: object) -> Callable[[_Walker], None]:
    return lambda w: w._push(value)


_OPERATIONS: dict[int, Callable[[_Walker], None]] = {
    ord("\x80"): _Walker._protocol,
    ord("\x95"): lambda w: _discard(w._number(8)),  # FRAME: only says how much to read ahead
    ord("("): lambda w: w._marks.append(len(w._stack)),
    ord("0"): lambda w: _discard(w._pop()),
    ord("1"): lambda w: _discard(w._from_mark()),
    ord("2"): lambda w: w._push(w._top()),
    ord("N"): _constant(None),
    ord("\x88"): _constant(True),
    ord("\x89"): _constant(False),
    ord("J"): lambda w: w._push(w._number(4, signed=True)),
    ord("K"): lambda w: w._push(w._number(1)),
    ord("M"): lambda w: w._push(w._number(2)),
    ord("\x8a"): lambda w: w._long(1),
    ord("\x8b"): lambda w: w._long(4),
    ord("G"): _Walker._float,
    ord("X"): lambda w: w._text(4),
    ord("\x8c"): lambda w: w._text(1),
    ord("\x8d"): lambda w: w._text(8),
    ord("U"): lambda w: w._old_text(1),
    ord("T"): lambda w: w._old_text(4),
    ord("C"): lambda w: w._bytes(1),
    ord("B"): lambda w: w._bytes(4),
    ord("\x8e"): lambda w: w._bytes(8),
    ord(")"): _constant(()),
    ord("\x85"): lambda w: w._tuple(1),
    ord("\x86"): lambda w: w._tuple(2),
    ord("\x87"): lambda w: w._tuple(3),
    ord("t"): lambda w: w._push(tuple(w._from_mark())),
    ord("]"): lambda w: w._container([]),
    ord("a"): lambda w: w._append([w._pop()]),
    ord("e"): lambda w: w._append(w._from_mark()),
    ord("}"): lambda w: w._container(Table()),
    ord("s"): lambda w: w._set_items(w._two()),
    ord("u"): lambda w: w._set_items(w._from_mark()),
    ord("\x8f"): _constant(Opaque("a set")),
    ord("\x90"): _Walker._add_items,
    ord("c"): _Walker._global,
    ord("\x93"): _Walker._stack_global,
    ord("R"): _Walker._reduce,
    ord("\x81"): _Walker._reduce,  # NEWOBJ: cls.__new__(cls, *arguments)
    ord("b"): _Walker._build,
    ord("Q"): lambda w: w._push(w._meaning.load(w._pop())),
    ord("q"): lambda w: w._remember(w._number(1)),
    ord("r"): lambda w: w._remember(w._number(4)),
    ord("\x94"): lambda w: w._remember(len(w._memo)),
    ord("h"): lambda w: w._push(w._memo[w._number(1)]),
    ord("j"): lambda w: w._push(w._memo[w._number(4)]),
}


def _discard(value: object) -> None:
    pass
