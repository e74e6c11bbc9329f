"""Arithmetic of half-open byte ranges.

Results are disjoint, rising and never empty, whatever the order, overlap or emptiness of what comes in.
"""

from collections.abc import Iterable

from cakefs.model import ByteRange


def coalesce(ranges: Iterable[ByteRange], gap: int = 0) -> list[ByteRange]:
    """The union, with holes of up to `gap` bytes filled: one request is cheaper than two with a small hole between."""
    merged: list[ByteRange] = []
    for start, stop in sorted(ranges):
        if start >= stop:
            continue
        if merged and start <= merged[-1].stop + gap:
            merged[-1] = ByteRange(merged[-1].start, max(merged[-1].stop, stop))
        else:
            merged.append(ByteRange(start, stop))
    return merged


def subtract(ranges: Iterable[ByteRange], holes: Iterable[ByteRange]) -> list[ByteRange]:
    """The bytes of `ranges` that no hole covers."""
    rest: list[ByteRange] = []
    closed = coalesce(holes)
    first = 0  # holes before this one end before every range still to come
    for start, stop in coalesce(ranges):
        while first < len(closed) and closed[first].stop <= start:
            first += 1
        for at in range(first, len(closed)):
            hole = closed[at]
            if hole.start >= stop:
                break
            if start < hole.start:
                rest.append(ByteRange(start, hole.start))
            start = hole.stop
        if start < stop:
            rest.append(ByteRange(start, stop))
    return rest


def first(ranges: Iterable[ByteRange], size: int) -> list[ByteRange]:
    """The first `size` bytes of them, in the order in which they come."""
    cut = []
    for start, stop in ranges:
        stop = min(stop, start + size)
        if start < stop:
            cut.append(ByteRange(start, stop))
            size -= stop - start
    return cut


def tiling(spans: Iterable[tuple[int, int]], size: int, start: int = 0) -> list[tuple[int, int]] | None:
    """Spans that follow each other from `start` to `size` without gap; None when there is a gap.

    Where spans overlap (a header and the whole file, say), the longer one that begins at the needed place is taken.
    """
    longest: dict[int, int] = {}
    for begin, stop in spans:
        longest[begin] = max(stop, longest.get(begin, 0))
    position, chosen = start, []
    while longest.get(position, position) > position:
        chosen.append((position, longest[position]))
        position = longest[position]
    return chosen if position == size else None
