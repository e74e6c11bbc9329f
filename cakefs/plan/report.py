"""Which layers of which models are the same, what of them is here, what keeping each tensor once saves. Pure.

Bytes that are known to be equal (`knowledge.py`; claims of others are left out) have a *home*: the first model that has
them, those that were published before those that were made here, and there the first layer. All places that have bytes
of one home are drawn in one colour, its *tint*.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from cakefs.model import Manifest
from cakefs.plan.bill import Bill, bills, weigh
from cakefs.plan.equal import Known, LocalBytes, Mark, known_models
from cakefs.plan.knowledge import Knowledge
from cakefs.plan.layers import split_name
from cakefs.plan.tensors import shown_tensors

KIN = 100  # Models are drawn together that share at least this part of the smaller one: norms of ones make no family.
CELLS = 6  # Of tensors that are no layer; the smallest of more become one.
STRIPS = 16  # Of a model; a repository may have dozens of quantizations.
ABOVE = 0.3  # Of the way from the first layer to the last, for what is no layer.


class Entry(NamedTuple):
    """A model, when it was added (Unix seconds), and the word for its state."""

    manifest: Manifest
    added: int
    state: str


class Tint(NamedTuple):
    """Attributes:
    home: Number of a model, as in `Report.models`.
    place: Of the layer there, or of the tensor that is no layer.
    depth: How far down the model that is: its layers, stack after stack, from 0 to 1, and below 0 what is no layer.
    """

    home: int
    place: str
    depth: float


class Cell(NamedTuple):
    """A layer, or a tensor that is none.

    Attributes:
        bands: Bytes by tint (a number, as in `Report.tints`), the most first; the rest of `size` is nowhere else.
    """

    place: str
    size: int
    local: int
    bands: tuple[tuple[int, int], ...]


class Strip(NamedTuple):
    """What is drawn side by side: the layers of a file under a prefix, by number, and before them what is no layer."""

    path: str
    prefix: str
    rest: tuple[Cell, ...]
    layers: Mapping[int, Cell]


class Model(NamedTuple):
    """Attributes:
    size: Of its files; `local` of it is here.
    shared: Bytes of its tensors that other models have, too.
    kin: The models that share most with it, by number, and how much.
    omitted: Strips that are not in `strips`.
    """

    name: str
    state: str
    made_here: bool
    size: int
    local: int
    shared: int
    kin: tuple[tuple[int, int], ...]
    strips: tuple[Strip, ...]
    omitted: int

    @property
    def layers(self) -> int:
        return sum(len(strip.layers) for strip in self.strips)


class Report(NamedTuple):
    """Attributes:
    families: Numbers of models; those that share nothing are families of one, at the end.
    whole: If all of each model were here; `here` is what is.
    """

    models: tuple[Model, ...]
    tints: tuple[Tint, ...]
    families: tuple[tuple[int, ...], ...]
    whole: Bill
    here: Bill


class _Use(NamedTuple):
    """A tensor at its place."""

    strip: tuple[str, str]
    layer: int | None
    name: str
    mark: Mark
    size: int
    local: int

    @property
    def place(self) -> tuple[tuple[str, str], int] | tuple[str, str]:
        """What has one colour: a layer, or a tensor that is none."""
        return (self.strip[0], self.name) if self.layer is None else (self.strip, self.layer)


def make_report(entries: Iterable[Entry], sources: Iterable[Knowledge], local: LocalBytes) -> Report:
    """Args: sources: What is known of bytes."""
    ordered = sorted(entries, key=lambda e: (bool(e.manifest.stack), e.added, e.manifest.name))
    known = known_models([e.manifest for e in ordered], [s for s in sources if not s.claimed], local)
    uses = [list(_uses(model)) for model in known]
    owners, tints = _owners(uses), _Tints(uses)
    kin = _kin(owners)
    weights = [weigh(model) for model in known]
    models = []
    for number, (entry, used, weight) in enumerate(zip(ordered, uses, weights, strict=True)):
        strips = _strips(used, tints)
        models.append(
            Model(
                entry.manifest.name,
                entry.state,
                bool(entry.manifest.stack),
                weight.copies,
                weight.copies_here,
                sum(use.size for use in used if len(owners[use.mark][1]) > 1),
                tuple(sorted(kin[number].items(), key=lambda item: (-item[1], item[0]))),
                tuple(strips[:STRIPS]),
                max(0, len(strips) - STRIPS),
            )
        )
    whole, here = bills(weights)
    return Report(tuple(models), tuple(tints.found), tuple(_families(models)), whole, here)


def _uses(model: Known) -> Iterator[_Use]:
    for tensor in shown_tensors(model.manifest):
        data = tensor.data
        if size := data.size:
            split = split_name(tensor.name)
            prefix, layer = (split.prefix, split.layer) if split else ("", None)
            yield _Use((tensor.path, prefix), layer, tensor.name, model.mark(data), size, model.here(data))


def _owners(uses: Sequence[Sequence[_Use]]) -> dict[Mark, tuple[int, list[int]]]:
    """Size of the bytes, and which models have them."""
    found: dict[Mark, tuple[int, list[int]]] = {}
    for number, used in enumerate(uses):
        for use in used:
            models = found.setdefault(use.mark, (use.size, []))[1]
            if not models or models[-1] != number:
                models.append(number)
    return found


# --- colours --------------------------------------------------------------------------------------------------------


class _Tints:
    """The colours of all that is in more than one place."""

    def __init__(self, uses: Sequence[Sequence[_Use]]) -> None:
        times = Counter(use.mark for used in uses for use in used)
        self.found: list[Tint] = []
        self._numbers: dict[tuple[int, object], int] = {}
        self._of: dict[Mark, int] = {}
        for home, used in enumerate(uses):
            depths = _depths(used)
            for use in used:
                if times[use.mark] > 1 and use.mark not in self._of:
                    self._of[use.mark] = self._number(home, use, depths[use.place])

    def of(self, use: _Use) -> int | None:
        return self._of.get(use.mark)

    def _number(self, home: int, use: _Use, depth: float) -> int:
        number = self._numbers.setdefault((home, use.place), len(self.found))
        if number == len(self.found):
            self.found.append(Tint(home, _place(use), depth))
        return number


def _depths(uses: Sequence[_Use]) -> dict[object, float]:
    """By place, each its own, in the order in which they are drawn."""
    stacks = {(use.strip, use.layer) for use in uses if use.layer is not None}
    tall = Counter(strip for strip, _ in stacks)
    layers = sorted(stacks, key=lambda place: (_order(place[0], tall[place[0]]), place[1]))
    rest = sorted({(use.strip[0], use.name) for use in uses if use.layer is None})
    found: dict[object, float] = {place: round(i / len(layers), 3) for i, place in enumerate(layers)}
    return found | {place: round(ABOVE * (i / len(rest) - 1), 3) for i, place in enumerate(rest)}


def _place(use: _Use) -> str:
    return use.name if use.layer is None else f"layer {use.layer}"


def _order(strip: tuple[str, str], layers: int) -> tuple[str, int, str]:
    """The largest stack of layers first."""
    path, prefix = strip
    return path, -layers, prefix


def _strips(uses: Sequence[_Use], tints: _Tints) -> list[Strip]:
    layers: dict[tuple[str, str], dict[int, list[_Use]]] = {}
    rest: dict[str, list[_Use]] = defaultdict(list)
    for use in uses:
        if use.layer is None:
            rest[use.strip[0]].append(use)
        else:
            layers.setdefault(use.strip, {}).setdefault(use.layer, []).append(use)
    for path in rest.keys() - {path for path, _ in layers}:
        layers[path, ""] = {}
    order = sorted(layers, key=lambda strip: _order(strip, len(layers[strip])))
    found = []
    for path, prefix in order:
        cells = {n: _cell(f"layer {n}", used, tints) for n, used in sorted(layers[path, prefix].items())}
        found.append(Strip(path, prefix, tuple(_rest(rest.pop(path, []), tints)), cells))
    return found


def _rest(uses: Sequence[_Use], tints: _Tints) -> Iterator[Cell]:
    by_size = sorted(uses, key=lambda use: -use.size)
    single, others = (by_size, []) if len(by_size) <= CELLS else (by_size[: CELLS - 1], by_size[CELLS - 1 :])
    for use in sorted(single, key=lambda use: use.name):
        yield _cell(use.name, [use], tints)
    if others:
        yield _cell(f"{len(others)} other tensors", others, tints)


def _cell(place: str, uses: Sequence[_Use], tints: _Tints) -> Cell:
    bands: Counter[int] = Counter()
    for use in uses:
        if (tint := tints.of(use)) is not None:
            bands[tint] += use.size
    size, local = sum(use.size for use in uses), sum(use.local for use in uses)
    return Cell(place, size, local, tuple(sorted(bands.items(), key=lambda band: (-band[1], band[0]))))


# --- who shares with whom -------------------------------------------------------------------------------------------


def _kin(owners: Mapping[Mark, tuple[int, list[int]]]) -> dict[int, Counter[int]]:
    """Bytes that each model has in common with each other one; what a model has twice counts once."""
    groups: Counter[tuple[int, ...]] = Counter()
    for size, models in owners.values():
        if len(models) > 1:
            groups[tuple(models)] += size
    found: dict[int, Counter[int]] = defaultdict(Counter)
    for group, size in groups.items():
        for a, b in combinations(group, 2):
            found[a][b] += size
            found[b][a] += size
    return found


def _families(models: Sequence[Model]) -> list[tuple[int, ...]]:
    """The heaviest first, then the loners; within a family the first home first."""
    family = list(range(len(models)))

    def head(number: int) -> int:
        while family[number] != number:
            number = family[number]
        return number

    for number, model in enumerate(models):
        for other, size in model.kin:
            if size * KIN >= min(model.size, models[other].size):
                one, another = sorted((head(number), head(other)))
                family[another] = one
    members: dict[int, list[int]] = defaultdict(list)
    for number in range(len(models)):
        members[head(number)].append(number)
    weight = {first: sum(models[n].size for n in group) for first, group in members.items()}
    order = sorted(members, key=lambda first: (len(members[first]) == 1, -weight[first], models[first].name))
    return [tuple(members[first]) for first in order]


# --- in words -------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """Layers `[first, last]` that come, one after the other, from the layers `origin` on of `home`.

    Attributes:
        home: None for layers of which nothing is anywhere else.
        origin: None where they are no such sequence: of several homes, or only in part from there.
    """

    first: int
    last: int
    home: int | None
    origin: int | None


def runs(strip: Strip, tints: Sequence[Tint]) -> list[Run]:
    """The layers of a strip in few words."""
    found: list[Run] = []
    for number, cell in strip.layers.items():
        home, origin = _home(cell, tints)
        if found:
            last = found[-1]
            follows = origin is not None and last.origin is not None and origin == last.origin + number - last.first
            if last.last == number - 1 and last.home == home and (follows or (origin is None and last.origin is None)):
                found[-1] = last._replace(last=number)
                continue
        found.append(Run(number, number, home, origin))
    return found


def _home(cell: Cell, tints: Sequence[Tint]) -> tuple[int | None, int | None]:
    if not cell.bands:
        return None, None
    tint = tints[cell.bands[0][0]]
    word, _, number = tint.place.partition(" ")
    whole = len(cell.bands) == 1 and cell.bands[0][1] == cell.size and word == "layer" and number.isdigit()
    return tint.home, int(number) if whole else None
