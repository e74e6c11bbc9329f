"""The stack of a view as a picture: which of its layers is which layer of which model.

LAYER  FROM
0-3    org/name 0-3  █▓▓▓··
4-7    org/name 1-4  ·▓▓▓█·      ▓: used more than once
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cakefs.model import LayerOrigin, StackLayer

ONCE, REPEATED, UNUSED = "█▓·"
WIDTH = 64  # Cells at most; in a deeper model a cell is several layers.


class Run(NamedTuple):
    """Consecutive layers that come from consecutive layers; `origins` those of the first."""

    layer: int
    origins: tuple[LayerOrigin, ...]
    note: str
    length: int

    def is_followed_by(self, entry: StackLayer) -> bool:
        expected = tuple(LayerOrigin(o.model, o.layer + self.length, o.revision) for o in self.origins)
        return (entry.layer, entry.origins, entry.note) == (self.layer + self.length, expected, self.note)


def find_runs(stack: Iterable[StackLayer]) -> list[Run]:
    runs: list[Run] = []
    for entry in stack:
        if runs and runs[-1].is_followed_by(entry):
            runs[-1] = runs[-1]._replace(length=runs[-1].length + 1)
        else:
            runs.append(Run(entry.layer, entry.origins, entry.note, 1))
    return runs


def uses(stack: Iterable[StackLayer]) -> Counter[LayerOrigin]:
    """How often each layer of a model is in the stack."""
    return Counter(origin for entry in stack for origin in entry.origins)


def draw_stack(stack: Sequence[StackLayer]) -> list[str]:
    """A line for each run, titles first."""
    used = uses(stack)
    depth = max(origin.layer for origin in used) + 1
    at_once = -(-depth // WIDTH)
    rows = [("LAYER", "FROM", "")]
    for run in find_runs(stack):
        bar = "".join(_cell(run, used, range(i, i + at_once)) for i in range(0, depth, at_once))
        origins = " + ".join(f"{o.model} {_range(o.layer, run.length)}" for o in run.origins)
        rows.append((_range(run.layer, run.length), f"{origins} ({run.note})" if run.note else origins, bar))
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return [f"{layer:<{widths[0]}}  {origin:<{widths[1]}}  {bar}".rstrip() for layer, origin, bar in rows]


def _cell(run: Run, used: Counter[LayerOrigin], cell: range) -> str:
    """By the first of several origins."""
    if not run.origins:
        return UNUSED
    first = run.origins[0]
    layers = [i for i in cell if first.layer <= i < first.layer + run.length]
    if not layers:
        return UNUSED
    return REPEATED if any(used[LayerOrigin(first.model, i, first.revision)] > 1 for i in layers) else ONCE


def _range(first: int, length: int) -> str:
    return str(first) if length == 1 else f"{first}-{first + length - 1}"


def stack_as_json(stack: Sequence[StackLayer]) -> list[dict[str, object]]:
    used = uses(stack)
    return [
        {
            "layer": entry.layer,
            "origins": [{"model": o.model, "layer": o.layer, "revision": o.revision} for o in entry.origins],
            "note": entry.note,
            "repeated": any(used[origin] > 1 for origin in entry.origins),
        }
        for entry in stack
    ]
