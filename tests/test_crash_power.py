"""The power goes while something is done: of what was not synced, any part may be there, and any block of it.

What a command said it had done is there; what it had not is whole or absent; every read is right, and nothing is left
over. `tests/crash/cut.py` is the disk. These runs take some states of each scenario; `scripts/stress --only crash`
takes many more.
"""

from collections.abc import Iterator

import pytest

from tests.crash.cut import BLOCK, Dice, Disk, Entry, Inode, Op
from tests.crash.kit import MOST, Crasher, crasher
from tests.crash.scenarios import SCENARIOS


@pytest.fixture(scope="module")
def crashes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crasher]:
    with crasher(tmp_path_factory.mktemp("power"), MOST) as crashes:
        yield crashes


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_after_a_power_cut_nothing_is_wrong_lost_or_left_over(crashes: Crasher, scenario: str) -> None:
    done = crashes.crash("cut", scenario)
    assert done.failed == []
    assert done.total


# The disk that the states are drawn from

NOTHING, ALL = Dice(0, 0, 0), Dice(1, 1, 0)


def test_a_file_is_there_once_its_directory_is_synced_and_its_bytes_once_it_is(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    disk = Disk(tmp_path_factory.mktemp("disk"))
    disk.apply(entry(Op.CREATE, 1, one="a"))
    disk.apply(entry(Op.WRITE, 1, data=b"new"))
    assert (disk.draw(NOTHING), disk.draw(ALL)) == ({}, {"a": b"new"})
    disk.apply(entry(Op.SYNC, 1))
    assert disk.draw(NOTHING) == {}
    disk.apply(entry(Op.SYNC_DIRECTORY, 0, one=""))
    disk.apply(entry(Op.WRITE, 1, data=b"old", offset=1))
    assert (disk.draw(NOTHING), disk.draw(ALL)) == ({"a": b"new"}, {"a": b"nold"})
    disk.apply(entry(Op.RENAME, 0, one="a", other="b"))
    assert (disk.draw(NOTHING), disk.draw(ALL)) == ({"a": b"new"}, {"b": b"nold"})


def test_blocks_are_kept_one_by_one() -> None:
    inode = Inode(b"o" * (3 * BLOCK))
    inode.write(10, b"n" * (2 * BLOCK), durable=False)
    drawn = {inode.draw(Dice(0.5, 0, seed)) for seed in range(50)}
    assert len(drawn) == 8 and all(len(data) == 3 * BLOCK for data in drawn)
    assert inode.draw(NOTHING) == b"o" * (3 * BLOCK)
    inode.sync()
    assert inode.draw(NOTHING) == b"o" * 10 + b"n" * (2 * BLOCK) + b"o" * (BLOCK - 10)


def entry(op: Op, inode: int, *, one: str = "", other: str = "", data: bytes = b"", offset: int = 0) -> Entry:
    return Entry(op, False, inode, offset, one, other, data)
