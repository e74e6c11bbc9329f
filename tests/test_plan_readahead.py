"""What is fetched ahead of a reader, from its pattern alone."""

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from cakefs.model import CHUNK, MIB, ByteRange
from cakefs.plan.readahead import AROUND, FIRST_WINDOW, HEAD_LIMIT, LAST_WINDOW, LOCAL_WINDOW, Readahead

TENSOR = 16 * MIB
SIZE = 100 * TENSOR
STARTS = range(0, SIZE, TENSOR)
KERNEL = 128 * 1024


def observe(ahead: Readahead, offset: int, size: int) -> list[ByteRange]:
    """All that is wanted, however soon."""
    wanted = ahead.observe(offset, size)
    return [*wanted.soon, *wanted.later]


def total(ranges: list[ByteRange]) -> int:
    return sum(r.size for r in ranges)


def test_a_jump_inside_a_tensor_wants_nothing() -> None:
    ahead = Readahead(STARTS, SIZE)
    for place in (3 * TENSOR + MIB, 50 * TENSOR + 5 * MIB, 7 * TENSOR + 9 * MIB):
        assert observe(ahead, place, 4096) == []


def test_the_first_head_wants_its_tensor_only() -> None:
    ahead = Readahead(STARTS, SIZE)
    assert observe(ahead, 5 * TENSOR, 4096) == [ByteRange(5 * TENSOR + 4096, 6 * TENSOR)]


def test_a_huge_tensor_is_not_wanted_whole_at_its_first_touch() -> None:
    ahead = Readahead([0], 10 * HEAD_LIMIT)
    assert observe(ahead, 0, 4096) == [ByteRange(4096, 4096 + HEAD_LIMIT)]


