"""Layers as a picture, a character each, that is read without colours:

model.layers 0-31  ████████████████░░░░░░░░████████
other              █░█
"""

from collections.abc import Callable, Mapping, Sequence

from cakefs.plan.diff import Group

WIDTH = 64  # Characters in a line.
ABSENT = "·"  # A number without a layer.

Mark = Callable[[Mapping[str, int]], str]
"""The character for a layer, by what its bytes are."""


def draw_groups(groups: Sequence[Group], mark: Mark) -> list[str]:
    """A line for each group of layers; more where it is long."""
    rows = [row for group in groups for row in _rows(group, mark)]
    width = max((len(label) for label, _ in rows), default=0)
    return [f"{label:<{width}}  {cells}" for label, cells in rows]


def _rows(group: Group, mark: Mark) -> list[tuple[str, str]]:
    first, last = min(group.cells), max(group.cells)
    rows = []
    for start in range(first, last + 1, WIDTH):
        stop = min(start + WIDTH, last + 1)
        cells = "".join(mark(group.cells[i]) if i in group.cells else ABSENT for i in range(start, stop))
        if cells.strip(ABSENT):
            numbers = f"{start}-{stop - 1}" if stop - start > 1 else str(start)
            rows.append((f"{group.prefix} {numbers}" if group.prefix else "" if start else "other", cells))
    return rows


def groups_as_json(groups: Sequence[Group], mark: Mark) -> list[dict[str, object]]:
    """Those that are layers."""
    return [
        {
            "prefix": group.prefix,
            "picture": "".join(mark(cell) for cell in group.cells.values()),
            "layers": [{"layer": number, "bytes": dict(cell)} for number, cell in group.cells.items()],
        }
        for group in groups
        if group.prefix
    ]
