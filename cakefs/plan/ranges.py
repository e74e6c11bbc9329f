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
