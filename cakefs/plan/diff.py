"""Two models, tensor by tensor: equal, different, in one of them only, or unknown. Pure; looks at no byte of a tensor.

Tensors are paired by name. Equal means equal bytes; a pair with equal bytes and another dtype or shape is marked. What
is known of bytes comes as a list of sources (`knowledge.py`), so that two models of which nothing was fetched can be
told apart as far as anybody said something about them.
"""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

from cakefs.model import Manifest
from cakefs.plan.knowledge import Knower, Knowledge, Origin, Relation, origin_of
from cakefs.plan.layers import split_name
from cakefs.plan.tensors import Tensor, named_alike, shown_tensors


class State(StrEnum):
    EQUAL = "equal"
    DIFFERENT = "different"
    ONLY_A = "only_a"
    ONLY_B = "only_b"
    UNKNOWN = "unknown"


_STATES = {relation: State(relation) for relation in Relation}


class Row(NamedTuple):
    """A tensor of either model, or of both.

    Attributes:
        size_a: In bytes; 0 where A has no such tensor. `size_b` likewise.
        claimed: The state rests on what somebody else said, such as an imported hashes.json.
        retyped: Equal bytes, but another dtype or shape.
        twin: Where only one model has the name: a tensor of the other one with the same bytes, as far as is known.
    """

    name: str
    state: State
    size_a: int
    size_b: int
    claimed: bool
    retyped: bool
    twin: str


class Total(NamedTuple):
    tensors: int
    bytes_a: int
    bytes_b: int


class Diff(NamedTuple):
    """Attributes:
    rows: Those of A in its order, then what only B has.
    """

    rows: tuple[Row, ...]

    def totals(self) -> dict[State, Total]:
        sums = {state: [0, 0, 0] for state in State}
        for row in self.rows:
            total = sums[row.state]
            total[0] += 1
            total[1] += row.size_a
            total[2] += row.size_b
        return {state: Total(*total) for state, total in sums.items()}


class Group(NamedTuple):
    """Tensors drawn side by side: the layers under a prefix by number, or (prefix empty) tensors that are no layer.

    Attributes:
        cells: Bytes by state, of each layer or tensor.
    """

    prefix: str
    cells: dict[int, dict[str, int]]


def diff_models(a: Manifest, b: Manifest, sources: Iterable[Knowledge]) -> Diff:
    """Compares what the directories of two models show."""
    knower = Knower(sources)
    tensors_a, tensors_b = named_alike(shown_tensors(a), shown_tensors(b))
    origins_a = {name: origin_of(a, tensor.data) for name, tensor in tensors_a.items()}
    origins_b = {name: origin_of(b, tensor.data) for name, tensor in tensors_b.items()}
    twins_a, twins_b = _Twins(knower, origins_a), _Twins(knower, origins_b)
    rows = []
    for name, origin in origins_a.items():
        other = origins_b.get(name)
        if other is None:
            rows.append(Row(name, State.ONLY_A, origin.size, 0, False, False, twins_b.of(origin)))
            continue
        relation, claimed = knower.compare(origin, other)
        retyped = relation is Relation.EQUAL and _type(tensors_a[name]) != _type(tensors_b[name])
        rows.append(Row(name, _STATES[relation], origin.size, other.size, claimed, retyped, ""))
    for name, origin in origins_b.items():
        if name not in origins_a:
            rows.append(Row(name, State.ONLY_B, 0, origin.size, False, False, twins_a.of(origin)))
    return Diff(tuple(rows))


def group_cells(sizes: Iterable[tuple[str, str, int]]) -> list[Group]:
    """What a picture of layers is made of.

    Args:
        sizes: Name of a tensor, its state, its bytes.
    """
    layers: dict[str, dict[int, dict[str, int]]] = {}
    rest = []
    for name, state, size in sizes:
        split = split_name(name)
        if split is None:
            rest.append((name, {state: size}))
            continue
        cell = layers.setdefault(split.prefix, {}).setdefault(split.layer, {})
        cell[state] = cell.get(state, 0) + size
    groups = [Group(prefix, dict(sorted(cells.items()))) for prefix, cells in layers.items()]
    groups.sort(key=lambda group: (-len(group.cells), group.prefix))
    return [*groups, Group("", {i: cell for i, (_, cell) in enumerate(sorted(rest))})] if rest else groups


class _Twins:
    """Finds a tensor by what is known of its bytes; the table is made when it is first needed."""

    def __init__(self, knower: Knower, origins: Mapping[str, Origin]) -> None:
        self._knower = knower
        self._origins = origins

    @cached_property
    def _by_mark(self) -> dict[object, str]:
        found: dict[object, str] = {}
        for name, origin in self._origins.items():
            for mark in self._knower.marks(origin):
                found.setdefault((origin.size, mark), name)
        return found

    def of(self, wanted: Origin) -> str:
        """Empty when there is none, as far as is known."""
        if not wanted.size:
            return ""
        marks = ((wanted.size, mark) for mark in self._knower.marks(wanted))
        return next((self._by_mark[mark] for mark in marks if mark in self._by_mark), "")


def _type(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    return tensor.dtype, tensor.shape
