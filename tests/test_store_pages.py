"""The pages of a catalog's file: no healthy one is refused, and what took another's place is found."""

import random
import struct
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import lmdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cakefs.errors import CorruptData
from cakefs.store.pages import check_pages

PAGE = 4096
HEAD = struct.Struct("=QHHHH")
BRANCH, LEAF = 1, 2
TABLES = {b"rows": False, b"many": True, b"empty": False}


def grown(directory: Path, seed: int, rounds: int) -> Path:
    """An environment after so many transactions that put, change and delete."""
    dice = random.Random(seed)
    with lmdb.open(str(directory), map_size=1 << 24, max_dbs=4) as env:
        tables = {name: env.open_db(name, dupsort=many) for name, many in TABLES.items()}
        for _ in range(rounds):
            with env.begin(write=True) as txn:
                for _ in range(dice.randrange(200)):
                    key = dice.randbytes(dice.choice((2, 8, 40)))
                    txn.put(key, dice.randbytes(dice.choice((0, 8, 300, 9000))), db=tables[b"rows"])
                    txn.put(b"key%d" % dice.randrange(3), dice.randbytes(20), db=tables[b"many"])
                rows = [key for key, _ in txn.cursor(tables[b"rows"])]
                for key in dice.sample(rows, dice.randrange(len(rows) + 1)):
                    txn.delete(key, db=tables[b"rows"])
    return directory / "data.mdb"


@given(st.integers(0, 1 << 32), st.integers(0, 12))
@settings(max_examples=25, deadline=None)
def test_what_lmdb_writes_is_in_order(tmp_path_factory: pytest.TempPathFactory, seed: int, rounds: int) -> None:
    check_pages(grown(tmp_path_factory.mktemp("env"), seed, rounds))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return grown(tmp_path, 1, 8)


def in_use(file: Path) -> list[int]:
    """Pages of trees that matter: without one of them the file is refused."""
    data, found = file.read_bytes(), []
    for number in range(2, len(data) // PAGE):
        own, _, flags, *_ = HEAD.unpack_from(data, number * PAGE)
        if own == number and flags in (BRANCH, LEAF):
            file.write_bytes(data[: number * PAGE] + bytes(PAGE) + data[(number + 1) * PAGE :])
            try:
                check_pages(file)
            except CorruptData:
                found.append(number)
    file.write_bytes(data)
    return found


def swapped(data: bytes, one: int, other: int, kept: int) -> bytes:
    mixed = bytearray(data)
    for to, of in ((one, other), (other, one)):
        mixed[to * PAGE + kept : (to + 1) * PAGE] = data[of * PAGE + kept : (of + 1) * PAGE]
    return bytes(mixed)


def test_pages_that_change_places_are_found(file: Path) -> None:
    data, pages = file.read_bytes(), in_use(file)
    assert len(pages) > 10
    for one, other in combinations(pages, 2):
        file.write_bytes(swapped(data, one, other, 0))
        with pytest.raises(CorruptData):
            check_pages(file)


def root(data: bytes, tree: int) -> int:
    """Of the list of free pages (0) or the table of tables (1), as the later transaction has it."""
    newest = max((0, PAGE), key=lambda at: struct.unpack_from("=Q", data, at + 144))
    return int(struct.unpack_from("=Q", data, newest + 80 + 48 * tree)[0])


def test_a_list_of_free_pages_that_is_a_table_is_found(file: Path) -> None:
    """Each has the number of its new place."""
    data, free = file.read_bytes(), root(file.read_bytes(), 0)
    for other in in_use(file):
        if other != free:
            file.write_bytes(swapped(data, free, other, 8))
            with pytest.raises(CorruptData):
                check_pages(file)


def lead_back(data: bytearray) -> None:
    """A table whose root is that of the table of tables: to read it all never ends."""
    page = root(bytes(data), 1) * PAGE
    place = struct.unpack_from("=H", data, page + HEAD.size)[0]
    key = struct.unpack_from("=6xH", data, page + place)[0]
    struct.pack_into("=Q", data, page + place + 8 + key + 40, page // PAGE)


def name_a_used_page_free(data: bytearray) -> None:
    page = root(bytes(data), 0) * PAGE
    place = struct.unpack_from("=H", data, page + HEAD.size)[0]
    struct.pack_into("=Q", data, page + place + 8 + 8 + 8, root(bytes(data), 1))


def cut_rows(data: bytearray) -> None:
    struct.pack_into("=H", data, root(bytes(data), 1) * PAGE + 12, 4096)


def no_lmdb(data: bytearray) -> None:
    data[16:20] = bytes(4)


@pytest.mark.parametrize(
    ("hurt", "why"),
    [
        (lead_back, "two uses"),
        (name_a_used_page_free, "two uses"),
        (cut_rows, "no sense"),
        (no_lmdb, "first page"),
        (lambda data: data.__delitem__(slice(5000, None)), "broken"),
    ],
)
def test_what_is_wrong_is_told(file: Path, hurt: Callable[[bytearray], None], why: str) -> None:
    data = bytearray(file.read_bytes())
    hurt(data)
    file.write_bytes(data)
    with pytest.raises(CorruptData, match=why):
        check_pages(file)
