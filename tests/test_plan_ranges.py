"""Byte ranges, compared with sets of bytes."""

from collections.abc import Iterable
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from cakefs.model import ByteRange
from cakefs.plan.ranges import coalesce, first, subtract

ranges = st.builds(ByteRange, st.integers(0, 40), st.integers(0, 40))
lists = st.lists(ranges, max_size=8)


def covered(ranges: Iterable[ByteRange]) -> set[int]:
    return {byte for r in ranges for byte in range(r.start, r.stop)}


def is_tidy(ranges: list[ByteRange], gap: int = 0) -> bool:
    """Not empty, rising, and with more than `gap` bytes between."""
    return all(r.size > 0 for r in ranges) and all(a.stop + gap < b.start for a, b in pairwise(ranges))


@given(lists)
def test_coalesced_ranges_cover_the_same_bytes(some: list[ByteRange]) -> None:
    merged = coalesce(some)
    assert covered(merged) == covered(some)
    assert is_tidy(merged)


@given(lists, st.integers(0, 10))
def test_a_gap_fills_the_holes_up_to_it_and_no_other(some: list[ByteRange], gap: int) -> None:
    merged = coalesce(some, gap)
    exact = coalesce(some)
    assert is_tidy(merged, gap)
    assert covered(merged) >= covered(exact)
    filled = subtract(merged, exact)
    assert all(hole.size <= gap for hole in filled)


@given(lists, st.integers(0, 10))
def test_coalescing_twice_changes_nothing(some: list[ByteRange], gap: int) -> None:
    assert coalesce(coalesce(some, gap), gap) == coalesce(some, gap)


@given(lists, lists)
def test_subtracting_leaves_what_no_hole_covers(some: list[ByteRange], holes: list[ByteRange]) -> None:
    rest = subtract(some, holes)
    assert covered(rest) == covered(some) - covered(holes)
    assert all(r.size > 0 for r in rest)
    assert all(a.stop <= b.start for a, b in pairwise(rest))


@given(lists, lists)
def test_the_rest_and_what_was_taken_make_the_whole(some: list[ByteRange], holes: list[ByteRange]) -> None:
    rest = subtract(some, holes)
    taken = subtract(some, rest)
    assert coalesce([*rest, *taken]) == coalesce(some)


@given(lists, st.integers(0, 100))
def test_the_first_bytes_of_ranges_are_taken_in_their_order(some: list[ByteRange], size: int) -> None:
    cut = first(some, size)
    laid_out = [byte for r in some for byte in range(r.start, r.stop)]
    assert [byte for r in cut for byte in range(r.start, r.stop)] == laid_out[:size]
    assert all(r.size > 0 for r in cut)