def test_a_read_around_a_head_says_nothing_about_the_tensor_before() -> None:
    ahead = Readahead(STARTS, SIZE)
    (wanted,) = observe(ahead, 5 * TENSOR - KERNEL // 2, KERNEL)
    assert wanted == ByteRange(5 * TENSOR + KERNEL // 2, 6 * TENSOR)


def test_every_head_of_a_walk_widens_the_window() -> None:
    ahead = Readahead(STARTS, SIZE)
    wanted = [ByteRange(0, 0)]
    for tensor in range(6):
        wanted += observe(ahead, tensor * TENSOR, 4096)
    assert max(r.stop for r in wanted) - 5 * TENSOR >= 8 * FIRST_WINDOW


def test_a_walk_to_the_end_fills_in_what_it_passed_over() -> None:
    """Tensors that came along with the header, and jumps."""
    header = 50_000
    starts = range(header, header + 20 * TENSOR, TENSOR)
    ahead = Readahead(starts, header + 20 * TENSOR)
    wanted = observe(ahead, 0, KERNEL)
    for start in starts[2:]:
        wanted += observe(ahead, start, 4096)
    assert total(wanted) + 18 * 4096 >= 20 * TENSOR


def test_a_walk_through_the_last_layers_does_not_fetch_the_first() -> None:
    ahead = Readahead(STARTS, SIZE)
    wanted = [w for tensor in range(60, 100) for w in observe(ahead, tensor * TENSOR, 4096)]
    assert min(w.start for w in wanted) >= 60 * TENSOR


def test_a_run_doubles_its_window_up_to_the_limit() -> None:
    ahead = Readahead([0], 100 * LAST_WINDOW)
    position, frontier = 50 * MIB, 0
    observe(ahead, position, KERNEL)
    for _ in range(20_000):
        position += KERNEL
        for wanted in observe(ahead, position, KERNEL):
            frontier = wanted.stop
    assert LAST_WINDOW // 2 <= frontier - position <= LAST_WINDOW


def test_what_is_here_is_wanted_little_ahead_and_again_at_each_pass() -> None:
    ahead = Readahead([0], SIZE)
    ahead.local = True
    for _ in range(2):
        wanted: list[ByteRange] = []
        for position in range(0, SIZE, MIB):
            wanted += observe(ahead, position, MIB)
            assert max([w.stop for w in wanted], default=0) - position <= LOCAL_WINDOW + MIB
        assert total(wanted) >= SIZE - 3 * MIB


def test_reading_the_header_wants_nothing() -> None:
    header = 300_000
    ahead = Readahead([header, header + TENSOR], header + 2 * TENSOR)
    for offset in range(0, header, KERNEL):
        assert observe(ahead, offset, KERNEL) == []
    assert observe(ahead, 3 * KERNEL, KERNEL) != []


def test_the_same_head_again_is_no_news() -> None:
    ahead = Readahead(STARTS, SIZE)
    for _ in range(10):
        observe(ahead, 5 * TENSOR, 4096)
    (wanted,) = ahead.observe(40 * TENSOR, 4096).later
    assert wanted.size <= TENSOR + FIRST_WINDOW


def test_two_runs_at_once_are_told_apart() -> None:
    ahead = Readahead([0], SIZE)
    places = [MIB, SIZE // 2]
    wanted: list[list[ByteRange]] = [[], []]
    for step in range(8):
        for reader, place in enumerate(places):
            wanted[reader] += observe(ahead, place + step * KERNEL, KERNEL)
    assert all(wanted)
    assert wanted[1][0].start > SIZE // 2


def test_after_a_failure_the_same_may_be_asked_for_again() -> None:
    ahead = Readahead(STARTS, SIZE)
    first = observe(ahead, 5 * TENSOR, 4096)
    assert observe(ahead, 5 * TENSOR, 4096) == []
    ahead.forget()
    assert observe(ahead, 5 * TENSOR, 4096) == first


LAYOUTS = st.one_of(
    st.just([*STARTS, SIZE]),
    *(
        st.lists(st.integers(1, most), min_size=2, max_size=100).map(lambda sizes: list(accumulate(sizes)))
        for most in (3 * MIB, KERNEL)
    ),
)
"""Where tensors begin, behind a header, and the size of the file."""


@given(LAYOUTS, st.lists(st.tuples(st.integers(0, 999), st.integers(1, MIB)), max_size=60))
def test_nothing_is_asked_for_twice_or_outside_the_file(layout: list[int], reads: list[tuple[int, int]]) -> None:
    *starts, end = layout
    ahead = Readahead(starts, end)
    asked: list[ByteRange] = []
    for part, size in reads:
        offset = part * end // 1000
        for wanted in observe(ahead, offset, min(size, end - offset)):
            assert 0 <= wanted.start < wanted.stop <= end
            assert all(wanted.stop <= a.start or a.stop <= wanted.start for a in asked)
            asked.append(wanted)


@given(st.integers(1, SIZE // KERNEL - 1))
def test_a_run_from_anywhere_is_covered_to_the_end(first: int) -> None:
    ahead = Readahead(STARTS, SIZE)
    covered = 0
    for offset in range(first * KERNEL, SIZE, MIB):
        covered += total(observe(ahead, offset, min(MIB, SIZE - offset)))
    assert covered >= SIZE - first * KERNEL - 4 * MIB


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 8)), min_size=1, max_size=300))
def test_a_long_run_is_ahead_whatever_else_is_read_meanwhile(steps: list[tuple[int, int]]) -> None:
    """The short cut for a run that needs no look changes nothing."""
    size = 4 * LAST_WINDOW
    ahead = Readahead([0], size)
    covered, position = 0, MIB
    for _ in range(2 * LAST_WINDOW // MIB):
        for wanted in observe(ahead, position, MIB):
            covered = max(covered, wanted.stop)
        position += MIB
    for kind, count in steps:
        if kind == 0:
            observe(ahead, count * 1000, 4096)
            continue
        for _ in range(count):
            for wanted in observe(ahead, position, MIB):
                covered = max(covered, wanted.stop)
            position = position + MIB
            assert covered - position >= min(LAST_WINDOW // 2 - MIB, size - position)


def test_a_walk_wants_the_heads_ahead_of_it_before_any_body() -> None:
    ahead = Readahead(STARTS, SIZE)
    ahead.observe(10 * TENSOR, 4096)
    wanted = [head for tensor in (20, 30, 50) for head in ahead.observe(tensor * TENSOR, 4096).soon]
    heads = [h.stop - CHUNK for h in wanted]
    assert heads == sorted(set(heads)) and len(heads) >= 8
    assert all(head % TENSOR == 0 for head in heads) and all(h.start == h.stop - CHUNK - AROUND for h in wanted)


def test_a_walk_is_seen_behind_the_reading_around_of_the_kernel() -> None:
    """A fault at the head comes as a read of the MiB before it and one of the MiB behind it."""
    ahead = Readahead(STARTS, SIZE)
    wanted: list[ByteRange] = []
    for tensor in range(10, 16):
        wanted += observe(ahead, tensor * TENSOR - MIB, MIB)
        wanted += observe(ahead, tensor * TENSOR, MIB)
    assert max(w.stop for w in wanted) >= 40 * TENSOR


def test_a_long_run_never_puts_the_heads_ahead_before_its_next_bytes() -> None:
    ahead = Readahead(STARTS, SIZE)
    soon = [ahead.observe(offset, MIB).soon for offset in range(7 * MIB, 20 * TENSOR, MIB)]
    assert not any(soon[3:])
